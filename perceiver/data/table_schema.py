"""What the columns of a table hold, looked up in its files before they are prepared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from perceiver.config import DataConfig, UserError, nearest
from perceiver.data.csv_values import csv_tables
from perceiver.data.files import InputFile
from perceiver.data.read_tables import is_json_array, open_arrow
from perceiver.data.rows import ArrayRows
from perceiver.data.sources import resolve
from perceiver.data.spans import Unreadable
from perceiver.data.storage import open_folder
from perceiver.data.survey import ColumnSurvey, Reading, damage_of, table_rows
from perceiver.data.tables import open_parquet

_LOOKED_AT = 1000
"""Rows that are looked at for a list, where the first ones have none."""


class TableSchema:
    """The columns of a source's files of tables, by their first rows (of .csv files by all rows of the first file).

    Args:
        data: its source and validation source.

    Raises:
        UserError: there are no files of tables, or the first cannot be read or has no row.
    """

    def __init__(self, data: DataConfig) -> None:
        self.files = resolve(data, ArrayRows.kind).files
        if not self.files:
            raise UserError(
                f"data.source {data.source} is code: name files of tables ({ArrayRows.expected}), whose columns can be looked up"
            )
        self._skip = data.on_error == "skip"
        if self._skip:
            faults = {file: damage_of(file) for file in self.files}
            self.files = tuple(file for file, fault in faults.items() if not fault)
            if not self.files:
                raise UserError(next(iter(faults.values())))
        self.name = self.files[0].name
        first = next((table for table in self._tables(self.files[0], None, _LOOKED_AT) if table.num_rows), None)
        if first is None:
            raise UserError(f"{self.name} has no rows")
        self.types = {field.name: _bare(field.type) for field in first.schema}
        self._rows: list[dict[str, Any]] = first.slice(0, _LOOKED_AT).to_pylist()

    def _tables(self, file: InputFile, columns: list[str] | None, rows: int) -> Iterator[pa.Table]:
        """Some rows at once of a file's columns (None: of all); without faulty ones where these are skipped."""
        if self._skip and file.format == "jsonl":
            found = _from_objects(list(table_rows(file)))
            _check_columns(file, columns, found.column_names)
            yield found if columns is None else found.select(columns)
        else:
            yield from _tables(file, columns, rows)

    def check(self, column: str, field: str) -> None:
        """Raises UserError where there is no such column; names those that there are."""
        if column not in self.types:
            near = nearest(column, self.types)
            raise UserError(f"{field} names {column!r}, which {self.name} does not have{near} (it has: {', '.join(self.types)})")

    def is_text(self, column: str) -> bool:
        return pa.types.is_string(self.types[column]) or pa.types.is_large_string(self.types[column])

    def reading(self, column: str) -> Reading | None:
        """How a model takes a column of texts, by all files: see `perceiver.data.survey.ColumnSurvey.reading`.

        Raises:
            UserError: a file lacks the column or cannot be read.
        """
        found, rows = ColumnSurvey(), 0
        for file in self.files:
            for table in self._tables(file, [column], 1 << 14):
                rows += table.num_rows
                for value in table[column].to_pylist():
                    found.add(value)
        return found.reading(rows)

    def texts(self, column: str, rows: int) -> Iterator[list[str]]:
        """All texts of a column over all files, some at once.

        Raises:
            UserError: a file lacks the column or cannot be read.
        """
        for file in self.files:
            for table in self._tables(file, [column], 1 << 14):
                for first in range(0, table.num_rows, rows):
                    yield [text for text in table[column].slice(first, rows).to_pylist() if text]

    def is_whole(self, column: str, in_lists: bool = False) -> bool:
        """Whether a row has one whole number, or true and false; or lists of such."""
        kind = _of_lists(self.types[column]) if in_lists else self.types[column]
        return pa.types.is_integer(kind) or pa.types.is_boolean(kind)

    def is_numeric(self, column: str) -> bool:
        """Whether a row has numbers: one, or a list of them of any depth."""
        kind = _of_lists(self.types[column])
        return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

    def shape(self, column: str, field: str) -> tuple[int, ...]:
        """The shape of a column's numbers in the first row that has some.

        Raises:
            UserError: there is no such column, or it has no numbers, or not as many in each of a row's lists.
        """
        self.check(column, field)
        if not self.is_numeric(column):
            raise UserError(
                f"{field} names {column!r}, which holds {self._what(column)} in {self.name} and must hold numbers or lists of them"
            )
        if not pa.types.is_nested(self.types[column]):
            return ()
        value = next((row[column] for row in self._rows if row[column] is not None), None)
        try:
            shape = np.shape(value)
        except ValueError:
            shape = (0,)
        if value is None or 0 in shape:
            raise UserError(
                f"{field} names {column!r}, which is no array in the first row of {self.name} that has one: all rows need lists of the "
                "same lengths"
            )
        return shape

    def _what(self, column: str) -> str:
        """What a column holds, with an example of a text."""
        example = next((row[column] for row in self._rows if row[column] is not None), None)
        return f"{self.types[column]} (such as {example!r})" if isinstance(example, str) else str(self.types[column])

    def greatest(self, column: str) -> float:
        """The greatest number of a column over all files, in lists or not; NaN where there is none.

        Raises:
            UserError: a file lacks the column or cannot be read.
        """
        found = [math.nan]
        for file in self.files:
            for table in self._tables(file, [column], 1 << 14):
                found.append(pc.max(_flat(table[column])).as_py())
        return max((value for value in found if value is not None and not math.isnan(value)), default=math.nan)

    def distinct(self, column: str) -> list[Any]:
        """All values of a column over all files, sorted; nulls left out.

        Raises:
            UserError: a file lacks the column or cannot be read.
        """
        found: set[Any] = set()
        for file in self.files:
            for table in self._tables(file, [column], 1 << 16):
                found.update(pc.unique(table[column]).drop_null().to_pylist())
        try:
            return sorted(found)
        except TypeError:
            raise UserError(f"column {column!r} of {self.name} and the other files holds numbers in one and texts in another") from None


