"""safetensors files in, their tensors out, and back; one after the other, in 16 bits or 32.

A file is the length of its header (8 bytes), the header (JSON: each tensor's type, shape and byte
range) and the tensors' bytes; see https://github.com/huggingface/safetensors. The library of that
name writes only what is in memory as a whole, and NumPy has no bfloat16 for what it reads.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..common.files import sync_file

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The names of the types in a header, and what holds their numbers.
_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype("<u2")),
}
_STORED_AS = {code: (name, dtype) for name, (code, dtype) in _TYPES.items()}

_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library reads
_CHUNK = 1 << 22  # numbers that are converted at a time


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        path: the file.
        name: its name in the file.
        precision: 'float32', 'float16' or 'bfloat16'; another type has the name that the file has.
        shape: its sizes.
        start: its first byte in the file.
    """

    path: str
    name: str
    precision: str
    shape: tuple[int, ...]
    start: int


# --- read ---------------------------------------------------------------------------------------


def find_tensors(folder: str) -> dict[str, StoredTensor]:
    """The tensors of a model's folder, by name: of model.safetensors, or of its shards.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: a file is cut short or damaged, or lacks a tensor that the index names.
    """
    index = os.path.join(folder, INDEX_FILE)
    if _is_file(folder, WEIGHTS_FILE) or not os.path.isfile(index):  # as transformers chooses
        return read_header(os.path.join(folder, WEIGHTS_FILE))
    places = _read_shard_index(index)
    missing = [f for f in sorted(set(places.values())) if not _is_file(folder, f)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names: copy it there"
        )
    headers = {file: read_header(os.path.join(folder, file)) for file in set(places.values())}
    for name, file in places.items():
        if name not in headers[file]:
            raise ValueError(
                f"{os.path.join(folder, file)} lacks {name}, which {index} places there"
            )
    return {name: headers[file][name] for name, file in places.items()}


def _is_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _read_shard_index(path: str) -> dict[str, str]:
    """The file of each tensor, by the tensor's name."""
    try:
        with open(path, encoding="utf-8") as file:
            places = json.load(file)["weight_map"]
        if not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("its weight_map is empty")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards ({error!r}); copy it again") from error
    outside = [name for name in places.values() if os.path.basename(name) != name]
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}, which is not a file beside it")
    return dict(places)


def read_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or is cut short.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        try:
            return _read_header(file, path)
        except (ValueError, LookupError, TypeError, struct.error, RecursionError) as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); copy or download it again"
            ) from error


def _read_header(file: BinaryIO, path: str) -> dict[str, StoredTensor]:
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"its header of {length} bytes reaches past its {size} bytes")
    header = json.loads(file.read(length))
    header.pop(_METADATA, None)
    data = 8 + length
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
            raise ValueError(f"the sizes of {name} are not whole numbers")
        precision, dtype = _STORED_AS.get(entry["dtype"], (str(entry["dtype"]), None))
        if first != end or last < first:
            raise ValueError(f"the bytes of {name} do not follow those before")
        if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {last - first} bytes, not those of its shape {shape}")
        tensors[name] = StoredTensor(path, name, precision, shape, data + first)
        end = last
    if data + end != size:
        raise ValueError(f"it has {size:,} bytes where its header needs {data + end:,}")
    return tensors


