"""Packed token ids in, memory-mapped token chunks out, kept in files that land whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

from ..common.files import write_whole
from .parallel_encode import PackedBlock

MAGIC = b"GPT2TOKS"
HASH_BYTES = 1 << 22


class TokenChunks(Sequence[np.ndarray]):
    """The chunks of a dataset: stretches of one array, which may lie on disk.

    Args:
        tokens: all ids, [tokens].
        ends: where each chunk ends, [chunks], rising.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray):
        self.tokens = tokens
        self.ends = np.asarray(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        index %= len(self)
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]


def id_dtype(n_vocab: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds the ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if n_vocab <= 1 << 16 else np.uint32)


def gather_tokens(packed: Iterable[PackedBlock], dtype: np.dtype) -> TokenChunks:
    """Puts packed blocks together in memory."""
    ends = _Ends()
    ids = b"".join(ends.note(block) for block in packed)
    return TokenChunks(np.frombuffer(ids, dtype), ends.found)


def write_tokens(
    path: str, packed: Iterable[PackedBlock], dtype: np.dtype, about: dict[str, Any]
) -> None:
    """Writes packed blocks to a token file, which appears when it is complete.

    The file is MAGIC, the ids, a JSON object (dtype, ends, and what `about` holds), the length of
    that object in eight bytes (little-endian), and MAGIC.

    Args:
        path: the file.
        packed: the blocks, written as they come.
        dtype: the ids' type.
        about: what else to keep in the file; read when the last block is written.
    """
    ends = _Ends()
    with write_whole(path) as file:
        file.write(MAGIC)
        for block in packed:
            file.write(ends.note(block))
        footer = {"dtype": dtype.str, "ends": ends.found, **about}
        encoded = json.dumps(footer).encode()
        file.write(encoded + len(encoded).to_bytes(8, "little") + MAGIC)


def read_tokens(path: str) -> tuple[TokenChunks, dict[str, Any]]:
    """Maps a token file into memory.

    Returns:
        Its chunks, whose ids stay on disk until they are used, and what else it says.

    Raises:
        ValueError: if it is not a whole token file.
    """
    broken = f"{path!r} is not a whole token file of encode_dataset: write it again"
    tail = 8 + len(MAGIC)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < len(MAGIC) + tail or file.read(len(MAGIC)) != MAGIC:
            raise ValueError(broken)
        file.seek(size - tail)
        length = int.from_bytes(file.read(8), "little")
        if file.read() != MAGIC or length > size - tail - len(MAGIC):
            raise ValueError(broken)
        file.seek(size - tail - length)
        footer = json.loads(file.read(length))
    dtype = np.dtype(footer["dtype"])
    count = footer["ends"][-1] if footer["ends"] else 0
    if count * dtype.itemsize != size - tail - length - len(MAGIC):
        raise ValueError(broken)
    if count == 0:
        return TokenChunks(np.empty(0, dtype), []), footer
    tokens = np.memmap(path, dtype, mode="r", offset=len(MAGIC), shape=(count,))
    return TokenChunks(tokens, footer["ends"]), footer


class _Ends:
    """Counts ids, and notes the counts at which chunks end."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.count = 0

    def note(self, block: PackedBlock) -> bytes:
        """Notes the ends of the chunks in a block; gives its ids back."""
        for count, ends_chunk in zip(block.counts, block.ends, strict=True):
            self.count += count
            if ends_chunk and self.count > (self.found[-1] if self.found else 0):
                self.found.append(self.count)
        return block.ids


def hash_file(path: str) -> str:
    """A digest of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """A digest of anything that JSON can hold."""
    encoded = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def hash_vocabulary(enc: Any) -> str:
    """A digest of an encoder's vocabulary: the same for the same encoder.json and vocab.bpe."""
    return hash_json([sorted(enc.encoder.items()), [list(pair) for pair in enc.bpe_merges]])


def cache_folder() -> str:
    """Where encoded datasets are kept: $GPT_2_SIMPLE_CACHE, or gpt_2_simple in the user's cache."""
    chosen = os.environ.get("GPT_2_SIMPLE_CACHE")
    if chosen:
        return os.path.expanduser(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.expanduser(caches), "gpt_2_simple")
