"""A checkpoint's tensors in, a file of int8 matrices out, which sessions map into memory.

The file is a safetensors file: each matrix as I8, then the scales and the sums of the columns as
F32. It lies beside the checkpoint, `model-1000.int8-<key>`, or in the user's cache folder if that
place is read-only. The key is a digest of the weights: files of one name have the same contents.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from .. import quantized
from ..common.files import write_whole
from ..common.hparams import HParams
from ..common.locks import wait_for_lock
from ..common.published import INT8_SUFFIX
from ..common.report import progress, say
from ..quantized import ALIGNMENT, UNEMBEDDING, QuantizedFile, StoredMatrix
from . import safetensors_file
from .checkpoint_tensors import ReadTensor

_KEY_LENGTH = 16
_DIGEST, _LAYOUT = "digest", "layout"
_LAYOUT_VERSION = "1"


def cache_folder() -> str:
    """Where the user's programs keep what they can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser(r"~\AppData\Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(os.path.abspath(base), "gpt_2_simple")


def find_or_make(
    prefix: str,
    digest: str,
    hparams: HParams,
    open_tensors: Callable[[], Any],
    beside: bool = True,
) -> QuantizedFile:
    """The file of int8 matrices for the weights of a checkpoint; it is made if it is missing.

    Args:
        prefix: the checkpoint's, or an adapter's folder.
        digest: of the weights.
        hparams: the model's sizes.
        open_tensors: gives a context manager that reads the weights by their names, as float32.
        beside: whether the file may lie beside the checkpoint, not only in the cache folder.

    Raises:
        OSError: neither the checkpoint's folder nor the cache folder can be written.
        ValueError: a weight is not a finite number.
    """
    prefix = os.path.abspath(prefix)
    key = digest[:_KEY_LENGTH]
    folders = [os.path.dirname(prefix)] if beside else []
    folders.append(cache_folder())
    name = f"{os.path.basename(prefix)}{INT8_SUFFIX}{key}"
    for folder in folders:
        if found := _open(os.path.join(folder, name), digest, hparams):
            return found
    errors = []
    for folder in folders:
        try:
            if folder == folders[-1]:
                os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, name)
            lock = os.path.join(folder, f".int8-{key}.lock")
            with wait_for_lock(lock, f"Waiting for another process that makes {path}"):
                found = _open(path, digest, hparams)
                return found or _make(path, prefix, digest, hparams, open_tensors)
        except OSError as error:
            if not os.path.lexists(f"{prefix}.index") and not os.path.isdir(prefix):
                raise  # the checkpoint went away
            errors.append(error)
    reasons = "; ".join(str(error) for error in errors)
    raise OSError(
        f"the int8 weights of {prefix} can be written nowhere ({reasons}): make room in one of "
        f"{', '.join(folders)}, or make one writable"
    ) from errors[-1]


def _make(
    path: str, prefix: str, digest: str, hparams: HParams, open_tensors: Callable[[], Any]
) -> QuantizedFile:
    say("Quantizing", prefix)
    shapes = _shapes(hparams)
    with open_tensors() as read, write_whole(path) as file:
        _write(file, shapes, digest, read)
    found = _open(path, digest, hparams)
    if found is None:
        raise OSError(f"{path} was removed, or changed, as soon as it was written")
    # In the cache folder there are those of other models, too.
    of_checkpoint = os.path.dirname(path) == os.path.dirname(prefix)
    for old in glob.glob(f"{glob.escape(prefix + INT8_SUFFIX)}*") if of_checkpoint else ():
        if old != path:
            with contextlib.suppress(OSError):  # Windows removes no file that is mapped
                os.remove(old)
    return found


def _shapes(hparams: HParams) -> dict[str, tuple[int, int]]:
    width = hparams.n_embd
    columns = {"attn/c_attn": 3 * width, "attn/c_proj": width, "mlp/c_fc": 4 * width}
    shapes = {}
    for name in quantized.matrix_names(hparams.n_layer):
        layer = "/".join(name.split("/")[2:4])
        shapes[name] = (width, columns.get(layer, width))
        if layer == "mlp/c_proj":
            shapes[name] = (4 * width, width)
    return {**shapes, UNEMBEDDING: (width, hparams.n_vocab)}


def _header(shapes: dict[str, tuple[int, int]], digest: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {_DIGEST: digest, _LAYOUT: _LAYOUT_VERSION}}
    end = 0

    def add(name: str, code: str, shape: list[int], n_bytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes

    for name, shape in shapes.items():
        add(name, "I8", list(shape), math.prod(shape))
    for ending in (".scales", ".sums"):
        for name, (_, columns) in shapes.items():
            add(name + ending, "F32", [columns], 4 * columns)
    text = json.dumps(header, separators=(",", ":")).encode()
    return (
        struct.pack("<Q", len(text) + -(len(text) + 8) % ALIGNMENT)
        + text
        + b" " * (-(len(text) + 8) % ALIGNMENT)
    )


def _write(
    file: BinaryIO, shapes: dict[str, tuple[int, int]], digest: str, read: ReadTensor
) -> None:
    file.write(_header(shapes, digest))
    scales, sums = [], []
    total = sum(map(math.prod, shapes.values()))
    with progress(total=total, desc="Quantizing", unit="B", unit_scale=True) as bar:
        for name, shape in shapes.items():
            w = read(name)
            w = w.T if name == UNEMBEDDING else w.reshape(shape)
            if not np.isfinite(w).all():
                raise ValueError(f"{name} holds a number that is not finite; it has no int8 form")
            values, scale = quantized.quantize(w)
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            scales.append(scale)
            sums.append(values.sum(axis=0, dtype=np.int64).astype(np.float32))
            bar.update(values.size)
    for array in (*scales, *sums):
        file.write(array.astype("<f4", copy=False).view(np.uint8).data)


def _open(path: str, digest: str, hparams: HParams) -> QuantizedFile | None:
    """A file of these weights; None if there is none, or it is cut short or of another layout."""
    try:
        metadata = safetensors_file.read_metadata(path)
        tensors = safetensors_file.read_header(path)
    except (OSError, ValueError):
        return None
    if metadata.get(_DIGEST) != digest or metadata.get(_LAYOUT) != _LAYOUT_VERSION:
        return None
    shapes = _shapes(hparams)

    def vector(name: str) -> np.ndarray:
        values = np.empty(tensors[name].shape, np.float32)
        safetensors_file.read_into(tensors[name], values)
        return values

    matrices = {
        name: StoredMatrix(
            tensors[name].start, shape, vector(f"{name}.scales"), vector(f"{name}.sums")
        )
        for name, shape in shapes.items()
    }
    return QuantizedFile(path, os.path.getsize(path), digest, matrices)
