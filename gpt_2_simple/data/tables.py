"""Rows of CSV, TSV, JSON lines and JSON arrays in, one document of text a row out."""

from __future__ import annotations

import csv
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..encoder import END_OF_TEXT
from .settings import START_TOKEN
from .text_files import DataFile, ReadReport

MAX_FIELD_CHARACTERS = 1 << 24
ROWS_AT_ONCE = 256
HEAD_LINES = 200  # they tell the delimiter, and what quotes mean
DELIMITERS = (",", ";", "\t", "|")
# Common names of a table's only column. Its other names are told by the row below.
COLUMN_NAMES = frozenset(
    "abstract answer article body caption comment content description document headline joke "
    "line lyrics message name paragraph poem post prompt question quote review sentence story "
    "summary text title tweet word".split()
)

_field_size_lock = threading.Lock()


@dataclass(frozen=True)
class RowFormat:
    """How a row of a table becomes a document, and which part of that is learned.

    Attributes:
        column: the column's name, or its number from 0. None takes the first that has a name; in
            JSON 'text', or else the first that holds text.
        template: text with columns in braces, as in '{title}: {body}', instead of one column.
        header: whether the first row names the columns. None finds out by looking at it.
        delimiter: the character between two columns of a CSV or TSV. None takes the tab in a .tsv,
            and finds out in others: a comma, or else `;`, the tab or `|`.
        start_token: put before each row.
        end_token: put after each row, and after each file of plain text.
        train_on: a column of `columns`, or else a string: only that column, or what stands after
            the string's first occurrence in a row, is learned, each with the end token. None learns
            all.
    """

    column: str | int | None = None
    template: str | None = None
    header: bool | None = None
    delimiter: str | None = None
    start_token: str = START_TOKEN
    end_token: str = END_OF_TEXT
    train_on: str | None = None

    def __post_init__(self) -> None:
        if self.train_on == "":
            raise ValueError("train_on='' names nothing; give a column of the template, or None")
        if self.column is not None and self.template is not None:
            raise ValueError(
                f"column={self.column!r} and template={self.template!r} exclude each other: "
                "name the columns within the template"
            )
        if self.template is not None and not self.columns:
            raise ValueError(
                f"template={self.template!r} names no column: write one in braces, as in '{{text}}'"
            )
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n '):
            raise ValueError(
                f"delimiter={self.delimiter!r} must be one character, such as ';' or a tab"
            )

    @property
    def columns(self) -> list[str | int | None]:
        """The columns to read, in order; [None] if the user names none."""
        if self.template is None:
            return [self.column]
        return list(re.findall(r"\{([^{}]*)\}", self.template))

    @property
    def trains_on_column(self) -> bool:
        """Whether `train_on` is a column, rather than a string to look for."""
        return self.train_on is not None and self.train_on in map(str, self.columns)

    def document(self, cells: list[str]) -> Document:
        """A row's document, from the cells of `columns`."""
        pieces = [(self.start_token, False), *self._pieces(cells), (self.end_token + "\n", True)]
        text = "".join(piece for piece, _ in pieces)
        if self.train_on is None:
            return Document(text)
        if not self.trains_on_column:
            found = text.find(self.train_on)
            return Document(text, ((0, len(text) if found < 0 else found + len(self.train_on)),))
        ends = itertools.accumulate(len(piece) for piece, _ in pieces)
        context = [
            (end - len(piece), end)
            for (piece, is_learned), end in zip(pieces, ends, strict=True)
            if piece and not is_learned
        ]
        return Document(text, tuple(context))

    def _pieces(self, cells: list[str]) -> list[tuple[str, bool]]:
        """What the start and end token enclose, and of each piece whether `train_on` names it."""
        is_learned = [str(column) == self.train_on for column in self.columns]
        if self.template is None:
            return [(cells[0], is_learned[0])]
        literals = re.split(r"\{[^{}]*\}", self.template)
        pieces = [(literals[0], False)]
        for cell, learned, literal in zip(cells, is_learned, literals[1:], strict=True):
            pieces += [(cell, learned), (literal, False)]
        return pieces


class Document(NamedTuple):
    """A text, and the ranges [start, end) of its characters that are read but not learned."""

    text: str
    context: tuple[tuple[int, int], ...] = ()

    @property
    def is_learned(self) -> bool:
        """Whether some of it is."""
        return self.context != ((0, len(self.text)),)


