"""Files in, token chunks out; what draws batches from them is in `sampler`."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..common.files import check_folder, write_whole
from ..common.folders import model_folder, read_hparams
from ..common.report import progress, say, verbosity
from ..common.settings import settings_function
from ..encoder import END_OF_TEXT, check_vocabulary, get_encoder
from . import text_files as documents
from .parallel_encode import (
    MOST_PROCESSES,
    PackedBlock,
    core_count,
    cut_into_blocks,
    pack_blocks,
)
from .settings import START_TOKEN, EncodeCsvSettings, EncodeSettings
from .tables import RowFormat
from .text_files import DataFile, ReadReport
from .token_file import (
    TokenChunks,
    cache_folder,
    gather_tokens,
    hash_file,
    hash_json,
    hash_vocabulary,
    id_dtype,
    read_tokens,
    write_tokens,
)
from .windows import Batch, WindowSampler, fixed_windows, split_dataset, window_length

LARGE_BYTES = 20_000_000
GZIP_RATIO = 4  # text usually shrinks to a third or a quarter
CACHE_VERSION = 1
SAVED_TOKENS = 1 << 20

__all__ = [
    "Batch",
    "WindowSampler",
    "TokenChunks",
    "encode_csv",
    "fixed_windows",
    "load_dataset",
    "save_npz",
    "save_tokens",
    "split_dataset",
    "window_length",
]


def load_dataset(
    enc: Any,
    path: Any,
    combine: int = 50000,
    encoding: str | None = None,
    *,
    column: str | int | None = None,
    template: str | None = None,
    header: bool | None = None,
    start_token: str = START_TOKEN,
    end_token: str = END_OF_TEXT,
    allow_special: bool = True,
    pad_documents: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    processes: int | None = None,
) -> Sequence[np.ndarray]:
    """Reads a dataset and encodes it into chunks of tokens.

    Files of plain text are joined, each followed by `end_token`, until a chunk has `combine`
    characters. The one exception: a dataset of a single file of so many characters has nothing to
    be told apart from, and ends with its own last token. Rows of tables have `start_token` before
    and `end_token` and a newline after them. `<|endoftext|>` is one id wherever it stands, if the
    vocabulary has it; `start_token` is text like any other.

    More than 20 MB of text is encoded by helper processes on every core into a token file in
    `cache_dir`, which is found again as long as the files, the vocabulary and these arguments are
    the same. The chunks then lie on disk, and take no memory to speak of.

    Args:
        enc: the encoder.
        path: a file, a folder, a glob pattern, or a list of these. Files are read by their suffix:
            .csv, .tsv and .jsonl as tables, .npz and .tokens as encode_dataset wrote them, others
            as text; with .gz after it, unpacked.
        combine: how many characters of plain text a chunk has at least, but for the last.
        encoding: the text's encoding; None for UTF-8, or what a byte order mark tells.
        column: the column of a table, by name or by number from 0; None for the first.
        template: several columns, as in '{title}: {body}', in place of `column`.
        header: whether a table's first row names its columns; None looks at it to find out.
        start_token: what begins a row.
        end_token: what ends a row, and a file.
        allow_special: False encodes '<|endoftext|>' as the characters it is made of, as 0.8.1 did.
        pad_documents: make each row and file a chunk of its own.
        cache_dir: where to keep the token file; None for $GPT_2_SIMPLE_CACHE, or gpt_2_simple in
            the user's cache folder.
        processes: how many processes encode; None for one, or one a core if there is much to do.

    Returns:
        The chunks, each a 1-D array of ids.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if there is no text, or something that cannot be read as text.
    """
    files = documents.find_files(path)
    if combine < 1:
        raise ValueError(f"combine={combine} must be at least 1")
    rows = RowFormat(column, template, header, start_token, end_token)
    plan = _Plan(
        enc=enc,
        files=[file for file in files if file.kind not in ("npz", "tokens")],
        rows=rows,
        combine=combine,
        encoding=encoding,
        allow_special=allow_special and enc.end_of_text is not None,
        pad_documents=pad_documents,
        processes=processes,
    )
    encoded = [file for file in files if file.kind in ("npz", "tokens")]
    pieces = [_read_encoded(enc, file.path) for file in encoded]
    if plan.files:
        pieces.append(_encode_cached(plan, cache_dir) if plan.is_large else _encode(plan))
    if not any(len(chunk) for chunks in pieces for chunk in chunks):
        raise ValueError(f"the dataset {path!r} is empty: there is no text in its files")
    return pieces[0] if len(pieces) == 1 else [chunk for chunks in pieces for chunk in chunks]


class _Plan(NamedTuple):
    """All that decides what a dataset's tokens are, and how they are made."""

    enc: Any
    files: list[DataFile]
    rows: RowFormat
    combine: int
    encoding: str | None
    allow_special: bool
    pad_documents: bool
    processes: int | None

    @property
    def bytes_on_disk(self) -> int:
        return sum(os.path.getsize(file.path) for file in self.files)

    @property
    def is_large(self) -> bool:
        sizes = (
            os.path.getsize(file.path) * (GZIP_RATIO if file.path.lower().endswith(".gz") else 1)
            for file in self.files
        )
        return sum(sizes) > LARGE_BYTES

    def key(self) -> str:
        """A digest of everything that changes the tokens."""
        content = [[file.kind, hash_file(file.path)] for file in self.files]
        options = {
            "rows": vars(self.rows),
            "combine": self.combine,
            "encoding": self.encoding,
            "allow_special": self.allow_special,
            "pad_documents": self.pad_documents,
        }
        return hash_json([CACHE_VERSION, content, options, hash_vocabulary(self.enc)])


