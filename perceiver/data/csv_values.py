"""What the fields of .csv, .tsv and .xlsx files are as numbers: they are texts, whose types follow from all rows of a column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from perceiver.data.files import InputFile
from perceiver.data.read_tables import csv_rows
from perceiver.data.rows import Column
from perceiver.data.spans import Problems, Span, Unreadable
from perceiver.data.tables import NotJson, parse_json

MISSING = frozenset(("", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none", "-"))
"""Fields, in small letters, that stand for a number that is not there."""
_TRUTH = {"true": 1, "false": 0}
_TYPES = {type(None): None, bool: pa.bool_(), float: pa.float64(), str: pa.string()}
_LONGEST = 64
"""Characters of a field that may be a number, at most."""
_ROWS = 1 << 16
"""Rows of a table that are taken at once."""


def csv_value(text: str | None, column: Column) -> Any:
    """What a field holds for a column: a number, or the lists of JSON, or the text; None: nothing. A text that is no number stays as it is,
    for whoever checks values against their columns to name it.
    """
    if text is None or not column.is_number:
        return text or None
    bare = text.strip()
    return None if bare.lower() in MISSING else _number(bare)


def _number(text: str) -> Any:
    """The number, truth value or list of JSON that a text is; other texts as they are."""
    if "_" in text:
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        pass
    if text.startswith("["):
        try:
            return parse_json(text)
        except NotJson:
            return text
    return _TRUTH.get(text.lower(), text)


def field_value(text: str) -> Any:
    """What a field of a column of unknown type holds: a number, a truth value, the list of JSON, its text; None: nothing."""
    if len(text) > _LONGEST and not text.startswith("["):
        return text
    bare = text.strip()
    small = bare.lower()
    if small in MISSING:
        return None
    if small in _TRUTH:
        return bool(_TRUTH[small])
    value = _number(bare)
    return text if isinstance(value, float) and not math.isfinite(value) else value


def _type_of(text: str) -> pa.DataType | None:
    """The type of a field; None: it is missing."""
    value = field_value(text)
    if isinstance(value, list):
        kind: pa.DataType = pa.float64()
        while isinstance(value, list):
            kind, value = pa.list_(kind), value[0] if value else 0.0
        return kind if isinstance(value, (int, float)) else pa.string()
    if isinstance(value, int) and not isinstance(value, bool):
        return pa.int64() if -(1 << 63) <= value < 1 << 63 else pa.float64()
    return _TYPES[type(value)]


def _common(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    """The type of a column that has fields of both types."""
    if one is None or other is None or one == other:
        return one if other is None else other
    return pa.float64() if {one, other} == {pa.int64(), pa.float64()} else pa.string()


def csv_types(file: InputFile) -> dict[str, pa.DataType]:
    """The types of a file's columns, by all of its rows that can be read; of a column without any value null.

    Raises:
        Unreadable: there are no rows, or quotes that cannot be right.
    """
    found: dict[str, pa.DataType | None] = {}
    for row in _rows(file, []):
        for name, text in row.items():
            known = found.get(name)
            if known != pa.string():
                found[name] = _common(known, _type_of(text))
    return {name: pa.null() if kind is None else kind for name, kind in found.items()}


def csv_tables(file: InputFile, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """Some rows at once of a file's columns (None: of all), with their types.

    Raises:
        Unreadable: see `csv_types`; or it lacks a column.
    """
    types = csv_types(file)
    names = list(types) if columns is None else list(columns)
    if missing := [name for name in names if name not in types]:
        raise Unreadable("wrong schema", f"{file.name} has no column {missing[0]!r} (it has: {', '.join(types)})")
    rows: list[dict[str, str]] = []
    for row in _rows(file, names):
        rows.append(row)
        if len(rows) == _ROWS:
            yield _table(file, rows, names, types)
            rows = []
    if rows:
        yield _table(file, rows, names, types)


def _table(file: InputFile, rows: list[dict[str, str]], names: Sequence[str], types: dict[str, pa.DataType]) -> pa.Table:
    try:
        return pa.table({name: pa.array([_typed(row[name], types[name]) for row in rows], types[name]) for name in names})
    except UnicodeEncodeError as error:
        raise Unreadable("not UTF-8", f"{file.name} is {not_utf_8(error)}") from None


def not_utf_8(error: UnicodeEncodeError) -> str:
    """What is said of a text with a byte that is no UTF-8, which it has as a lone surrogate."""
    byte = ord(error.object[error.start]) & 0xFF
    return f"not UTF-8: byte {byte:#04x} (--data.encoding names another encoding, such as latin-1)"


def _typed(text: str, kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return text or None
    bare = text.strip()
    if pa.types.is_null(kind) or bare.lower() in MISSING:
        return None
    value = _number(bare)
    if pa.types.is_boolean(kind):
        return bool(value)
    return float(value) if pa.types.is_floating(kind) else value


def _rows(file: InputFile, wanted: list[str]) -> Iterator[dict[str, str]]:
    return (row for _, row in csv_rows(Span(file, 0, file.size), wanted, Problems(skip=True)))
