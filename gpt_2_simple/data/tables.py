"""Rows of CSV, TSV and JSON lines in, one document of text a row out."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..encoder import END_OF_TEXT
from .settings import START_TOKEN

if TYPE_CHECKING:
    from .text_files import DataFile, ReadReport


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
    end_token: str = END_OF_TEXT

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


LONGEST_FIELD = 1 << 24


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
