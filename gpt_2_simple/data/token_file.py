"""Blocks of token ids in, files of tokens (.tokens, .npz) and chunks of them out."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, overload

import numpy as np

from ..common.files import write_whole
from .parallel_encode import TokenBlock
from .text_files import ReadReport

MAGIC = b"GPT2TOKS"
HASH_BYTES = 1 << 22
BLOCK_TOKENS = 1 << 20


class TokenChunks(Sequence[np.ndarray]):
    """The chunks of a dataset: parts of one array, which may lie on disk; `ends` tells where."""

    def __init__(self, tokens: np.ndarray, ends: Sequence[int]):
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
    """The smaller of uint16 and uint32 that holds the ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if n_vocab <= 1 << 16 else np.uint32)


def _write_ids(blocks: Iterable[TokenBlock], file: BinaryIO) -> list[int]:
    """Writes the blocks' ids; returns the token counts at which chunks end. No chunk is empty."""
    ends: list[int] = []
    n_tokens = 0
    for block in blocks:
        file.write(block.ids)
        for count, ends_chunk in zip(block.counts, block.ends_chunk, strict=True):
            n_tokens += count
            if ends_chunk and n_tokens > (ends[-1] if ends else 0):
                ends.append(n_tokens)
    return ends


def join_blocks(blocks: Iterable[TokenBlock], dtype: np.dtype) -> TokenChunks:
    """Joins blocks of ids in memory."""
    file = io.BytesIO()
    ends = _write_ids(blocks, file)
    return TokenChunks(np.frombuffer(file.getvalue(), dtype), ends)


# --- .tokens --------------------------------------------------------------------------------------


def write_tokens(
    path: str,
    blocks: Iterable[TokenBlock],
    dtype: np.dtype,
    vocabulary: str,
    report: ReadReport,
) -> None:
    """Writes blocks of ids to a token file, which appears when it is complete.

    The file is MAGIC, the ids, a JSON object (dtype, ends of the chunks, vocabulary, and the
    report's lines and warnings), the length of that object in eight bytes (little-endian), and
    MAGIC. `vocabulary` is hash_vocabulary() of the encoder. `report` may still grow while the
    blocks come.
    """
    with write_whole(path) as file:
        file.write(MAGIC)
        ends = _write_ids(blocks, file)
        footer = {
            "dtype": dtype.str,
            "ends": ends,
            "lines": report.lines,
            "warnings": report.warnings,
            "vocabulary": vocabulary,
        }
        encoded = json.dumps(footer).encode()
        file.write(encoded + len(encoded).to_bytes(8, "little") + MAGIC)


def read_tokens(path: str, vocabulary: str) -> tuple[TokenChunks, ReadReport]:
    """Maps a token file into memory; returns its chunks, and what is told of the files they are of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole token file, or another vocabulary made it.
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
        try:
            footer = json.loads(file.read(length))
            dtype, ends = np.dtype(footer["dtype"]), footer["ends"]
            report = ReadReport(footer["lines"], footer["warnings"])
            of_vocabulary = footer["vocabulary"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(broken) from error
    count = ends[-1] if ends else 0
    if count * dtype.itemsize != size - tail - length - len(MAGIC):
        raise ValueError(broken)
    tokens = np.empty(0, dtype)
    if count:
        tokens = np.memmap(path, dtype, mode="r", offset=len(MAGIC), shape=(count,))
    if of_vocabulary != vocabulary:
        raise ValueError(
            f"{path!r} was encoded with another vocabulary than this model's: "
            "encode it again with encode_dataset(model_name=...)"
        )
    return TokenChunks(tokens, ends), report


def save_tokens(path: str | os.PathLike[str], chunks: Iterable[np.ndarray], enc: Any) -> None:
    """Writes chunks (1-D arrays of ids) as a token file, which is read from disk as it is used."""
    dtype = id_dtype(enc.n_vocab)
    blocks = (
        TokenBlock(part.astype(dtype).tobytes(), [len(part)], [start + BLOCK_TOKENS >= len(chunk)])
        for chunk in chunks
        for start in range(0, len(chunk), BLOCK_TOKENS)
        for part in [chunk[start : start + BLOCK_TOKENS]]
    )
    write_tokens(os.fspath(path), blocks, dtype, hash_vocabulary(enc), ReadReport())


# --- .npz -----------------------------------------------------------------------------------------


def save_npz(path: str | os.PathLike[str], chunks: Iterable[np.ndarray]) -> None:
    """Writes chunks as gpt-2-simple 0.8.1 does: a compressed .npz of arr_0, arr_1..."""
    path = os.fspath(path)
    with write_whole(path if path.endswith(".npz") else f"{path}.npz") as file:
        np.savez_compressed(file, *chunks)


def read_npz(path: str, n_vocab: int) -> list[np.ndarray]:
    """Reads the chunks of an .npz file.

    Raises:
        ValueError: it is not an .npz file, or it does not hold ids of such a vocabulary.
    """
    chunks = []
    try:
        # np.load would take what is no archive for a pickle, and advise to run it.
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as npz:
            for name in npz.files:
                ids = np.asarray(npz[name])  # bytes, if it is another kind of archive
                if ids.shape == (0,):
                    continue  # NumPy gives an empty list float64
                chunks.append(_checked_ids(ids, n_vocab, f"{path!r}, array {name!r}"))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path!r} is not a dataset that encode_dataset wrote for this model: {error}. "
            "Encode the text again with encode_dataset(model_name=...)"
        ) from error
    return chunks


def _checked_ids(ids: np.ndarray, n_vocab: int, where: str) -> np.ndarray:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{where} is {ids.dtype} {list(ids.shape)}, not a row of token ids")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
        raise ValueError(
            f"{where} holds ids from {ids.min()} to {ids.max()}; "
            f"the model's vocabulary has 0 to {n_vocab - 1}"
        )
    return ids.astype(id_dtype(n_vocab), copy=False)


# --- the cache of encoded datasets ----------------------------------------------------------------


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
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    chosen = os.environ.get("GPT_2_SIMPLE_CACHE") or os.path.join(caches, "gpt_2_simple")
    return os.path.expanduser(chosen)
