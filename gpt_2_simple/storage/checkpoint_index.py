"""A checkpoint's index file in, each tensor's name, shape and byte range out, and back.

TensorFlow stores a checkpoint as data files and one index. The index is a LevelDB table
(https://github.com/google/leveldb/blob/main/doc/table_format.md) of protocol buffers: a header
under the empty key, then one BundleEntryProto for each tensor
(tensorflow/core/protobuf/tensor_bundle.proto). Reading it tells how long the data files must be
without loading TensorFlow. Writing it makes one checkpoint of tensors that were written one after
the other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_MAGIC = 0xDB4775248B80FB57
_CRC32C_POLYNOMIAL = 0x82F63B78
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Entry(NamedTuple):
    """Where one tensor lies."""

    dtype: int  # TensorFlow's DataType number (1 is float32, 9 is int64)
    shape: tuple[int, ...]
    shard: int  # which data file holds it, counted from 0
    offset: int  # its first byte in that file
    size: int  # in bytes
    crc32c: int = 0  # the masked CRC-32C of its bytes


def read_index(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Reads each tensor's place, by name, and checks each block's CRC.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, cut short, or no checkpoint index.
        NotImplementedError: the file is compressed, which TensorFlow's own writer never does.
    """
    try:
        records = dict(_read_table(Path(path).read_bytes()))
        if b"" not in records:
            raise ValueError("it has no header")
        return {
            key.decode("utf-8", "backslashreplace"): _read_entry(value)
            for key, value in records.items()
            if key
        }
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"{os.fspath(path)} is not a whole checkpoint index: {error}") from error


def data_sizes(entries: dict[str, Entry]) -> dict[int, int]:
    """How many bytes each shard must at least have: its last tensor ends there."""
    sizes: dict[int, int] = {}
    for entry in entries.values():
        sizes[entry.shard] = max(sizes.get(entry.shard, 0), entry.offset + entry.size)
    return sizes


def message_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walks the fields of a serialized protocol buffer, top level only.

    Yields:
        Field number and value: an int for numbers, bytes for strings and nested messages.

    Raises:
        ValueError: the message is cut short or is no protocol buffer.
    """
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _read_varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _read_varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"a field has the unknown wire type {wire_type}")
        field = message[position : position + size]
        if number == 0 or len(field) != size:
            raise ValueError("a field reaches past the end")
        yield number, field if wire_type == _BYTES else int.from_bytes(field, "little")
        position += size


def _read_entry(message: bytes) -> Entry:
    fields = dict(message_fields(message))
    dimensions = [
        dict(message_fields(_bytes(value)))
        for number, value in message_fields(_bytes(fields.get(2, b"")))
        if number == 2
    ]
    shape = tuple(_int(dimension.get(1, 0)) for dimension in dimensions)
    numbers = (_int(fields.get(number, 0)) for number in (1, 3, 4, 5, 6))
    dtype, shard, offset, size, crc32c = numbers
    return Entry(dtype, shape, shard, offset, size, crc32c)


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a string stands in place of a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands in place of a string")
    return value


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("its last bytes are not those of a table")
    handles = _read_varints(data[-_FOOTER_BYTES:], 4)  # metaindex offset, size; index offset, size
    for _, handle in _read_block(data, *handles[2:]):
        yield from _read_block(data, *_read_varints(handle, 2))


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = data[offset : offset + size + _TRAILER_BYTES]
    if len(block) != size + _TRAILER_BYTES:
        raise ValueError("a block reaches past the end")
    kind, checksum = struct.unpack("<BI", block[size:])
    if masked_crc32c(block[: size + 1]) != checksum:
        raise ValueError("a block's checksum does not match")
    if kind != 0:
        raise NotImplementedError(f"a block is compressed (kind {kind})")
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    end = size - 4 - 4 * restarts
    key, position = b"", 0
    while position < end:
        shared, position = _read_varint(block, position)
        unshared, position = _read_varint(block, position)
        length, position = _read_varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _read_varints(data: bytes, count: int) -> list[int]:
    values, position = [], 0
    for _ in range(count):
        value, position = _read_varint(data, position)
        values.append(value)
    return values


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("a number reaches past the end")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _crc32c_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (_CRC32C_POLYNOMIAL if byte & 1 else 0)
    return byte


_CRC32C_TABLE = [_crc32c_of_byte(byte) for byte in range(256)]


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C that LevelDB and TensorFlow store: rotated, plus a constant.

    It is meant for kilobytes, at about 10 MB/s.
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- write --------------------------------------------------------------------------------------


def index_bytes(entries: dict[str, Entry]) -> bytes:
    """The content of the index file of a checkpoint that has one data file.

    It holds one block of entries, an empty meta-index, an index of the one block, and the footer.
    """
    header = _field(1, 1) + _field(3, _field(1, 1))  # one shard; written by version 1 of the format
    records = {b"": header}
    records |= {name.encode("utf-8"): _entry_message(entry) for name, entry in entries.items()}
    keys = sorted(records)
    table = bytearray()
    data_handle = _add_block(table, [(key, records[key]) for key in keys])
    meta_handle = _add_block(table, [])
    index_handle = _add_block(table, [(keys[-1], data_handle)])
    footer = (meta_handle + index_handle).ljust(_FOOTER_BYTES - 8, b"\0")
    return bytes(table + footer + struct.pack("<Q", _MAGIC))


def _entry_message(entry: Entry) -> bytes:
    shape = b"".join(_field(2, _field(1, size)) for size in entry.shape)
    message = _field(1, entry.dtype) + _field(2, shape) + _field(3, entry.shard)
    message += _field(4, entry.offset) + _field(5, entry.size)
    return message + _varint(6 << 3 | _FIXED32) + struct.pack("<I", entry.crc32c)


def _add_block(table: bytearray, records: list[tuple[bytes, bytes]]) -> bytes:
    """Appends a block to a table; returns its handle. No key is shortened: each is a restart."""
    block, restarts = bytearray(), []
    for key, value in records:
        restarts.append(len(block))
        block += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    restarts = restarts or [0]
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = _varint(len(table)) + _varint(len(block))
    block += b"\0"  # not compressed
    table += block + struct.pack("<I", masked_crc32c(bytes(block)))
    return handle


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