def _chunk_parts(plan: _Plan, report: ReadReport, on_bytes: Any) -> Iterator[tuple[str, bool]]:
    """Joins documents into chunks: yields parts of text, and whether a chunk ends with each."""
    end_token, lone = plan.rows.end_token, len(plan.files) == 1
    gathered = 0
    for file in plan.files:
        characters = 0
        for text, ends in documents.read_documents(
            file, plan.rows, plan.encoding, report, on_bytes
        ):
            characters += len(text)
            is_row = file.kind != "text"
            yield text, plan.pad_documents and ends and is_row
        gathered += characters
        if file.kind != "text" or not characters:
            continue
        if plan.pad_documents:
            yield end_token, True
        elif gathered < plan.combine:
            yield end_token, False
            gathered += len(end_token)
        else:
            yield "" if lone else end_token, True
            gathered = 0


def _encode(plan: _Plan) -> TokenChunks:
    """Encodes a dataset in memory."""
    report = ReadReport()
    dtype = id_dtype(plan.enc.n_vocab)
    chunks = gather_tokens(_packed(plan, report, plan.processes or 1), dtype)
    report.tell()
    return chunks


def _encode_cached(plan: _Plan, cache_dir: str | os.PathLike[str] | None) -> TokenChunks:
    """Encodes a dataset into a token file, or finds the one that an earlier call made."""
    folder = cache_folder() if cache_dir is None else os.path.expanduser(os.fspath(cache_dir))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{plan.key()}.tokens")
    try:
        chunks, about = read_tokens(path)
    except (FileNotFoundError, ValueError):  # there is none yet, or it is damaged
        _write_plan(plan, path)
        say(f"The tokens are kept in {path}")
        chunks, about = read_tokens(path)
    ReadReport(about["lines"], about["warnings"]).tell()
    return chunks


def _write_plan(plan: _Plan, path: str) -> None:
    report = ReadReport()
    dtype = id_dtype(plan.enc.n_vocab)
    processes = plan.processes or min(core_count(), MOST_PROCESSES)
    about = {**vars(report), "vocabulary": hash_vocabulary(plan.enc)}
    write_tokens(path, _packed(plan, report, processes), dtype, about)


def _packed(plan: _Plan, report: ReadReport, processes: int) -> Iterator[Any]:
    dtype = id_dtype(plan.enc.n_vocab)
    with progress(
        total=plan.bytes_on_disk, desc="Encoding", unit="B", unit_scale=True, leave=False
    ) as bar:
        blocks = cut_into_blocks(_chunk_parts(plan, report, bar.update))
        yield from pack_blocks(blocks, plan.enc, dtype, plan.allow_special, processes)


