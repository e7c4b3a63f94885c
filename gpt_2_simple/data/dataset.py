"""Paths and settings in, chunks of tokens out; encode_dataset() and encode_csv() write them.

The stages: find_dataset() lists the files, read_documents() reads each as text, chunk_parts() joins
the texts into chunks, and tokenize() encodes these. windows.py draws batches from the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..common.files import check_folder, write_whole
from ..common.folders import model_folder, read_hparams
from ..common.report import progress, say, verbosity, warn
from ..common.settings import settings_function
from ..encoder import END_OF_TEXT, check_vocabulary, get_encoder
from .parallel_encode import (
    MAX_PROCESSES,
    ChunkPart,
    TokenBlock,
    core_count,
    cut_into_blocks,
    encode_blocks,
)
from .settings import EncodeCsvSettings, EncodeSettings
from .tables import Document, RowFormat, read_rows
from .text_files import READ_BYTES, DataFile, ReadReport, find_files, kind_of, open_text
from .token_file import (
    TokenChunks,
    cache_folder,
    hash_file,
    hash_json,
    hash_vocabulary,
    id_dtype,
    join_blocks,
    read_npz,
    read_tokens,
    save_npz,
    save_tokens,
    write_tokens,
)

LARGE_BYTES = 20_000_000
GZIP_RATIO = 4  # text usually shrinks to a third or a quarter
CACHE_VERSION = 2  # 1 cut <|endoftext|> between blocks


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How the files of a dataset become chunks of text.

    Attributes:
        combine: how many characters of plain text a chunk has at least, except the last.
        encoding: the text's encoding; None for UTF-8, or what a byte order mark tells.
        row_format: how a row of a table becomes a document; its end_token also ends a text file.
        pad_documents: make each document (a file, a row) a chunk of its own, as
            WindowSampler(pad_documents=True) needs it.
        allow_special: whether `<|endoftext|>` and other special tokens are one token each, if the
            vocabulary has the first; False encodes their characters, as gpt-2-simple 0.8.1 does.
    """

    combine: int = 50000
    encoding: str | None = None
    row_format: RowFormat = RowFormat()
    pad_documents: bool = False
    allow_special: bool = True

    def __post_init__(self) -> None:
        if self.combine < 1:
            raise ValueError(f"combine={self.combine} must be at least 1")

    @classmethod
    def of(cls, settings: Any) -> ReadOptions:
        """The options in an EncodeSettings or a TrainingSettings, whose names are the same."""
        return cls(
            settings.combine,
            settings.encoding,
            RowFormat(
                settings.column,
                settings.template,
                settings.header,
                settings.delimiter,
                train_on=getattr(settings, "train_on", None),  # EncodeSettings has none
            ),
            settings.pad_documents,
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset that was found: its files, and how they are read. Messages show its path."""

    path: Any
    files: Sequence[DataFile]
    options: ReadOptions

    @property
    def text_files(self) -> list[DataFile]:
        """The files that hold text, tables among them."""
        return [file for file in self.files if file.is_text]

    @property
    def is_large(self) -> bool:
        """Whether there is so much text that its tokens are worth a place on disk."""
        sizes = (
            os.path.getsize(file.path) * (GZIP_RATIO if file.is_gzip else 1)
            for file in self.text_files
        )
        return sum(sizes) > LARGE_BYTES

    def cache_key(self, enc: Any, vocabulary: str) -> str:
        """A digest of all that decides the tokens of the text files."""
        content = [[file.kind, hash_file(file.path)] for file in self.text_files]
        options = dataclasses.asdict(self.options) | {"allow_special": self.allows_special(enc)}
        rows = options.pop("row_format")
        if rows["train_on"] is None:
            del rows["train_on"]  # files that exist were named without it
        options["rows"] = rows  # the name in the digests of files that exist
        if others := [token for token in enc.special_tokens if token != END_OF_TEXT]:
            options["special_tokens"] = others
        return hash_json([CACHE_VERSION, content, options, vocabulary])

    def id_dtype(self, enc: Any) -> np.dtype:
        """The type of the tokens; CONTEXT_FLAG needs 32 bits."""
        return np.dtype(np.uint32) if self.options.row_format.train_on else id_dtype(enc.n_vocab)

    def allows_special(self, enc: Any) -> bool:
        """Whether `<|endoftext|>` in the text is one token of this encoder."""
        return self.options.allow_special and enc.end_of_text is not None


def find_dataset(path: Any, options: ReadOptions = ReadOptions()) -> Dataset:
    """Finds the files of a dataset, and reads none of them.

    Files are read by their suffix: .csv, .tsv, .json and .jsonl as tables, .npz and .tokens as
    encode_dataset() wrote them, others as text; with .gz after it, unpacked. Which paths there are,
    and which errors, find_files() tells.

    Raises:
        ValueError: `train_on` is given, and the user names a file that is encoded already.
    """
    files = find_files(path)
    train_on = options.row_format.train_on
    encoded = [file.path for file in files if file.named and not file.is_text]
    if train_on is not None and encoded:
        raise ValueError(
            f"{encoded[0]!r} is encoded already, and does not tell what train_on={train_on!r} is: "
            "give the table that it was made from"
        )
    return Dataset(path, files, options)


def load_dataset(enc: Any, path: Any, combine: int = 50000) -> Sequence[np.ndarray]:
    """Reads a dataset and encodes it: tokenize(find_dataset(path)), as gpt-2-simple 0.8.1 has it.

    A chunk has at least `combine` characters of plain text, except the last.
    """
    return tokenize(find_dataset(path, ReadOptions(combine)), enc)


def tokenize(
    dataset: Dataset,
    enc: Any,
    cache_dir: str | os.PathLike[str] | None = None,
    processes: int | None = None,
) -> Sequence[np.ndarray]:
    """Reads the files of a dataset and encodes them into chunks of tokens.

    More than 20 MB of text is encoded by helper processes on every core into a token file in
    `cache_dir`, which is found again as long as the files, the vocabulary and the options are the
    same. The chunks then stay on disk, and take almost no memory.

    Args:
        dataset: from find_dataset().
        enc: the encoder.
        cache_dir: the folder that keeps the token file; None for cache_folder().
        processes: how many processes encode; None for one, or one a core if there is much text.

    Returns:
        The chunks, each a 1-D array of ids, in the order of the files.

    Raises:
        ValueError: there is no text, or a file cannot be read as asked.
    """
    parts: list[Sequence[np.ndarray]] = []
    is_large = dataset.is_large
    for is_text, group in itertools.groupby(dataset.files, lambda file: file.is_text):
        files = list(group)
        if not is_text:
            parts += [chunks for file in files if (chunks := _read_encoded(file, enc)) is not None]
        elif is_large:
            texts = dataclasses.replace(dataset, files=files)
            parts.append(_encode_into_cache(texts, enc, cache_dir, processes))
        else:
            texts = dataclasses.replace(dataset, files=files)
            parts.append(_encode_into_memory(texts, enc, processes or 1))
    if not any(len(chunk) for chunks in parts for chunk in chunks):
        raise ValueError(f"the dataset {dataset.path!r} is empty: there is no text in its files")
    return parts[0] if len(parts) == 1 else [chunk for chunks in parts for chunk in chunks]


def _read_encoded(file: DataFile, enc: Any) -> Sequence[np.ndarray] | None:
    """The chunks of an .npz or .tokens file; None if it is a foreign one that a folder holds."""
    try:
        if file.kind == "npz":
            return read_npz(file.path, enc.n_vocab)
        return read_tokens(file.path, hash_vocabulary(enc))[0]
    except ValueError as error:
        if file.named:
            raise
        warn(f"{file.path!r} was left out: {error}")
        return None


def _encode_into_memory(dataset: Dataset, enc: Any, processes: int) -> TokenChunks:
    report = ReadReport()
    blocks = _token_blocks(dataset, enc, report, processes)
    chunks = join_blocks(blocks, dataset.id_dtype(enc))
    report.tell()
    return chunks


def _encode_into_cache(
    dataset: Dataset, enc: Any, cache_dir: str | os.PathLike[str] | None, processes: int | None
) -> TokenChunks:
    """Encodes text into a token file, or finds the one that an earlier call made.

    If the folder cannot be used, the text is encoded into memory, and a line says so.
    """
    folder = os.path.expanduser(cache_folder() if cache_dir is None else cache_dir)
    processes = processes or min(core_count(), MAX_PROCESSES)
    try:
        os.makedirs(folder, exist_ok=True)
        chunks, report = _find_or_encode(dataset, enc, folder, processes)
    except OSError as error:
        say(f"The tokens cannot be kept in {folder} ({error}), and are kept in memory")
        return _encode_into_memory(dataset, enc, processes)
    report.tell()
    return chunks


def _find_or_encode(
    dataset: Dataset, enc: Any, folder: str, processes: int
) -> tuple[TokenChunks, ReadReport]:
    vocabulary = hash_vocabulary(enc)
    path = os.path.join(folder, f"{dataset.cache_key(enc, vocabulary)}.tokens")
    try:
        return read_tokens(path, vocabulary)
    except (FileNotFoundError, ValueError):  # there is none yet, or it is damaged
        report = ReadReport()
        blocks = _token_blocks(dataset, enc, report, processes)
        write_tokens(path, blocks, dataset.id_dtype(enc), vocabulary, report)
        say(f"The tokens are kept in {path}")
        return read_tokens(path, vocabulary)


def _token_blocks(
    dataset: Dataset, enc: Any, report: ReadReport, processes: int
) -> Iterator[TokenBlock]:
    total = sum(os.path.getsize(file.path) for file in dataset.text_files)
    with progress(total=total, desc="Encoding", unit="B", unit_scale=True, leave=False) as bar:
        parts = chunk_parts(dataset, report, bar.update)
        blocks = cut_into_blocks(parts, special_tokens=enc.special_tokens)
        dtype = dataset.id_dtype(enc)
        yield from encode_blocks(blocks, enc, dtype, dataset.allows_special(enc), processes)


def chunk_parts(
    dataset: Dataset, report: ReadReport, on_bytes: Callable[[int], object]
) -> Iterator[ChunkPart]:
    """Joins the texts of a dataset into chunks.

    Files of plain text are joined, each followed by the end token, until a chunk has `combine`
    characters. There is one exception: a dataset of a single file of so many characters ends with
    its own last token, since no other text follows. Rows of tables are joined without limit.

    `on_bytes` is called with the number of bytes, each time that some are read.
    """
    options, files = dataset.options, dataset.text_files
    end_token = options.row_format.end_token
    _tell_unused_columns(dataset, report)
    chunk_characters = 0
    for file in files:
        ends_chunk = options.pad_documents and file.is_table
        file_characters = 0
        documents = read_documents(file, options.row_format, options.encoding, report, on_bytes)
        for text, context in documents:
            file_characters += len(text)
            yield ChunkPart(text, ends_chunk, context)
        chunk_characters += file_characters
        if file.is_table or not file_characters:
            continue
        if options.pad_documents:
            yield ChunkPart(end_token, ends_chunk=True)
        elif chunk_characters < options.combine:
            yield ChunkPart(end_token, ends_chunk=False)
            chunk_characters += len(end_token)
        else:
            yield ChunkPart("" if len(files) == 1 else end_token, ends_chunk=True)
            chunk_characters = 0


def _tell_unused_columns(dataset: Dataset, report: ReadReport) -> None:
    """Tells that files of plain text have no columns, if the user names some."""
    row_format = dataset.options.row_format
    texts = [file.path for file in dataset.text_files if not file.is_table]
    given = [
        f"{name}={value!r}"
        for name in ("column", "template", "train_on")
        if (value := getattr(row_format, name)) is not None
    ]
    if not texts or not given:
        return
    message = (
        f"{texts[0]!r} is read as plain text, without {' and '.join(given)}, "
        "which is for .csv, .tsv, .jsonl and for .json with an array of objects"
    )
    if len(texts) < len(dataset.text_files):
        report.lines.append(message)
    else:
        report.warnings.append(message)


def read_documents(
    file: DataFile,
    row_format: RowFormat,
    encoding: str | None,
    report: ReadReport,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[Document]:
    """Yields parts of a text file, or each row's document of a table; see also open_text().

    Raises:
        ValueError: the file is not text, or its table cannot be read as asked.
    """
    with open_text(file, encoding, report, on_bytes) as text:
        if file.is_table:
            yield from read_rows(text, file, row_format, report)
        else:
            while part := text.read(READ_BYTES):
                yield Document(part)


@settings_function(EncodeCsvSettings)
def encode_csv(settings: EncodeCsvSettings) -> int:
    """Writes the rows of a table as text, one after the other, for finetune() to learn from.

    Args:
        settings: see EncodeCsvSettings.

    Returns:
        How many rows were written. Blank rows are left out, and a line says how many.

    Raises:
        FileNotFoundError: there is no such file, or no folder for `out_path`.
        ValueError: the file cannot be read as a table, it has no such column, or `out_path` is
            the same file.
    """
    path, out_path = os.fspath(settings.csv_path), os.fspath(settings.out_path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no CSV file {path!r} (in {os.getcwd()!r})")
    check_folder("out_path", out_path)
    _check_is_not_input(out_path, path)
    kind = kind_of(path)
    file = DataFile(path, kind if kind in ("tsv", "json", "jsonl") else "csv", named=True)
    row_format = RowFormat(
        settings.column,
        settings.template,
        settings.header,
        settings.delimiter,
        settings.start_token,
        settings.end_token,
    )
    report = ReadReport()
    n_rows = 0
    with write_whole(out_path) as out:
        for document in read_documents(file, row_format, settings.encoding, report):
            out.write(document.text.encode("utf-8", errors="replace"))
            n_rows += 1
    report.tell()
    return n_rows


def _check_is_not_input(out_path: str, path: str) -> None:
    """Raises ValueError if a file that is read would be replaced, also through a link."""
    if os.path.exists(out_path) and os.path.samefile(out_path, path):
        raise ValueError(
            f"out_path={out_path!r} is the file {path!r} itself, which would be lost: "
            "give another out_path"
        )


@settings_function(EncodeSettings)
def encode_dataset(settings: EncodeSettings) -> None:
    """Encodes a dataset once, so that finetune() need not encode it in each call.

    Args:
        settings: see EncodeSettings.

    Raises:
        FileNotFoundError: there is no such dataset or model, or no folder for `out_path`.
        ValueError: a setting is out of range, the dataset holds no text, or `out_path` is one of
            the files that it names.
    """
    with verbosity(settings.verbose):
        folder = model_folder(settings.model_dir, settings.model_name)
        enc = get_encoder(folder)
        check_vocabulary(enc, read_hparams(folder).n_vocab, folder)
        out_path = os.fspath(settings.out_path)
        check_folder("out_path", out_path)
        if not out_path.endswith(".npz") and not out_path.lower().endswith(".tokens"):
            out_path += ".npz"  # as NumPy, and so gpt-2-simple 0.8.1, names it
        say("Reading files")
        dataset = find_dataset(settings.file_path, ReadOptions.of(settings))
        for file in dataset.files:
            if file.named:
                _check_is_not_input(out_path, file.path)
        chunks = tokenize(dataset, enc, settings.cache_dir)
        say("Writing", out_path)
        if out_path.lower().endswith(".tokens"):
            save_tokens(out_path, chunks, enc)
        else:
            save_npz(out_path, chunks)
