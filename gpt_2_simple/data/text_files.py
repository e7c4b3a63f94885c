"""Paths in, documents out as text: plain text, CSV, TSV and JSON lines, gzipped or not."""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import io
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from ..common.report import say, warn
from .tables import RowFormat, read_rows

SUPPORTED = (
    "a text file, .csv, .tsv or .jsonl (each also as .gz), an .npz or .tokens file of "
    "encode_dataset, a folder, a glob pattern, or a list of these"
)
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".tokens": "tokens",
}
BYTE_ORDER_MARKS = (  # UTF-32's first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 20
LONGEST_NAME = 1000
MOSTLY_UNDECODABLE = 0.3


class DataFile(NamedTuple):
    """One file of a dataset.

    Attributes:
        path: where it lies.
        kind: 'text', 'csv', 'tsv', 'jsonl', 'npz' or 'tokens', by its suffix.
        named: whether the user named it, rather than a folder it lies in or a pattern.
    """

    path: str
    kind: str
    named: bool


@dataclass
class ReadReport:
    """What reading came across, to be told once at its end.

    Attributes:
        lines: what is worth saying.
        warnings: what may have cost the user some data.
    """

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def tell(self, most: int = 10) -> None:
        """Says the lines and raises the warnings, the first `most` of each."""
        for line in self.lines[:most]:
            say(line)
        if len(self.lines) > most:
            say(f"... and {len(self.lines) - most} more lines like these")
        for warning in self.warnings[:most]:
            warn(warning)
        if len(self.warnings) > most:
            rest = len(self.warnings) - most
            warn(f"... and {rest} more warnings like these")


def find_files(path: Any) -> list[DataFile]:
    """Lists the files that a dataset's path stands for.

    Args:
        path: a file, a folder (searched through, hidden files left out), a glob pattern, or a list
            of these.

    Returns:
        The files in a settled order: as listed, and sorted within each folder and pattern.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if a folder holds no file, the list is empty, or it is no path.
    """
    if isinstance(path, (list, tuple)):
        if not path:
            raise ValueError(f"the list of datasets is empty: give {SUPPORTED}")
        return [file for one in path for file in find_files(one)]
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"the dataset {path!r} is neither a path nor a list of paths")
    path = os.path.expanduser(os.fspath(path))
    if os.path.isfile(path):
        return [DataFile(path, kind_of(path), named=True)]
    if os.path.isdir(path):
        return _files_in_folder(path)
    found = [one for one in sorted(glob.glob(path, recursive=True)) if os.path.exists(one)]
    # '**' finds a folder and the files in it too: each file is taken once.
    files = {file.path: file._replace(named=False) for one in found for file in find_files(one)}
    if not files:
        raise FileNotFoundError(_not_found(path))
    return list(files.values())


def kind_of(path: str) -> str:
    """Tells a file's kind by its suffix, '.gz' aside: 'csv', 'text' and so on."""
    stem = path.lower().removesuffix(".gz")
    return KINDS.get(os.path.splitext(stem)[1], "text")


def _files_in_folder(folder: str) -> list[DataFile]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = os.path.join(parent, name)
                files.append(DataFile(path, kind_of(path), named=False))
    if not files:
        raise ValueError(f"the folder {folder!r} holds no file that is not hidden")
    return files


def _not_found(path: str) -> str:
    if len(path) > LONGEST_NAME or "\n" in path:
        return f"there is no dataset {path[:60]!r}...: give the path of a file, not the text itself"
    parent, name = os.path.split(path)
    message = f"there is no dataset {path!r}: looked for a file, a folder and a glob pattern"
    if not os.path.isabs(path):
        message += f" in {os.getcwd()!r}"
    if os.path.isdir(parent or "."):
        close = difflib.get_close_matches(name, sorted(os.listdir(parent or ".")))
        if close:
            nearest = " or ".join(repr(os.path.join(parent, one)) for one in close)
            message += f". Did you mean {nearest}?"
    elif parent:
        message += f". There is no folder {parent!r} either"
    return message


