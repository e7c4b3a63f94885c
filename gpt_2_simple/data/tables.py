"""Rows of CSV, TSV and JSON lines in, one document of text a row out."""

from __future__ import annotations

import csv
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..encoder import END_OF_TEXT
from .settings import START_TOKEN
from .text_files import DataFile, ReadReport

MAX_FIELD_CHARACTERS = 1 << 24
ROWS_AT_ONCE = 256

_field_size_lock = threading.Lock()


@dataclass(frozen=True)
class RowFormat:
    """How a row of a table becomes a document.

    Attributes:
        column: the column's name, or its number from 0. None takes the first one; in JSON lines
            'text', or else the first that holds text.
        template: text with columns in braces, as in '{title}: {body}', instead of one column.
        header: whether the first row names the columns. None finds out by looking at it.
        start_token: put before each row.
        end_token: put after each row, and after each file of plain text.
    """

    column: str | int | None = None
    template: str | None = None
    header: bool | None = None
    start_token: str = START_TOKEN
    end_token: str = END_OF_TEXT

    def __post_init__(self) -> None:
        if self.column is not None and self.template is not None:
            raise ValueError(
                f"column={self.column!r} and template={self.template!r} exclude each other: "
                "name the columns within the template"
            )
        if self.template is not None and not self.columns:
            raise ValueError(
                f"template={self.template!r} names no column: write one in braces, as in '{{text}}'"
            )

    @property
    def columns(self) -> list[str | int | None]:
        """The columns to read, in order; [None] if the user names none."""
        if self.template is None:
            return [self.column]
        return list(re.findall(r"\{([^{}]*)\}", self.template))

    def document(self, cells: list[str]) -> str:
        """A row's document, from the cells of `columns`."""
        text = cells[0]
        if self.template is not None:
            remaining = iter(cells)
            text = re.sub(r"\{[^{}]*\}", lambda _: next(remaining), self.template)
        return self.start_token + text + self.end_token + "\n"


def read_rows(
    lines: Iterable[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> Iterator[str]:
    """Makes a document of each row of a table that is not blank; `lines` are those of `file`.

    Raises:
        ValueError: a column does not exist (the message lists those that do), or a line is
            malformed.
    """
    read_cells = _json_cells if file.kind == "jsonl" else _csv_cells
    n_blank = 0
    for cells in read_cells(lines, file, row_format, report):
        if any(cell.strip() for cell in cells):
            yield row_format.document(cells)
        else:
            n_blank += 1
    if n_blank:
        report.lines.append(f"{file.path}: {n_blank:,} blank rows skipped")


# --- CSV and TSV ----------------------------------------------------------------------------------


def _csv_cells(
    lines: Iterable[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> Iterator[list[str]]:
    """Yields the cells of the columns to read, row by row."""
    n_quotes = n_wider = row_start = 0

    def quotes_counted() -> Iterator[str]:
        nonlocal n_quotes
        for line in lines:
            n_quotes += line.count('"')
            yield line

    reader = csv.reader(quotes_counted(), delimiter="\t" if file.kind == "tsv" else ",")
    rows = _numbered_rows(reader)
    try:
        first_number, first = next((one for one in rows if one.cells), _Row(0, []))
        has_header = _has_header(first, row_format)
        columns = [_column_index(c, first, has_header, file.path) for c in row_format.columns]
        report.lines += _guesses(first, has_header, row_format, file.path)
        row_end = first_number
        if not has_header and first:
            rows = itertools.chain([_Row(first_number, first)], rows)
        for line_number, row in rows:
            row_start, row_end = row_end, line_number
            n_wider += len(row) > len(first)
            yield [row[index] if index < len(row) else "" for index in columns]
    except csv.Error as error:
        raise ValueError(
            f"{file.path!r}, line {reader.line_num}: {error}. Is a quote left open?"
        ) from error
    if n_quotes % 2 and reader.line_num - row_start > 1:
        report.warnings.append(
            f"{file.path!r}: a quote is left open: lines {row_start + 1:,} to "
            f"{reader.line_num:,} were read as one row"
        )
    if n_wider:
        report.warnings.append(
            f"{file.path!r}: {n_wider:,} rows have more columns than the first, which has "
            f"{len(first)}; text that holds the delimiter must be in quotes, or is cut there"
        )


class _Row(NamedTuple):
    """A row of a table, and the number of its last line."""

    line_number: int
    cells: list[str]


def _numbered_rows(reader: Any) -> Iterator[_Row]:
    """Yields the rows of a csv.reader, which may have fields of MAX_FIELD_CHARACTERS."""
    while rows := _next_rows(reader):
        yield from rows


def _next_rows(reader: Any) -> list[_Row]:
    # The limit belongs to the process (128 kB by default): it is raised while rows are read, and
    # not while they are used, since a generator may be left there for ever.
    with _field_size_lock:
        default_limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            return [_Row(reader.line_num, row) for row in itertools.islice(reader, ROWS_AT_ONCE)]
        finally:
            csv.field_size_limit(default_limit)


def _has_header(first: list[str], row_format: RowFormat) -> bool:
    """Whether a table's first row names its columns: as the user says, or as it looks."""
    if row_format.header is not None:
        return row_format.header
    return any(name in first for name in row_format.columns) or _names_columns(first)


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


def _guesses(first: list[str], has_header: bool, row_format: RowFormat, path: str) -> list[str]:
    """Lines that tell how a table is read where the user did not say it."""
    lines = []
    if row_format.header is None and not has_header:
        lines.append(f"{path}: the first row reads like data, so it is used; header=True skips it")
    if row_format.columns == [None] and len(first) > 1:
        lines.append(f"{path}: its first column is used, of {len(first)}; column= names another")
    return lines


def _column_index(name: str | int | None, first: list[str], has_header: bool, path: str) -> int:
    """Finds a column by name or number in a table whose first row is `first`."""
    if name is None or not first:
        return 0
    if has_header and name in first:
        return first.index(str(name))
    number = int(name) if str(name).isdecimal() else -1
    if 0 <= number < len(first):
        return number
    listing = "columns are" if has_header else "first row holds"
    raise ValueError(
        f"{path!r} has no column {name!r}: its {listing} {', '.join(map(repr, first))}"
    )


# --- JSON lines -----------------------------------------------------------------------------------


def _json_cells(
    lines: Iterable[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> Iterator[list[str]]:
    names: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield [""]
            continue
        where = f"{file.path!r}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__}, where an object was expected")
        names = names or [_json_name(name, record) for name in row_format.columns]
        seen |= record.keys()
        yield [_json_text(record.get(name), name, where) for name in names]
    missing = [name for name in names if name not in seen]
    if missing:
        raise ValueError(
            f"{file.path!r} has no column {missing[0]!r}: "
            f"its columns are {', '.join(map(repr, sorted(seen)))}"
        )


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
