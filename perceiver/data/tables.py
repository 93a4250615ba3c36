"""What readers of JSON lines and parquet files share: columns, labels, rows of parquet, faults of lines."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.data.files import InputFile
from perceiver.data.spans import (
    LEFT_OUT,
    SLAB,
    Problems,
    Span,
    Unreadable,
    line_number,
)
from perceiver.data.storage import open_folder
from perceiver.data.times import Time, TimeColumn

MAX_ROWS = 4096
"""Rows of parquet taken at once, at most; fewer where they are large."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns to read and what they may hold."""

    text: str
    label: str | None
    """None: labels are not needed."""
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    tags: bool = False
    """Any number of classes a row."""
    left_out: tuple[str, ...] = ()
    """Labels whose rows are not taken."""
    group: str | None = None
    """Column whose rows of one value are of one split."""
    image_shape: tuple[int, int, int] | None = None
    """Of what is stored."""
    fit_images: bool = False
    """Scale and cut images to that shape (`perceiver.data.images.fitted`)."""
    sample_rate: int | None = None
    """Samples a second of sounds as they are stored."""


def parquet_rows(file: InputFile) -> tuple[int, int]:
    """Rows of a parquet file, and their bytes unpacked.

    Raises:
        Unreadable: it is damaged, or no parquet file.
    """
    with open_parquet(file) as parquet:
        metadata = parquet.metadata
        size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
        return metadata.num_rows, size


def line_fault(span: Span, position: int, problems: Problems) -> Callable[[str, str], None]:
    """Reports a fault of the line at a byte of a file."""

    def fault(reason: str, what: str) -> None:
        place = "" if problems.skip else f"line {line_number(span, position):,}: "
        problems.report(reason, f"{span.file.name} {place}{what}")

    return fault


class NotJson(Exception):
    """Text that is not JSON, or JSON that Python does not read: the message is the reason."""


def parse_json(text: str) -> Any:
    """The value of a text of JSON.

    Raises:
        NotJson: it is none, is nested too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise NotJson("it is nested too deep") from None
    except ValueError:
        raise NotJson("it has a number of too many digits") from None


class NoGroup(Exception):
    """A row that belongs to no group."""

    reason = "no group"
    """How it is counted."""


def group_of(value: Any, column: str) -> bytes:
    """The value of a group column as bytes that tell groups apart.

    Raises:
        NoGroup: there is none, or it is no time where the column is of times.
    """
    if value is None or value == "":
        what = "has a time" if isinstance(column, TimeColumn) else "belongs to a group"
        raise NoGroup(f"column {str(column)!r} is empty, and each row {what}")
    if isinstance(column, TimeColumn):
        try:
            return Time.of(value)
        except (ValueError, OverflowError):
            shown = reprlib.repr(value)
            raise NoGroup(f"column {str(column)!r} holds {shown}, which is no time: a number, or a date such as 2026-01-31") from None
    return label_text(value).encode(errors="surrogateescape")


class BadLabel(Exception):
    """A value that is no label."""

    reason = "bad label"
    """How it is counted."""


class LeftOut(BadLabel):
    """The label of a class that was left out by the choice of others (`task.class_names`): no fault."""

    reason = LEFT_OUT


def tag_values(value: Any) -> list[Any]:
    """The labels of a row with any number of them: a list, or names separated by | or ;.

    Raises:
        BadLabel: neither.
    """
    if isinstance(value, str) and value.startswith("["):
        with suppress(NotJson):
            value = parse_json(value)
    if isinstance(value, str):
        return [name for word in value.split("|") for part in word.split(";") if (name := part.strip())]
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    if isinstance(value, (int, float, np.integer)) and not (isinstance(value, float) and math.isnan(value)):
        return [value]
    raise BadLabel(f"{reprlib.repr(value)} is no list of labels")


def label_of(value: Any, columns: Columns) -> Any:
    """A label as a class number: a number, also as text ("1", as .csv files have it), a truth value, or the name of a class.

    Of rows with any number of classes 1 or 0 for each class, int64 (classes,).

    Raises:
        BadLabel: neither.
    """
    if columns.tags:
        found, one = np.zeros(columns.num_classes, np.int64), replace(columns, tags=False)
        for label in tag_values(value):
            with suppress(LeftOut):
                found[label_of(label, one)] = 1
        return found
    if columns.left_out and label_text(value) in columns.left_out:
        raise LeftOut(f"label {reprlib.repr(value)} is none of the chosen classes")
    if (text := label_text(value)) in columns.class_names:
        return columns.class_names.index(text)
    if isinstance(value, str) and value in columns.class_names:
        return columns.class_names.index(value)
    if isinstance(value, (list, dict, np.ndarray)):
        raise BadLabel(f"label {reprlib.repr(value)} is a {type(value).__name__}, and each row has one class")
    if isinstance(value, str):
        value = _number_or_text(value)
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        raise BadLabel(f"label {value!r} is no class: classes are whole numbers or names; real numbers are for a regression")
    whole = isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer())
    numbers_are_names = bool(columns.class_names) and all(name.removeprefix("-").isdecimal() for name in columns.class_names)
    if whole and 0 <= value < columns.num_classes and not numbers_are_names:
        return int(value)
    wanted = [] if numbers_are_names else [f"0 .. {columns.num_classes - 1}"]
    wanted += [", ".join(columns.class_names)] if columns.class_names else []
    raise BadLabel(f"label {reprlib.repr(value)} must be {' or '.join(wanted)}")


def label_text(value: Any) -> str:
    """A label as the name of a class: whole numbers, also as texts and real numbers ("1.0"), alike; truth values as 0 and 1."""
    value = _number_or_text(value) if isinstance(value, str) else value
    whole = isinstance(value, (bool, int, np.integer)) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else str(value)


def _number_or_text(text: str) -> float | str:
    """The number that a text is; other texts as they are."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) and "_" not in text else text


