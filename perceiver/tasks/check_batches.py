"""Whether rows become examples and batches as the contract says: tried on two rows, as part of `check_task`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from perceiver.config import UserError
from perceiver.data.row_kind import KINDS
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, dummy_split
from perceiver.tasks.check_calls import call, name_of, shape_of

RANDOM = "random choices must be functions of (self.seed, epoch, row), see perceiver.data.order.uniforms"
PAIRS = 8
"""Pairs of random rows that are looked through for one with a target."""


def names_columns(task: Task[Any, Any]) -> bool:
    """Whether the task reads arrays, of which random ones can be made."""
    kind = KINDS.get(task.config.kind)
    return kind is not None and kind.has_columns


def rows_with_targets(task: Task[Any, Any]) -> pa.Table:
    """Two random rows of which at least one has a target.

    Raises:
        UserError: none of several pairs has.
    """
    pairs = [_random_rows(task, seed) for seed in range(PAIRS)]
    for rows in pairs:
        try:
            decoded = call(task, "decode", rows, split_of(task, 2), True)
            if not isinstance(decoded, pa.Table) or targets_of(task, batch_of(task, decoded, 2)):
                return rows
        except UserError:  # which is found again, in the order of the contract
            return rows
    batch = batch_of(task, decoded, 2)
    why = f'all of its "labels", {shape_of(batch["labels"])}, are {IGNORE_INDEX}' if "labels" in batch else "num_targets gives 0"
    raise UserError(f"{name_of(task)} counts no target in any of {2 * PAIRS} random rows, so there is nothing to learn: {why}")


def _random_rows(task: Task[Any, Any], seed: int = 0) -> pa.Table:
    """Two rows of small random numbers: what a task is tried on where there is no data."""
    rng = np.random.default_rng(seed)
    columns = task.rows.columns
    empty: dict[str, Any] = {"string": "text", "binary": b"bytes"}
    examples = [
        {
            name: (rng.random(column.shape) * (1 if np.dtype(column.dtype).kind == "f" else 2)).astype(column.dtype)
            if column.is_number
            else empty[column.dtype]
            for name, column in columns.items()
        }
        for _ in range(2)
    ]
    table = task.rows.table(examples, "random rows")
    return table.append_column("row", pa.array([0, 1], pa.int64())).append_column("epoch", pa.array([0, 0], pa.int64()))


def check_examples(task: Task[Any, Any], block: pa.Table) -> None:
    """One block as it is stored, whose rows are made examples twice."""
    once, again = (call(task, "examples", block, split_of(task, block.num_rows), 0, 0, True) for _ in range(2))
    if not isinstance(once, pa.Table) or once.num_rows != block.num_rows:
        found = f"{once.num_rows} rows" if isinstance(once, pa.Table) else shape_of(once)
        raise UserError(f"{name_of(task)}.examples of {block.num_rows} rows returned {found} and must return a pyarrow.Table with as many")
    if not once.equals(again):
        raise UserError(f"{name_of(task)}.examples gave other rows the second time: {RANDOM}")


def check_rows(task: Task[Any, Any], rows: pa.Table) -> pa.Table:
    """The rows as `collate` gets them, with `decode` and `arrange`."""
    split = split_of(task, rows.num_rows)
    if split is None:
        return rows
    for train in (True, False):
        decoded = call(task, "decode", rows, split, train)
        if not isinstance(decoded, pa.Table) or decoded.num_rows != rows.num_rows:
            found = f"{decoded.num_rows} rows" if isinstance(decoded, pa.Table) else shape_of(decoded)
            raise UserError(f"{name_of(task)}.decode of {rows.num_rows} rows returned {found} and must return a pyarrow.Table with as many")
        if not decoded.equals(call(task, "decode", rows, split, train)):
            raise UserError(f"{name_of(task)}.decode gave other rows the second time: {RANDOM}")
    arranged = call(task, "arrange", decoded)
    if not isinstance(arranged, pa.Table) or sorted(arranged["row"].to_pylist()) != sorted(decoded["row"].to_pylist()):
        raise UserError(f"{name_of(task)}.arrange must return the same rows in any order, as a pyarrow.Table")
    return decoded


def check_batches(task: Task[Any, Any], rows: pa.Table) -> Batch:
    """Three examples of which the last is padding."""
    batch = batch_of(task, rows, 3)
    for train in (True, False):
        once, again = (batch_of(task, rows, 3, train) for _ in range(2))
        for name, tensor in once.items():
            if not _same(tensor, again[name]):
                raise UserError(f"{name_of(task)}.collate gave another {name!r} for the same rows: {RANDOM}")
    swapped = batch_of(task, rows.take([1, 0]), 2)
    for name, tensor in swapped.items():
        if tensor.shape[1:] == batch[name].shape[1:] and not _same(tensor[[1, 0]], batch[name][:2]):
            raise UserError(f"{name_of(task)}.collate makes {name!r} of a row depend on the other rows of its batch")
    padded, whole = targets_of(task, batch), targets_of(task, batch_of(task, rows, 2))
    if padded != whole:
        rule = f'its "labels" must be {IGNORE_INDEX}' if "labels" in batch else 'num_targets must leave it out (see "valid")'
        raise UserError(f"{name_of(task)} counts {padded - whole} targets in an example of padding, which must have none: {rule}")
    try:
        batch_of(task, rows.slice(0, 0), 2)
    except UserError as error:
        raise UserError(f"{error}, for a batch without rows, which a worker may have at the end of an epoch") from error
    return batch


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN, which may stand for a missing one, is the same as NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def batch_of(task: Task[Any, Any], rows: pa.Table, size: int, train: bool = False) -> Batch:
    """A batch of the first step."""
    batch = call(task, "collate", rows, size, split_of(task, size), train, 0)
    if not isinstance(batch, dict) or not batch or not all(isinstance(value, Tensor) for value in batch.values()):
        kinds = {name: name_of(value) for name, value in batch.items()} if isinstance(batch, dict) else name_of(batch)
        raise UserError(f"{name_of(task)}.collate returned {kinds} and must return a dictionary of tensors")
    wrong = {name: tuple(tensor.shape) for name, tensor in batch.items() if tensor.dim() == 0 or len(tensor) != size}
    if wrong:
        raise UserError(f"{name_of(task)}.collate of {size} examples returned {wrong}: the first dimension must be {size}")
    return batch


def split_of(task: Task[Any, Any], size: int) -> Any:
    """A split of this number of rows; None of a task whose rows are none of arrays."""
    return dummy_split(task.rows, size) if names_columns(task) else None


def targets_of(task: Task[Any, Any], batch: Batch) -> int:
    """The number of a batch's targets."""
    targets = call(task, "num_targets", batch)
    if not isinstance(targets, Tensor) or targets.dim() or targets.is_floating_point():
        raise UserError(f"{name_of(task)}.num_targets returned {shape_of(targets)} and must return a whole number as a tensor of shape ()")
    return int(targets)