def read_metadata(path: str) -> dict[str, str]:
    """What a file says beside its tensors; raises as read_header() does."""
    read_header(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get(_METADATA)
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def read_chunks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """A tensor's numbers as float32, in flat chunks.

    Raises:
        ValueError: its type is none of ours, or a number is not finite, or the file is cut short.
    """
    if tensor.precision not in _TYPES:
        raise ValueError(
            f"{tensor.path}: {tensor.name} has the type {tensor.precision}; float32, float16 and "
            "bfloat16 can be read: save the model in one of these"
        )
    dtype = _TYPES[tensor.precision][1]
    left = math.prod(tensor.shape)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        while left:
            raw = file.read(min(left, _CHUNK) * dtype.itemsize)
            if len(raw) != min(left, _CHUNK) * dtype.itemsize:
                raise ValueError(f"{tensor.path} became shorter while it was read: copy it again")
            numbers = np.frombuffer(raw, dtype)
            left -= numbers.size
            chunk = _widen(numbers, tensor.precision)
            check_finite(chunk, f"{tensor.path}: {tensor.name}")
            yield chunk


def read_into(tensor: StoredTensor, values: np.ndarray) -> None:
    """Fills a float32 array with a tensor's numbers; see read_chunks()."""
    flat, start = values.reshape(-1), 0
    for chunk in read_chunks(tensor):
        flat[start : start + chunk.size] = chunk
        start += chunk.size


def check_finite(numbers: np.ndarray, name: str) -> None:
    """Raises ValueError if a number is infinite or NaN; the message says of which tensor."""
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{name} holds numbers that are infinite or not a number: the model is broken. Take "
            "an earlier checkpoint"
        )


def _widen(numbers: np.ndarray, precision: str) -> np.ndarray:
    if precision == "bfloat16":
        return (numbers.astype("<u4") << 16).view("<f4")
    return numbers.astype(np.float32, copy=False)


# --- write --------------------------------------------------------------------------------------


def narrow(values: np.ndarray, precision: str, name: str) -> np.ndarray:
    """Float32 numbers in another precision; bfloat16 as the bits of a uint16.

    Raises:
        ValueError: a number is not finite, or too large for the precision.
    """
    check_finite(values, name)
    if precision == "float32":
        return values
    if precision == "bfloat16":
        # Round to the nearest, of two as near to the even one.
        bits = np.ascontiguousarray(values).view(np.uint32)
        narrowed = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        is_finite = (narrowed & 0x7F80) != 0x7F80
    else:
        with np.errstate(over="ignore"):
            narrowed = values.astype(np.float16)
        is_finite = np.isfinite(narrowed)
    if not is_finite.all():
        raise ValueError(
            f"{name} holds {np.abs(values).max():.4g}, which is too large for {precision}: give "
            f"precision={'float32' if precision == 'bfloat16' else 'bfloat16'!r}"
        )
    return narrowed


def plan_shards(
    tensors: Sequence[tuple[str, tuple[int, ...]]], precision: str, max_bytes: int
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Which tensors (name, shape) each file gets, by the file's name.

    A file is filled, in the tensors' order, up to `max_bytes`. A larger tensor has its own file.
    """
    itemsize = _TYPES[precision][1].itemsize
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor[1]) * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    count = len(shards)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def shard_index(
    shards: dict[str, list[tuple[str, tuple[int, ...]]]], precision: str
) -> dict[str, Any]:
    """The content of the index that names each tensor's file."""
    itemsize = _TYPES[precision][1].itemsize
    numbers = sum(math.prod(shape) for shard in shards.values() for _, shape in shard)
    return {
        "metadata": {"total_parameters": numbers, "total_size": numbers * itemsize},
        "weight_map": {name: file for file, shard in shards.items() for name, _ in shard},
    }


def write_tensors(
    path: str,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    precision: str,
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a new file with the tensors (name, shape); `read` gives each when it is written.

    The file says `metadata` beside the tensors.

    Raises:
        FileExistsError: there is a file of this name.
        ValueError: a tensor has another shape, or numbers that the precision does not hold.
    """
    code, dtype = _TYPES[precision]
    # transformers asks for the format.
    header: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers are aligned
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            values = read(name)
            if values.shape != shape:
                raise ValueError(f"{name} has shape {list(values.shape)}, not {list(shape)}")
            flat = values.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                chunk = narrow(flat[start : start + _CHUNK], precision, name)
                file.write(chunk.astype(dtype, copy=False).view(np.uint8).data)
        sync_file(file)
