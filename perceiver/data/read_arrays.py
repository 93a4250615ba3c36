"""Reads rows of arrays from spans of files or from code. Every fault names the file and the row or line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from perceiver.data.csv_values import csv_value, not_utf_8
from perceiver.data.examples import ExamplePart
from perceiver.data.read_tables import array_rows, column_tables, csv_rows, is_json_array
from perceiver.data.rows import ArrayRows, BadExample
from perceiver.data.spans import (
    Problems,
    Span,
    Unreadable,
    byte_runs,
    line_borders,
    line_number,
)
from perceiver.data.tables import (
    NoGroup,
    NotJson,
    group_of,
    line_fault,
    parse_json,
)


def read_arrays(span: Span, rows: ArrayRows, problems: Problems, group: str | None = None) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """The examples of a span, as the rows' columns hold them, each with its group if there is a column of groups. Faulty ones and
    faulty files go to `problems`.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    readers = {"examples": _code_arrays, "jsonl": _jsonl_arrays, "csv": _csv_arrays}
    try:
        for where, example in readers.get(span.file.format, _column_arrays)(span, rows, problems, group):
            try:
                values = rows.values(example)
                if group is not None and group not in example:
                    raise BadExample("missing column", f"it has no {group} (it has: {', '.join(map(str, example))})")
                yield values, None if group is None else group_of(example[group], group)
            except BadExample as error:
                problems.report(error.reason, f"{where()}: {error}")
            except NoGroup as error:
                problems.report("no group", f"{where()}: {error}")
    except Unreadable as error:
        problems.report(*error.args)


_Found = Iterator[tuple[Callable[[], str], Any]]
"""Examples, each after what messages call it."""


def _code_arrays(span: Span, rows: ArrayRows, problems: Problems, group: str | None) -> _Found:
    part = span.file
    assert isinstance(part, ExamplePart)
    for number, example in enumerate(part.examples()):
        yield partial("{}, example {:,}".format, part.place, number), example


def _jsonl_arrays(span: Span, rows: ArrayRows, problems: Problems, group: str | None) -> _Found:
    """A JSON object a line, or the elements of an array, of (nested) lists."""
    if is_json_array(span.input_file):
        for number, element in array_rows(span, problems):
            yield partial("{} element {:,}".format, span.file.name, number), element
        return
    any_row = False
    for base, run, _ in byte_runs(span, problems, line_borders(span)):
        position = base
        for line in run.split(b"\n"):
            if line.strip():
                any_row = True
                try:
                    yield partial(_line_place, span, position, problems), parse_json(line.decode())
                except (UnicodeDecodeError, NotJson) as error:
                    line_fault(span, position, problems)("not JSON", f"is not one JSON object a line ({error})")
            position += len(line) + 1
    if not any_row and span.start == 0:
        raise Unreadable("empty file", f"{span.file.name} is empty")


def _line_place(span: Span, position: int, problems: Problems) -> str:
    return span.file.name if problems.skip else f"{span.file.name} line {line_number(span, position):,}"


def _csv_arrays(span: Span, rows: ArrayRows, problems: Problems, group: str | None) -> _Found:
    """Fields as the columns want them: numbers, lists as JSON."""
    for line, row in csv_rows(span, [*rows.columns, *([group] if group is not None else [])], problems):
        try:
            for name in rows.columns:
                row[name].encode()
        except UnicodeEncodeError as error:
            problems.report("not UTF-8", f"{span.file.name} line {line:,} is {not_utf_8(error)}")
            continue
        example: dict[str, Any] = {name: csv_value(row[name], column) for name, column in rows.columns.items()}
        if group is not None:
            example[group] = row[group]
        yield partial("{} line {:,}".format, span.file.name, line), example


def _column_arrays(span: Span, rows: ArrayRows, problems: Problems, group: str | None) -> _Found:
    """Columns of numbers, or of lists of them: nested as the rows' shapes are, or all numbers of a row in one list."""
    groups = [group] if group is not None and group not in rows.columns else []
    for first, table in column_tables(span, [*rows.columns, *groups]):
        values = {name: _unpacked(table[name].combine_chunks(), rows.columns[name].shape) for name in rows.columns}
        values |= {name: table[name].to_pylist() for name in groups}
        for i in range(table.num_rows):
            example = {name: column[i] for name, column in values.items()}
            yield partial("{} row {:,}".format, span.file.name, first + i), example


def _unpacked(column: pa.Array, shape: tuple[int, ...]) -> Any:
    """A column's values, row by row."""
    flat, sizes = column, []
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        lengths = pc.list_value_length(flat)
        if flat.null_count or not len(flat) or pc.min(lengths) != pc.max(lengths):
            return column.to_pylist()  # one row at least is no array, and is named by whoever looks at them one by one
        sizes.append(lengths[0].as_py())
        flat = flat.flatten()
    numbers = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)
    if flat.null_count or not numbers:
        return column.to_pylist()
    if sizes == [math.prod(shape)]:
        sizes = list(shape)
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), *sizes)