def labels_of(span: Span, table: pa.Table, first: int, keep: list[bool], columns: Columns, problems: Problems) -> np.ndarray:
    """The label column as class numbers; rows with a faulty label are taken out of `keep`."""
    result = np.zeros((table.num_rows, columns.num_classes) if columns.tags else table.num_rows, np.int64)
    for i, value in enumerate(table.column(columns.label).to_pylist()):
        if keep[i]:
            try:
                result[i] = label_of(value, columns)
            except BadLabel as error:
                problems.report(error.reason, f"{span.file.name} row {first + i:,}: {error}")
                keep[i] = False
    return result


def groups_of(span: Span, table: pa.Table, first: int, keep: list[bool], columns: Columns, problems: Problems) -> list[bytes]:
    """The group column's values of the rows to keep; rows without one are taken out of `keep`."""
    result = []
    for i, value in enumerate(table.column(columns.group).to_pylist()):
        if keep[i]:
            try:
                result.append(group_of(value, columns.group or ""))
            except NoGroup as error:
                problems.report("no group", f"{span.file.name} row {first + i:,}: {error}")
                keep[i] = False
    return result


def check_once(name: str, columns: Sequence[str]) -> None:
    """Raises Unreadable where a file calls two columns the same: which one is meant? Columns without a name may be many."""
    if twice := next((column for column, number in Counter(columns).items() if column and number > 1), None):
        raise Unreadable("wrong schema", f"{name} has several columns {twice!r}: give each a name of its own")


@contextmanager
def open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read; one that is damaged is `Unreadable`."""
    filesystem, path = open_folder(file.path)
    try:
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
            check_once(file.name, parquet.schema_arrow.names)
            yield parquet
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Unreadable("corrupt file", f"{file.name} is no readable parquet file ({reason})") from None


def parquet_tables(span: Span, wanted: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a span, some at once, with the number of the first.

    Raises:
        Unreadable: damaged file, missing column, no rows.
    """
    with open_parquet(span.input_file) as parquet:
        there = parquet.schema_arrow.names
        if missing := [name for name in wanted if name not in there]:
            raise Unreadable("wrong schema", f"{span.file.name} has no column {missing[0]!r} (it has: {', '.join(there)})")
        if parquet.metadata.num_rows == 0:
            raise Unreadable("empty file", f"{span.file.name} has no rows")
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            stop = first + parquet.metadata.row_group(group).num_rows
            if first < span.stop and stop > span.start:
                position = first
                size = parquet.metadata.row_group(group).total_byte_size // max(stop - first, 1)
                rows = min(max(SLAB // max(size, 1), 1), MAX_ROWS)
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
                    low, high = max(position, span.start), min(position + batch.num_rows, span.stop)
                    if low < high:
                        table = pa.Table.from_batches([batch.slice(low - position, high - low)])
                        yield low, table.select(wanted)
                    position += batch.num_rows
            first = stop
