"""Columns of lists of one length as NumPy arrays, and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def fixed_array(table: pa.Table, column: str) -> np.ndarray:
    """A fixed_size_list column as (rows, length); read-only and without copying where the table is in one piece."""
    chunks = [_fixed_chunk(chunk) for chunk in table.column(column).chunks]
    if not chunks:
        kind = table.schema.field(column).type
        return np.empty((0, kind.list_size), kind.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _fixed_chunk(chunk: pa.FixedSizeListArray) -> np.ndarray:
    length = chunk.type.list_size
    values = chunk.values.slice(chunk.offset * length, len(chunk) * length)
    return values.to_numpy(zero_copy_only=True).reshape(len(chunk), length)


def fixed_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `fixed_array`: (rows, length) as a fixed_size_list column, without copying where contiguous."""
    values = np.ascontiguousarray(values)
    item = pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=pa.list_(item, values.shape[1]))