def _read_encoded(enc: Any, path: str) -> Sequence[np.ndarray]:
    """Reads an .npz or .tokens file, and checks it against the vocabulary."""
    if documents.kind_of(path) == "npz":
        return _read_npz(path, enc.n_vocab)
    chunks, about = read_tokens(path)
    if about.get("vocabulary") != hash_vocabulary(enc):
        raise ValueError(
            f"{path!r} was encoded with another vocabulary than this model's: "
            "encode it again with encode_dataset(model_name=...)"
        )
    return chunks


def _read_npz(path: str, n_vocab: int) -> list[np.ndarray]:
    chunks = []
    try:
        # np.load would take what is no archive for a pickle, and advise to run it.
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as npz:
            for name in npz.files:
                ids = np.asarray(npz[name])  # bytes, if it is another kind of archive
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


def save_npz(path: str | os.PathLike[str], chunks: Iterable[np.ndarray]) -> None:
    """Writes chunks as gpt-2-simple's encode_dataset does: a compressed .npz, arr_0 and on.

    Args:
        path: the file; '.npz' is added if it does not end so.
        chunks: 1-D arrays of ids.
    """
    path = os.fspath(path)
    with write_whole(path if path.endswith(".npz") else f"{path}.npz") as file:
        np.savez_compressed(file, *chunks)


def save_tokens(path: str | os.PathLike[str], chunks: Iterable[np.ndarray], enc: Any) -> None:
    """Writes chunks as a token file: read at once and without taking memory, at any size.

    Args:
        path: the file, whose name should end in '.tokens'.
        chunks: 1-D arrays of ids.
        enc: the encoder they were made with, whose vocabulary is noted in the file.
    """
    dtype = id_dtype(enc.n_vocab)
    packed = (
        PackedBlock(part.astype(dtype).tobytes(), [len(part)], [start + SAVED_TOKENS >= len(chunk)])
        for chunk in chunks
        for start in range(0, len(chunk), SAVED_TOKENS)
        for part in [chunk[start : start + SAVED_TOKENS]]
    )
    about = {"lines": [], "warnings": [], "vocabulary": hash_vocabulary(enc)}
    write_tokens(os.fspath(path), packed, dtype, about)


@settings_function(EncodeCsvSettings)
def encode_csv(settings: EncodeCsvSettings) -> int:
    """Writes the rows of a table as text, one after the other, for finetune() to learn from.

    Args:
        settings: see EncodeCsvSettings.

    Returns:
        How many rows were written. Blank rows are left out, and a line says how many.

    Raises:
        FileNotFoundError: there is no such file, or no folder for `out_path`.
        ValueError: the file cannot be read as a table, or it has no such column.
    """
    path, out_path = os.fspath(settings.csv_path), os.fspath(settings.out_path)
    kind = documents.kind_of(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no CSV file {path!r} (in {os.getcwd()!r})")
    check_folder("out_path", out_path)
    file = DataFile(path, kind if kind in ("tsv", "jsonl") else "csv", named=True)
    rows = RowFormat(
        settings.column,
        settings.template,
        settings.header,
        settings.start_token,
        settings.end_token,
    )
    report = ReadReport()
    written = 0
    with write_whole(out_path) as out:
        for text, _ in documents.read_documents(file, rows, settings.encoding, report):
            out.write(text.encode("utf-8", errors="replace"))
            written += 1
    report.tell()
    return written


@settings_function(EncodeSettings)
def encode_dataset(settings: EncodeSettings) -> None:
    """Encodes a dataset once, so that finetune() need not encode it in each call.

    Args:
        settings: see EncodeSettings.

    Raises:
        FileNotFoundError: no such dataset or model, or no folder for `out_path`.
        ValueError: a setting is out of range, or the dataset holds no text.
    """
    with verbosity(settings.verbose):
        folder = model_folder(settings.model_dir, settings.model_name)
        enc = get_encoder(folder)
        check_vocabulary(enc, read_hparams(folder).n_vocab, folder)
        out_path = os.fspath(settings.out_path)
        check_folder("out_path", out_path)
        say("Reading files")
        chunks = load_dataset(
            enc,
            settings.file_path,
            settings.combine,
            settings.encoding,
            column=settings.column,
            template=settings.template,
            header=settings.header,
            pad_documents=settings.pad_documents,
            cache_dir=settings.cache_dir,
        )
        say("Writing", out_path)
        if out_path.lower().endswith(".tokens"):
            save_tokens(out_path, chunks, enc)
        else:
            save_npz(out_path, chunks)
