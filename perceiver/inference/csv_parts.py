"""Rows of .csv, .tsv and Excel files for batch inference: where parts may be cut, and the rows of a part."""

from __future__ import annotations

import codecs
import csv
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from perceiver.config import UserError
from perceiver.data.csv_values import csv_value
from perceiver.data.files import InputFile
from perceiver.data.read_excel import excel_rows
from perceiver.data.read_tables import csv_separator
from perceiver.inference.rows import Row, Wanted, checked_row


class _Lines:
    """Lines of text, decoded one by one; `stop` is the byte after the last of them."""

    def __init__(self, found: Iterator[bytes], start: int = 0) -> None:
        self._found, self.stop = found, start

    def __iter__(self) -> Iterator[str]:
        rest = b""
        for chunk in self._found:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield self._decoded(line + b"\n")
        if rest:
            yield self._decoded(rest)

    def _decoded(self, line: bytes) -> str:
        bare = line.removeprefix(codecs.BOM_UTF8) if not self.stop else line
        self.stop += len(line)
        return bare.decode(errors="surrogateescape")


def _reader(lines: _Lines, path: str, name: str) -> tuple[Iterator[list[str]], list[str], str]:
    """The records after the first one that is not blank, that one, and what separates fields."""
    csv.field_size_limit(sys.maxsize)
    given = iter(lines)
    first = next((line for line in given if line.strip()), "")
    separator = csv_separator(path, first)

    def all_lines() -> Iterator[str]:
        yield first
        yield from given

    reader = _records(all_lines(), separator, name)
    return reader, next(reader, []), separator


def _records(lines: Iterator[str], separator: str, name: str) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        yield from (fields for fields in reader if fields)
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num:,}: quotes that cannot be right ({error})") from None


def csv_cuts(
    found: Iterator[bytes], path: str, name: str, rows_per_part: int, check: Callable[[list[str]], None]
) -> Iterator[dict[str, int]]:
    """Where every n-th row begins: rows may have line ends in quotes, and blank lines are none.

    Args:
        found: the bytes of the file, unpacked.
        path, name: of the file.
        check: is given the names of the columns.

    Raises:
        UserError: quotes that cannot be right, or what `check` raises.
    """
    lines = _Lines(found)
    reader, header, _ = _reader(lines, path, name)
    check(header)
    first, start, rows, end = 0, lines.stop, 0, lines.stop
    for _ in reader:
        rows, end = rows + 1, lines.stop
        if rows == rows_per_part:
            yield {"first": first, "rows": rows, "start": start, "stop": end}
            first, start, rows = first + rows, end, 0
    if rows:
        yield {"first": first, "rows": rows, "start": start, "stop": end}


def csv_rows_of(head: Iterator[bytes], data: bytes, path: str, name: str, first: int, start: int, wanted: Wanted) -> list[Row]:
    """The rows of a part of a file.

    Args:
        head: the bytes of the file from its beginning, which names the columns.
        data: those of the part.
        path, name: of the file.
        first, start: number and byte of the part's first row.
        wanted: what is read of a row.
    """
    _, header, separator = _reader(_Lines(head), path, name)
    records = _records(iter(_Lines(iter([data]), start)), separator, name)
    return [_row(header, fields, f"{name}:{number}", wanted) for number, fields in enumerate(records, first)]


def excel_count(path: str, name: str, check: Callable[[list[str]], None]) -> int:
    """How many rows an Excel file has.

    Args:
        path, name: of the file.
        check: is given the names of the columns.

    Raises:
        Unreadable: it is no Excel file.
        UserError: what `check` raises.
    """
    rows = excel_rows(InputFile(path=path, name=name, format="csv", size=0))
    check(next(rows, (0, []))[1])
    return sum(1 for _ in rows)


def excel_rows_of(path: str, name: str, first: int, num_rows: int, wanted: Wanted) -> list[Row]:
    """Some rows of an Excel file, from the one of number `first` on."""
    rows = excel_rows(InputFile(path=path, name=name, format="csv", size=0))
    _, header = next(rows, (0, []))
    chosen = enumerate((fields for _, fields in islice(rows, first, first + num_rows)), first)
    return [_row(header, fields, f"{name}:{number}", wanted) for number, fields in chosen]


def _row(header: list[str], fields: list[str], place: str, wanted: Wanted) -> Row:
    if len(fields) != len(header):
        return Row(place, None, f"has {len(fields)} fields, and the first line names {len(header)}")
    row = dict(zip(header, fields, strict=True))
    values = _values(row, wanted)
    if bad := next((column for column, value in values.items() if isinstance(value, str) and not _is_utf_8(value)), None):
        return Row(place, None, f"{bad!r} is not UTF-8")
    return checked_row(values, row.get(wanted.id_column or ""), place, wanted)


def _values(row: dict[str, str], wanted: Wanted) -> dict[str, Any]:
    """Fields as they are; of rows of arrays the numbers or lists that they hold, and None for what is missing."""
    if wanted.arrays is None:
        return {name: row.get(name) for name in wanted.columns}
    return {name: csv_value(row[name], column) for name, column in wanted.arrays.columns.items() if name in row}


def _is_utf_8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
