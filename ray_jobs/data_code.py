"""What `perceiver data` says of a source that is code: how it is read, its first examples, and the rows that suit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.examples import ExamplePart, check_repeatable, find_parts


def of_code(source: str) -> list[str]:
    """Lines that say what a source yields.

    Raises:
        UserError: it cannot be imported, fails, yields nothing or no mappings, or other examples when it is read again.
    """
    train, val = find_parts(source, "SOURCE")
    check_repeatable([*train, *val])
    first = next(iter(train[0].examples()), None) if train else None
    if not isinstance(first, Mapping):
        found = "nothing" if first is None else f"a {type(first).__name__}"
        raise UserError(f"SOURCE {source} yields {found} and must yield mappings from names to values")
    lines = [f"{source}: code, {_parts(train)} of training, {_parts(val) if val else 'no validation (data.val-fraction is held out)'}"]
    columns = {str(name): _column(value) for name, value in first.items()}
    width = max(map(len, columns))
    lines += ["", "first example:", *(f"  {name:{width}}  {dtype} {shape}" for name, (shape, dtype) in columns.items())]
    rows = ", ".join(f'{name}=({shape}, "{dtype}")' for name, (shape, dtype) in columns.items())
    return [*lines, "", f"as rows of a task of yours: ArrayRows({rows})", f"to use it: --data.source {source}"]


def _parts(parts: list[ExamplePart]) -> str:
    return f"{len(parts):,} part{'s' if len(parts) != 1 else ''}"


def _column(value: Any) -> tuple[tuple[int, ...], str]:
    """Shape and type of a value as columns of rows have them: numbers of 64 bits as half of that, which is what tasks compute with."""
    if isinstance(value, (str, bytes)):
        return (), "string" if isinstance(value, str) else "binary"
    array = np.asarray(value)
    return array.shape, {"float64": "float32", "int64": "int32", "bool": "uint8"}.get(array.dtype.name, array.dtype.name)
