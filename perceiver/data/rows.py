"""What a row of prepared data is, for tasks that read arrays: named columns of fixed shape, in any number.

(Rows of images, of a stream of tokens and of documents have formats of their own, see `shards.py`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from perceiver.config import UserError
from perceiver.data.shards import fixed_array, fixed_column

DTYPES = ("float32", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "string", "binary")
"""Types of a column's numbers; "string" and "binary" stand alone in a row, with shape ()."""


@dataclass(frozen=True)
class Column:
    """The values of one name in a row."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_number(self) -> bool:
        return self.dtype not in ("string", "binary")


class ArrayRows:
    """Rows of named arrays: `ArrayRows(past=((72, 7), "float32"), label=((), "int32"))`.

    A row may lack none of its columns; missing measurements are a mask of their own, say. Rows are stored as fixed-size lists.

    Raises:
        UserError: a shape or type that cannot be stored.
    """

    kind = "arrays"

    def __init__(self, **columns: tuple[tuple[int, ...], str]) -> None:
        if not columns:
            raise UserError("ArrayRows needs at least one column")
        self.columns: dict[str, Column] = {}
        for name, (shape, dtype) in columns.items():
            if dtype not in DTYPES:
                raise UserError(f"column {name} has type {dtype!r} and must have one of {', '.join(DTYPES)}")
            if any(not isinstance(n, int) or n < 1 for n in shape):
                raise UserError(f"column {name} has shape {shape} and all its sizes must be whole numbers of at least 1")
            if dtype in ("string", "binary") and shape:
                raise UserError(f"column {name} of type {dtype} must have shape ()")
            if name in ("row", "epoch", "source", "valid"):
                raise UserError(f"column {name!r} has a name that the platform uses itself: choose another")
            self.columns[name] = Column(tuple(shape), dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrayRows) and self.columns == other.columns

    def __hash__(self) -> int:
        return hash(tuple(self.columns.items()))

    def to_json(self) -> dict[str, Any]:
        """The columns as JSON-ready data."""
        return {name: [list(column.shape), column.dtype] for name, column in self.columns.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArrayRows:
        """The inverse of `to_json`."""
        return cls(**{name: (tuple(shape), dtype) for name, (shape, dtype) in data.items()})

    @property
    def schema(self) -> pa.Schema:
        """The columns of a shard. Nothing is ever null."""
        return pa.schema([pa.field(name, _arrow_type(column), nullable=False) for name, column in self.columns.items()])

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row's numbers."""
        return max(1, sum(column.size * np.dtype(column.dtype).itemsize for column in self.columns.values() if column.is_number))

    def table(self, examples: Iterable[Mapping[str, Any]], where: str) -> pa.Table:
        """Examples as rows.

        Args:
            examples: mappings from names to arrays, lists or scalars; other names are left out.
            where: what messages call their origin.

        Raises:
            UserError: an example lacks a column, or has another shape, or numbers that the column's type cannot hold.
        """
        values: dict[str, list[Any]] = {name: [] for name in self.columns}
        for number, example in enumerate(examples):
            for name, column in self.columns.items():
                values[name].append(_value(example, name, column, f"{where}, example {number}"))
        arrays = []
        for name, column in self.columns.items():
            if column.is_number and column.shape:
                stacked = np.stack(values[name]) if values[name] else np.empty((0, *column.shape), column.dtype)
                arrays.append(fixed_column(stacked.reshape(len(stacked), column.size)))
            else:
                arrays.append(pa.array(values[name], _arrow_type(column)))
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def arrays(self, table: pa.Table) -> dict[str, np.ndarray]:
        """The numbers of rows, (n, *shape) by name; columns that the table lacks and texts are left out."""
        found = {}
        for name, column in self.columns.items():
            if not column.is_number or name not in table.column_names:
                continue
            if column.shape:
                found[name] = fixed_array(table.select([name]), name).reshape(table.num_rows, *column.shape)
            else:
                found[name] = table[name].to_numpy()
        return found

    def zeros(self, num_rows: int) -> pa.Table:
        """Rows of zeros and empty texts: what shapes are counted with."""
        empty = {"string": "", "binary": b""}
        example = {
            name: np.zeros(column.shape, column.dtype) if column.is_number else empty[column.dtype] for name, column in self.columns.items()
        }
        return self.table([example] * num_rows, "zeros")


def _arrow_type(column: Column) -> pa.DataType:
    if not column.is_number:
        return pa.string() if column.dtype == "string" else pa.binary()
    item = pa.from_numpy_dtype(np.dtype(column.dtype))
    return pa.list_(pa.field("element", item, nullable=False), column.size) if column.shape else item


def _value(example: Mapping[str, Any], name: str, column: Column, where: str) -> Any:
    if not isinstance(example, Mapping):
        raise UserError(f"{where} is a {type(example).__name__} and must be a mapping with {name} in it")
    if name not in example or example[name] is None:
        raise UserError(f"{where} has no {name}: it has {', '.join(map(str, example)) or 'nothing'}")
    value = example[name]
    if not column.is_number:
        kinds = (str,) if column.dtype == "string" else (bytes,)
        if not isinstance(value, kinds):
            raise UserError(f"{where}: {name} is a {type(value).__name__} and must be {column.dtype}")
        return value
    try:
        array = np.asarray(value)
        converted = array.astype(column.dtype)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {name} cannot be read as {column.dtype} ({error})") from None
    if array.shape != column.shape:
        raise UserError(f"{where}: {name} has shape {array.shape} and must have {column.shape}")
    if np.issubdtype(converted.dtype, np.integer) and not np.array_equal(converted, array):
        raise UserError(f"{where}: {name} has values that {column.dtype} cannot hold")
    return converted if column.shape else converted.item()
