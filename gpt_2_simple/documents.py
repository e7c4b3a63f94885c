"""Paths in, documents out as text: plain text, CSV, TSV and JSON lines, gzipped or not."""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import io
import itertools
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from .report import say, warn

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"

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
LONGEST_FIELD = 1 << 24
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


@dataclass(frozen=True)
class RowFormat:
    """How a row of a table becomes a document.

    Attributes:
        column: the column's name, or its number from 0. By default the first one, in JSON lines
            'text' or else the first that holds text.
        template: text with columns in braces, as in '{title}: {body}', in place of one column.
        header: whether the first row names the columns; None looks at it to find out.
        start_token: put before each row.
        end_token: put after each row, and after each file of plain text.
    """

    column: str | int | None = None
    template: str | None = None
    header: bool | None = None
    start_token: str = START_TOKEN
    end_token: str = END_TOKEN

    def __post_init__(self) -> None:
        if self.column is not None and self.template is not None:
            raise ValueError(
                f"column={self.column!r} and template={self.template!r} exclude each other: "
                "name the columns within the template"
            )
        if self.template is not None and not self.fields:
            raise ValueError(
                f"template={self.template!r} names no column: write one in braces, as in '{{text}}'"
            )

    @property
    def fields(self) -> list[str | int | None]:
        """The columns that are wanted, in order."""
        if self.template is None:
            return [self.column]
        return list(re.findall(r"\{([^{}]*)\}", self.template))

    def fill(self, cells: list[str]) -> str:
        """Makes a row's text of its wanted cells."""
        if self.template is None:
            return cells[0]
        remaining = iter(cells)
        return re.sub(r"\{[^{}]*\}", lambda _: next(remaining), self.template)


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


def read_rows(
    lines: Iterable[str], file: DataFile, rows: RowFormat, report: ReadReport
) -> Iterator[str]:
    """Makes a document of each row of a table that is not blank.

    Args:
        lines: the table's lines.
        file: what they are from, and whether they are 'csv', 'tsv' or 'jsonl'.
        rows: which columns are wanted, and what goes around them.
        report: where to note how many rows were blank.

    Yields:
        start_token + the row's text + end_token + a newline.

    Raises:
        ValueError: if a column does not exist (it lists those that do), or a line is malformed.
    """
    cells_of = _json_cells if file.kind == "jsonl" else _csv_cells
    blank = 0
    for cells in cells_of(lines, file, rows, report):
        if any(cell.strip() for cell in cells):
            yield rows.start_token + rows.fill(cells) + rows.end_token + "\n"
        else:
            blank += 1
    if blank:
        report.lines.append(f"{file.path}: {blank:,} blank rows skipped")


def _csv_cells(
    lines: Iterable[str], file: DataFile, rows: RowFormat, report: ReadReport
) -> Iterator[list[str]]:
    quotes = start = 0

    def counted() -> Iterator[str]:
        nonlocal quotes
        for line in lines:
            quotes += line.count('"')
            yield line

    reader = csv.reader(counted(), delimiter="\t" if file.kind == "tsv" else ",")
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        first = next((row for row in reader if row), [])
        header = _has_header(first, file, rows, report)
        wanted = [_column_index(name, first, header, file.path) for name in rows.fields]
        if rows.fields == [None] and len(first) > 1:
            report.lines.append(
                f"{file.path}: its first column is used, of {len(first)}; column= names another"
            )
        wider = 0
        end = reader.line_num
        for row in itertools.chain([] if header or not first else [first], reader):
            start, end = end, reader.line_num
            wider += len(row) > len(first)
            yield [row[index] if index < len(row) else "" for index in wanted]
    except csv.Error as error:
        raise ValueError(
            f"{file.path!r}, line {reader.line_num}: {error}. Is a quote left open?"
        ) from error
    finally:
        csv.field_size_limit(before)
    if quotes % 2 and reader.line_num - start > 1:
        report.warnings.append(
            f"{file.path!r}: a quote is left open: lines {start + 1:,} to {reader.line_num:,} were "
            "read as one row"
        )
    if wider:
        report.warnings.append(
            f"{file.path!r}: {wider:,} rows have more columns than the first, which has "
            f"{len(first)}; text that holds the delimiter must be in quotes, or is cut there"
        )


def _has_header(first: list[str], file: DataFile, rows: RowFormat, report: ReadReport) -> bool:
    """Whether a table's first row names its columns: as the caller says, or as it looks."""
    if rows.header is not None:
        return rows.header
    header = any(name in first for name in rows.fields) or _names_columns(first)
    if not header:
        report.lines.append(
            f"{file.path}: the first row reads like data, so it is used; header=True skips it"
        )
    return header


def _names_columns(row: list[str]) -> bool:
    """Whether a table's first row reads like names of columns: short, distinct, no sentences."""
    return len(set(row)) == len(row) and all(
        0 < len(cell.strip()) <= 40
        and len(cell.split()) <= 5
        and "\n" not in cell
        and cell.strip()[-1] not in ".!?…,;:"
        and not re.fullmatch(r"[-+\d.,:/ ]+", cell)
        for cell in row
    )


def _column_index(name: str | int | None, first: list[str], header: bool, path: str) -> int:
    """Finds a column by name or number in a table whose first row is `first`."""
    if name is None or not first:
        return 0
    if header and name in first:
        return first.index(str(name))
    number = int(name) if str(name).isdecimal() else -1
    if 0 <= number < len(first):
        return number
    raise ValueError(
        f"{path!r} has no column {name!r}: its {'columns are' if header else 'first row holds'} "
        f"{', '.join(map(repr, first))}"
    )


def _json_cells(
    lines: Iterable[str], file: DataFile, rows: RowFormat, report: ReadReport
) -> Iterator[list[str]]:
    names: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield [""]
            continue
        where = f"{file.path!r}, line {number}"
        record = _json_object(line, where)
        names = names or [_json_name(name, record) for name in rows.fields]
        seen |= record.keys()
        yield [_json_text(record.get(name), name, where) for name in names]
    missing = [name for name in names if name not in seen]
    if missing:
        raise ValueError(
            f"{file.path!r} has no column {missing[0]!r}: "
            f"its columns are {', '.join(map(repr, sorted(seen)))}"
        )


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {type(record).__name__}, where an object was expected")
    return record


def _json_name(name: str | int | None, record: dict[str, Any]) -> str:
    if name is None:
        texts = [key for key, value in record.items() if isinstance(value, str)]
        return "text" if "text" in record or not texts else texts[0]
    if name not in record and str(name).isdecimal() and int(name) < len(record):
        return list(record)[int(name)]
    return str(name)


def _json_text(value: Any, name: str, where: str) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError(f"{where}: column {name!r} holds a {type(value).__name__}, not text")
    return "" if value is None else str(value)


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