def _flat(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of lists of any depth."""
    while _of_lists(values.type) != values.type:
        values = pc.list_flatten(values)
    return values


def _of_lists(kind: pa.DataType) -> pa.DataType:
    """The type of what lists of any depth hold."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _bare(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _tables(file: InputFile, columns: list[str] | None, rows: int) -> Iterator[pa.Table]:
    """Some rows at once of a file's columns (None: of all).

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        if file.format == "parquet":
            with open_parquet(file) as parquet:
                names = parquet.schema_arrow.names
                _check_columns(file, columns, names)
                for batch in parquet.iter_batches(rows, columns=columns):
                    yield pa.Table.from_batches([batch])
            return
        if file.format == "arrow":
            with open_arrow(file) as (schema, batches):
                _check_columns(file, columns, schema.names)
                for batch in batches:
                    yield pa.Table.from_batches([batch if columns is None else batch.select(columns)])
            return
        if file.format == "csv":
            yield from csv_tables(file, columns)
            return
        if is_json_array(file) or file.packing not in ("", ".gz") or file.encoding != "utf-8":
            found = _from_objects(list(table_rows(file)))
            _check_columns(file, columns, found.column_names)
            yield found if columns is None else found.select(columns)
            return
        filesystem, path = open_folder(file.path)
        with filesystem.open_input_stream(path, compression="gzip" if file.compressed else None) as stream:
            table = pyarrow.json.read_json(stream)
    except Unreadable as error:
        raise UserError(str(error.args[-1])) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.name} cannot be read as a table ({str(error).splitlines()[0].rstrip('.')})") from None
    _check_columns(file, columns, table.column_names)
    yield table if columns is None else table.select(columns)


def _from_objects(rows: list[dict[str, Any]]) -> pa.Table:
    """Objects as rows, of whose names each may lack some."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException:
            raise UserError(f"column {name!r} holds numbers in one row and texts or lists in another: make them alike") from None
    return pa.table(columns)


def _check_columns(file: InputFile, columns: list[str] | None, there: list[str]) -> None:
    if missing := [name for name in columns or () if name not in there]:
        raise UserError(f"{file.name} has no column {missing[0]!r} (it has: {', '.join(there)})")