def read_rows(
    lines: Iterable[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> Iterator[Document]:
    """Makes a document of each row of a table that is not blank; `lines` are those of `file`.

    Raises:
        ValueError: a column does not exist (the message lists those that do), a line is
            malformed, or no row holds the string of `train_on`.
    """
    read_cells = _json_cells if file.kind in ("json", "jsonl") else _csv_cells
    n_blank = n_learned = n_context = 0
    for cells in read_cells(lines, file, row_format, report):
        if any(cell.strip() for cell in cells):
            document = row_format.document(cells)
            n_learned += document.is_learned
            n_context += not document.is_learned
            yield document
        else:
            n_blank += 1
    if n_blank:
        report.lines.append(f"{file.path}: {n_blank:,} blank rows skipped")
    if n_context and not n_learned:
        raise ValueError(
            f"train_on={row_format.train_on!r} is neither a column of the template nor in a row of "
            f"{file.path!r}, so there is nothing to learn"
        )
    if n_context:
        report.warnings.append(
            f"{file.path!r}: {n_context:,} of {n_context + n_learned:,} rows do not hold "
            f"train_on={row_format.train_on!r}: nothing is learned from them"
        )


# --- CSV and TSV ----------------------------------------------------------------------------------


def _csv_cells(
    lines: Iterable[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> Iterator[list[str]]:
    """Yields the cells of the columns to read, row by row."""
    lines = iter(lines)
    head = list(itertools.islice(lines, HEAD_LINES))
    delimiter = _choose_delimiter(head, file, row_format, report)
    quoting = _choose_quoting(head, file, delimiter, report)
    n_wider = row_start = 0
    quotes = _QuoteCounter()
    counted = quotes.pass_on(itertools.chain(head, lines))
    reader = csv.reader(counted, delimiter=delimiter, quoting=quoting)
    try:
        rows = _numbered_rows(reader)
        row_end, first = next((row for row in rows if row.cells), _Row(0, []))
        below = list(itertools.islice(rows, 1))
        has_header = _has_header(first, [row.cells for row in below], row_format)
        columns = [_column_index(c, first, has_header, file.path) for c in row_format.columns]
        report.lines += _guesses(first, has_header, columns, row_format, file.path)
        data = [_Row(row_end, first)] if first and not has_header else []
        for line_number, row in itertools.chain(data, below, rows):
            row_start, row_end = row_end, line_number
            n_wider += len(row) > len(first)
            yield [row[index] if index < len(row) else "" for index in columns]
    except csv.Error as error:
        raise ValueError(
            f"{file.path!r}, line {reader.line_num}: {error}. Is a quote left open?"
        ) from error
    if quotes.count % 2 and reader.line_num - row_start > 1:
        report.warnings.append(
            f"{file.path!r}: a quote is left open: lines {row_start + 1:,} to "
            f"{reader.line_num:,} were read as one row"
        )
    if n_wider:
        report.warnings.append(
            f"{file.path!r}: {n_wider:,} rows have more columns than the first, which has "
            f"{len(first)}; text that holds the delimiter must be in quotes, or is cut there"
        )


class _QuoteCounter:
    """Counts the quotes of the lines that it passes on."""

    def __init__(self) -> None:
        self.count = 0

    def pass_on(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self.count += line.count('"')
            yield line


class _Row(NamedTuple):
    """A row of a table, and the number of its last line."""

    line_number: int
    cells: list[str]


def _numbered_rows(reader: Any) -> Iterator[_Row]:
    """Yields the rows of a csv.reader, which may have fields of MAX_FIELD_CHARACTERS."""
    while rows := _next_rows(reader):
        yield from rows


def _next_rows(reader: Any, count: int = ROWS_AT_ONCE) -> list[_Row]:
    # The limit belongs to the process (128 kB by default): it is raised while rows are read, and
    # not while they are used, since a generator may be left there for ever.
    with _field_size_lock:
        default_limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            return [_Row(reader.line_num, row) for row in itertools.islice(reader, count)]
        finally:
            csv.field_size_limit(default_limit)


def _choose_delimiter(
    head: list[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> str:
    """The delimiter that the user names, or the one that all rows of the head agree on."""
    if row_format.delimiter is not None:
        return row_format.delimiter
    if file.kind == "tsv":
        return "\t"
    for delimiter in DELIMITERS:
        rows = _rows_of_head(head, delimiter) or []
        is_prose = any(cell.startswith(" ") for row in rows[:1] for cell in row)
        is_even = len(rows) > 1 and len({len(row) for row in rows}) == 1 < len(rows[0])
        if is_even and (delimiter == "," or not is_prose):
            if delimiter != ",":
                report.lines.append(
                    f"{file.path}: its columns are read as separated by {delimiter!r}; "
                    "delimiter=',' reads them otherwise"
                )
            return delimiter
    return ","


def _choose_quoting(
    head: list[str], file: DataFile, delimiter: str, report: ReadReport
) -> Literal[0, 3]:
    """Whether quotes enclose cells, as in every CSV, or are text, as in many a TSV."""
    if file.kind != "tsv" or not any('"' in line for line in head):
        return csv.QUOTE_MINIMAL
    rows = _rows_of_head(head, delimiter)
    widths = [line.count(delimiter) for line in head if line.strip()]
    is_even = len(set(widths)) == 1 and widths[0] > 0  # each line is a row, whatever is quoted
    if rows is not None and (not is_even or len(rows) == len(widths)):
        return csv.QUOTE_MINIMAL
    report.lines.append(f"{file.path}: its quotes are read as text, as they do not enclose cells")
    return csv.QUOTE_NONE


def _rows_of_head(head: list[str], delimiter: str) -> list[list[str]] | None:
    """The rows of a table's first lines that are not empty; None if their quotes are not a CSV's.

    A row that may go on below these lines is left out.
    """
    reader = csv.reader(head, delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    try:
        while more := _next_rows(reader, 1):
            rows += [row.cells for row in more if row.cells]
    except csv.Error:
        if reader.line_num < len(head) or len(head) < HEAD_LINES:
            return None
    return rows


def _has_header(first: list[str], below: list[list[str]], row_format: RowFormat) -> bool:
    """Whether a table's first row names its columns: as the user says, or as it looks."""
    if row_format.header is not None:
        return row_format.header
    if not first or any(
        str(name) in first for name in row_format.columns if not _is_index(name, first)
    ):
        return True
    has_index = len(first) > 1 and not first[0] and any(row and row[0] for row in below)
    names = first[1:] if has_index else first  # pandas gives its index no name
    return _read_like_names(names) and (len(first) > 1 or _is_only_name(first[0], below))


def _is_index(name: str | int | None, first: list[str]) -> bool:
    return isinstance(name, int) and 0 <= name < len(first)


def _read_like_names(row: list[str]) -> bool:
    """Whether a table's first row reads like names of columns: short, distinct, no sentences."""
    return len(set(row)) == len(row) and all(
        0 < len(cell.strip()) <= 40
        and len(cell.split()) <= 5
        and "\n" not in cell
        and cell.strip()[-1] not in ".!?…,;:"
        and not re.fullmatch(r"[-+\d.,:/ ]+", cell)
        for cell in row
    )


def _is_only_name(cell: str, below: list[list[str]]) -> bool:
    """Whether the first row of a table's only column is a name: a usual one, or above a text."""
    if _is_usual_name(cell):
        return True
    return len(cell.split()) == 1 and any(len(" ".join(row).split()) > 1 for row in below)


def _is_usual_name(cell: str) -> bool:
    return cell.strip().lower().removesuffix("s") in COLUMN_NAMES


def _guesses(
    first: list[str], has_header: bool, columns: list[int], row_format: RowFormat, path: str
) -> list[str]:
    """Lines that tell how a table is read where the user did not say it."""
    lines = []
    if row_format.header is None and not has_header:
        lines.append(f"{path}: the first row reads like data, so it is used; header=True skips it")
    elif row_format.header is None and len(first) == 1 and not _is_usual_name(first[0]):
        lines.append(
            f"{path}: its first row, {first[0]!r}, is taken for the column's name; "
            "header=False uses it"
        )
    if row_format.columns == [None] and len(first) > 1:
        shown = f"column {first[columns[0]]!r}" if columns[0] else "first column"
        lines.append(f"{path}: its {shown} is used, of {len(first)}; column= names another")
    return lines


def _column_index(name: str | int | None, first: list[str], has_header: bool, path: str) -> int:
    """Finds a column by name or number in a table whose first row is `first`."""
    if not first:
        return 0
    if name is None:
        return next((i for i, cell in enumerate(first) if cell.strip()), 0) if has_header else 0
    if has_header and str(name) in first and not _is_index(name, first):
        return first.index(str(name))
    number = int(name) if str(name).isdecimal() else -1
    if 0 <= number < len(first):
        return number
    listing = "columns are" if has_header else "first row holds"
    raise ValueError(
        f"{path!r} has no column {name!r}: its {listing} {', '.join(map(repr, first))}"
    )


# --- JSON -----------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """An object of a JSON file, and where it stands there; {} for a blank line."""

    where: str
    values: dict[str, Any]


def _json_cells(
    lines: Iterable[str], file: DataFile, row_format: RowFormat, report: ReadReport
) -> Iterator[list[str]]:
    records = _array_records if file.kind == "json" else _line_records
    names: list[str] = []
    seen: set[str] = set()
    for where, values in records(lines, file.path):
        if not values:
            yield [""]
            continue
        names = names or [_json_name(name, values) for name in row_format.columns]
        seen |= values.keys()
        yield [_json_text(values.get(name), name, where) for name in names]
    missing = [name for name in names if name not in seen]
    if missing:
        raise ValueError(
            f"{file.path!r} has no column {missing[0]!r}: "
            f"its columns are {', '.join(map(repr, sorted(seen)))}"
        )


def _line_records(lines: Iterable[str], path: str) -> Iterator[_Record]:
    for number, line in enumerate(lines, 1):
        where = f"{path!r}, line {number}"
        if line.strip():
            yield _Record(where, _checked_object(_parse_json(line, where), where))
        else:
            yield _Record(where, {})


def _array_records(lines: Iterable[str], path: str) -> Iterator[_Record]:
    for number, value in enumerate(_parse_json("".join(lines), repr(path)), 1):
        where = f"{path!r}, object {number}"
        yield _Record(where, _checked_object(value, where))


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}, where an object was expected")
    return value


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
