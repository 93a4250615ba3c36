"""Input rows of batch inference: what a row holds, or what is wrong with it, and rows as tables that can be sent.

A row is a text, an image, a sound, a MIDI file, two frames, or some of the arrays that a task reads (their targets may be missing).
A row that cannot be read is a row all the same: it has an error in place of its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from perceiver.config import UserError
from perceiver.data.rows import ArrayRows, Column
from perceiver.data.sound_folders import FILE_COLUMNS
from perceiver.data.storage import open_folder

Kind = Literal["text", "image", "audio", "midi", "arrays", "frames"]


WANTED = {
    "arrays": "row of arrays", "text": "text", "image": "image", "audio": "sound", "midi": "MIDI file", "frames": "pair of frames",
}  # fmt: skip
"""What a row is, by its kind."""
_NEEDED = {
    "text": "text", "image": "the bytes of an image or its path", "audio": "the bytes of a sound or its path",
    "midi": "the bytes of a MIDI file or its path",
}  # fmt: skip
_MEDIA = ("image", "audio", "midi")
"""Kinds whose value is a file's content."""


@dataclass(frozen=True)
class Row:
    """An input: its id, and its value or what is wrong with it."""

    id: str
    value: str | bytes | dict[str, Any] | None
    error: str | None = None
    given_place: str | None = None

    @property
    def place(self) -> str:
        """File and number, also where the id is from a column (where two rows may have the same)."""
        return self.id if self.given_place is None else self.given_place


@dataclass(frozen=True)
class Wanted:
    """What is read of a row."""

    kind: Kind
    column: str
    id_column: str | None
    arrays: ArrayRows | None = None
    folder: str | None = None
    """Of the table, where its rows may name files by their paths from there."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns with its value; of files, unless one was chosen, those that name them, of which the first there counts."""
        if self.arrays is not None:
            return tuple(self.arrays.columns)
        usual = FILE_COLUMNS if self.column == self.kind and self.kind in _MEDIA else ()
        return tuple(dict.fromkeys((self.column, *usual)))


def checked_row(values: dict[str, Any], given: Any, place: str, wanted: Wanted) -> Row:
    """A row of what its columns hold (null: nothing) and the id that it brings."""
    kind, column, id_column = wanted.kind, wanted.column, wanted.id_column
    if id_column is not None and given is None:
        return Row(place, None, f"no id in {id_column!r}")
    identity = place if id_column is None else str(given)
    if any("\ud800" <= character <= "\udfff" for character in identity):
        return Row(place, None, f"the id in {id_column!r} has a lone surrogate, which no UTF-8 text can hold")
    if wanted.arrays is not None:
        return _arrays_row(values, identity, place, wanted.arrays)
    value = next((values[name] for name in wanted.columns if values.get(name) is not None), None)
    if kind in _MEDIA and isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    value = None if kind in _MEDIA and value == "" else value
    if kind in _MEDIA and isinstance(value, str) and wanted.folder is not None:
        try:
            value = file_bytes(value if "://" in value or value.startswith("/") else f"{wanted.folder}/{value}")
        except (OSError, UserError) as error:
            return Row(identity, None, f"names {value!r}, which cannot be read ({str(error).splitlines()[0]})", place)
    if not isinstance(value, str if kind == "text" else bytes):
        what = "is missing or null" if value is None else f"is {type(value).__name__}"
        return Row(identity, None, f"{column!r} {what}, not {_NEEDED[kind]}", place)
    return Row(identity, value, None, place)


def file_bytes(path: str) -> bytes:
    """The content of a file, local or in an object store."""
    filesystem, inner = open_folder(path)
    with filesystem.open_input_stream(inner, compression=None) as source:
        return source.read()


# --------------------------------------------------------------------------------------------------------------- arrays


def _arrays_row(values: dict[str, Any], identity: str, place: str, arrays: ArrayRows) -> Row:
    values = dict(arrays.filled(values))
    names = [name for name, value in values.items() if value is not None]
    if not names:
        return Row(identity, None, f"has none of the columns {', '.join(arrays.columns)}", place)
    try:
        table = given_rows(arrays, names, [values], "the row")
    except UserError as error:
        return Row(identity, None, str(error).replace("the row, example 0", "the row"), place)
    numbers = {name: array[0] for name, array in arrays.arrays(table).items()}
    return Row(identity, {name: numbers[name] if name in numbers else table[name][0].as_py() for name in names}, None, place)


def given_rows(arrays: ArrayRows, names: Sequence[str], rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    """Rows of some of the columns; an array may come as the flat list that prepared data stores.

    Raises:
        UserError: a value does not fit its column; names it.
    """
    some = ArrayRows(**{name: (column.shape, column.dtype) for name, column in arrays.columns.items() if name in names})
    return some.table([{name: _shaped(row[name], arrays, name) for name in some.columns} for row in rows], where)


def _shaped(value: Any, arrays: ArrayRows, name: str) -> Any:
    column = arrays.columns[name]
    if not column.is_number:
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        return value  # the check of the column says what is wrong
    if array.dtype == object and any(number is None for number in array.flat):
        raise UserError(f"{name} has nulls among its numbers: all of them must be there")
    return array.reshape(column.shape) if array.shape == (column.size,) else value


def rows_to_table(rows: Sequence[Row], arrays: ArrayRows | None) -> pa.Table:
    """Rows as a table that can be sent; see `rows_from_table`."""
    columns = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in ("id", "error", "place")}
    if arrays is None:
        # As bytes: a text with a lone surrogate is a bad row, and must arrive as one.
        values = [v.encode("utf-8", "surrogatepass") if isinstance(v := row.value, str) else v for row in rows]
        return pa.table(columns | {"value": pa.array(values, pa.large_binary())})
    for name, column in arrays.columns.items():
        cells = [row.value.get(name) if isinstance(row.value, dict) else None for row in rows]
        kind = pa.from_numpy_dtype(np.dtype(column.dtype)) if column.is_number else pa.type_for_alias(f"large_{column.dtype}")
        if column.shape:
            kind, cells = pa.large_list(kind), [None if cell is None else np.reshape(cell, -1) for cell in cells]
        columns[f"value:{name}"] = pa.array(cells, kind)
    return pa.table(columns)


def rows_from_table(table: pa.Table, kind: Kind, arrays: ArrayRows | None) -> list[Row]:
    """The inverse of `rows_to_table`."""
    values: list[Any]
    if arrays is None:
        values = table["value"].to_pylist()
        if kind == "text":
            values = [None if value is None else value.decode("utf-8", "surrogatepass") for value in values]
    else:
        found = {name: [_sent(value, column) for value in table[f"value:{name}"]] for name, column in arrays.columns.items()}
        values = [{name: v[number] for name, v in found.items() if v[number] is not None} or None for number in range(table.num_rows)]
    ids, errors, places = (table[name].to_pylist() for name in ("id", "error", "place"))
    return [
        Row(identity, None if error is not None else value, error, place)
        for identity, value, error, place in zip(ids, values, errors, places, strict=True)
    ]


def _sent(value: pa.Scalar, column: Column) -> Any:
    if not value.is_valid or not column.shape:
        return value.as_py()
    return value.values.to_numpy().reshape(column.shape)