def read_documents(
    file: DataFile,
    rows: RowFormat,
    encoding: str | None,
    report: ReadReport,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[str, bool]]:
    """Reads one file's documents without holding more than a part of one.

    Args:
        file: what to read; not an .npz or .tokens file.
        rows: how a row becomes a document.
        encoding: the text's encoding; None for UTF-8, or what a byte order mark tells.
        report: where to note what was left out.
        on_bytes: is told how many bytes of the file were read, as it goes.

    Yields:
        A part of a document's text, and whether the document ends with it. Rows have their tokens
        around them already; plain text has not.

    Raises:
        ValueError: if the file is not text, or its table cannot be read as asked.
    """
    encoding = _encoding_of(file, encoding, report)
    if encoding is None:
        return
    _undecoded.count = 0
    try:
        with _open_text(file.path, encoding, on_bytes) as lines:
            if file.kind == "text":
                parts: Iterator[tuple[str, bool]] = _text_parts(lines)
            else:
                parts = ((row, True) for row in read_rows(lines, file, rows, report))
            yield from parts
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file.path!r} is not a whole gzip file: {error}") from error
    if _undecoded.count:
        report.warnings.append(
            f"{file.path!r}: {_undecoded.count:,} bytes are not {_shown(encoding)} and were "
            "left out; if it is in another encoding, name it, as in encoding='latin-1'"
        )


def _text_parts(lines: io.TextIOWrapper) -> Iterator[tuple[str, bool]]:
    text = lines.read(READ_BYTES)
    while text:
        following = lines.read(READ_BYTES)
        yield text, not following
        text = following


def _encoding_of(file: DataFile, encoding: str | None, report: ReadReport) -> str | None:
    """Settles a file's encoding; None for a binary file that the user did not name."""
    try:
        with gzip.open(file.path) if _is_gzip(file.path) else open(file.path, "rb") as binary:
            head = binary.read(HEAD_BYTES)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file.path!r} is not a whole gzip file: {error}") from error
    if encoding is None:
        marked = (name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark))
        encoding = next(marked, "utf-8")
    encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8", "utf_8") else encoding
    try:
        decoder = codecs.getincrementaldecoder(encoding)(errors=COUNT_AND_LEAVE_OUT)
    except LookupError as error:
        raise ValueError(f"encoding={encoding!r} is unknown to Python") from error
    _undecoded.count = 0
    text = decoder.decode(head)
    if "\0" not in text and _undecoded.count <= MOSTLY_UNDECODABLE * len(head):
        return encoding
    if file.named:
        raise ValueError(
            f"{file.path!r} is not {_shown(encoding)} text: if it is text, name its encoding, "
            f"as in encoding='utf-16' or 'cp1251'. A dataset is {SUPPORTED}"
        )
    report.warnings.append(f"{file.path!r} is not {_shown(encoding)} text and was left out")
    return None


def _shown(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8-sig" else encoding


COUNT_AND_LEAVE_OUT = "gpt_2_simple.count_and_leave_out"


class _Undecoded(threading.local):
    """How many bytes this thread's decoders have left out."""

    count = 0


_undecoded = _Undecoded()


def _count_and_leave_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _undecoded.count += error.end - error.start
    return "", error.end


codecs.register_error(COUNT_AND_LEAVE_OUT, _count_and_leave_out)


class _CountingFile(io.FileIO):
    """A file that tells how many bytes were read of it."""

    def __init__(self, path: str, on_bytes: Callable[[int], object]):
        super().__init__(path)
        self.on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.on_bytes(count or 0)
        return count


def _is_gzip(path: str) -> bool:
    return path.lower().endswith(".gz")


def _open_text(path: str, encoding: str, on_bytes: Callable[[int], object]) -> io.TextIOWrapper:
    binary: BinaryIO = io.BufferedReader(_CountingFile(path, on_bytes), READ_BYTES)
    if _is_gzip(path):
        # A GzipFile leaves the file it was given open, this one closes it.
        binary = io.BufferedReader(_Gzip(binary), READ_BYTES)
    return io.TextIOWrapper(binary, encoding=encoding, errors=COUNT_AND_LEAVE_OUT)


class _Gzip(gzip.GzipFile):
    """A gzip stream that closes the file below it."""

    def __init__(self, binary: BinaryIO):
        super().__init__(fileobj=binary)
        self.binary = binary

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.binary.close()
