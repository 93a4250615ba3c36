"""Any task at work on new rows: rows of arrays through the task's own `examples`, `collate` and `predict`, without targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.columns import fixed_array
from perceiver.inference.rows import given_rows
from perceiver.tasks.base import Batch, Task, dummy_split


class Predictor:
    """Rows of arrays in, an array for each name of `Task.predict` out.

    Args:
        model: with its weights.
        task: that it was trained for.
        device: of the model.
        name: what messages call the model.

    Raises:
        UserError: the task reads no arrays.
    """

    def __init__(self, model: nn.Module, task: Task[Any, Any], device: torch.device, name: str) -> None:
        found = task.config.rows(task.model_config, task.data)
        if found is None:
            config = type(task.config).__name__
            raise UserError(f"{name} cannot predict: its task {type(task).__name__} reads no rows of arrays ({config}.rows gives none)")
        self.model, self.task, self.device, self.name, self.rows = model, task, device, name, found

    def predict(self, rows: Any, batch_size: int) -> dict[str, np.ndarray]:
        """See `perceiver.inference.trained.TrainedModel.predict`."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size} and must be at least 1")
        table = self.table(rows)
        if not table.num_rows:
            return {name: values[:0] for name, values in self.example.items()}
        batches = [self.batch(table.slice(first, batch_size), first) for first in range(0, table.num_rows, batch_size)]
        joined = {}
        for name, first in batches[0].items():
            shapes = {batch[name].shape[1:] if name in batch else None for batch in batches}
            if shapes != {first.shape[1:]}:
                raise UserError(f"{self._method('predict')} gives {name} in different shapes: {', '.join(map(str, shapes))}")
            joined[name] = np.concatenate([batch[name] for batch in batches])
        return joined

    def embed(self, rows: Any, pool: bool, batch_size: int) -> np.ndarray:
        """The latents that the model's encoder makes of rows while the task predicts: see `TrainedModel.embed`."""
        encoder = getattr(self.model, "encoder", None)
        if encoder is None:
            raise UserError(f"{self.name} cannot embed: its model, a {type(self.model).__name__}, has no encoder")
        latents: list[Tensor] = []
        hook = encoder.register_forward_hook(lambda module, given, found: latents.append(found.mean(1) if pool else found))
        try:
            self.predict(rows, batch_size)
        finally:
            hook.remove()
        return torch.cat(latents).float().cpu().numpy()

    @cached_property
    def example(self) -> dict[str, np.ndarray]:
        """What the task says of one row of zeros: it tells the names, types and shapes of all its predictions."""
        zeros = self.rows.zeros(1)
        texts = [name for name, column in self.rows.columns.items() if not column.is_number and name not in self.rows.may_miss]
        try:
            return self.batch(zeros, 0)
        except UserError:
            if not texts or len(texts) == len(self.rows.columns):
                raise
            return self.batch(zeros.drop_columns(texts), 0)  # an empty text is none of the classes to predict

    def table(self, given: Any) -> pa.Table:
        """Rows in any form as a table of those of the task's columns that all of them have.

        Raises:
            UserError: there are none, or a value does not fit its column.
        """
        if isinstance(given, pa.Table):
            there = [name for name in given.column_names if name in self.rows.columns]
            given = [dict(zip(there, values, strict=True)) for values in zip(*(_values(given[name]) for name in there), strict=True)]
        elif isinstance(given, Mapping):
            there = [name for name in given if name in self.rows.columns]
            lengths = {name: len(given[name]) for name in there}
            if len(set(lengths.values())) > 1:
                raise UserError(f"the arrays have different numbers of rows: {', '.join(f'{n} {count}' for n, count in lengths.items())}")
            given = [{name: given[name][number] for name in there} for number in range(next(iter(lengths.values()), 0))]
            if not there:
                raise UserError(f"{self.name} needs rows with {', '.join(self.rows.columns)}, and there is none of these")
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise UserError(f"rows must be a pyarrow table, a list of mappings or a mapping of arrays, not {type(given).__name__}")
        if not given:
            return self.rows.zeros(0)
        if wrong := next((row for row in given if not isinstance(row, Mapping)), None):
            raise UserError(f"a row is a {type(wrong).__name__} and must be a mapping with {', '.join(self.rows.columns)}")
        given = [self.rows.filled(row) for row in given]
        names = [name for name in self.rows.columns if all(row.get(name) is not None for row in given)]
        if not names:
            raise UserError(f"{self.name} needs rows with {', '.join(self.rows.columns)}, and there is none that all rows have")
        return given_rows(self.rows, names, given, "rows")

    @torch.no_grad()
    def batch(self, table: pa.Table, first: int) -> dict[str, np.ndarray]:
        """What the task says of a few rows, computed at once.

        Args:
            table: of columns as the task's rows have them.
            first: number of the first row.
        """
        size, split = table.num_rows, replace(dummy_split(self.rows, table.num_rows), name="val")
        with self._missing_columns(table):
            examples = self.task.examples(table, split, first, 0, False)
            if examples.num_rows != size:
                raise UserError(f"{self._method('examples')} makes {examples.num_rows} examples of {size} rows: predictions are one a row")
            numbers = pa.array(np.arange(first, first + size))
            examples = examples.append_column("row", numbers).append_column("epoch", pa.array(np.zeros(size, np.int64)))
            batch = self.task.collate(examples, size, split, False, 0)
            found = self.task.predict(self.model, self._here(batch))
        return {name: self._array(name, values, size) for name, values in self._mapping(found).items()}

    def _here(self, batch: Batch) -> Batch:
        """A batch on the model's device, its floating-point numbers in the type of the model."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        return {name: t.to(self.device, dtype if t.is_floating_point() else t.dtype) for name, t in batch.items()}

    def _mapping(self, found: Any) -> Mapping[str, Any]:
        if not isinstance(found, Mapping) or not found:
            raise UserError(f"{self._method('predict')} gives a {type(found).__name__} and must give a dict of tensors, one at least")
        return found

    def _array(self, name: str, values: Any, size: int) -> np.ndarray:
        if not isinstance(values, Tensor) or values.ndim < 1 or len(values) != size:
            what = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise UserError(
                f"{self._method('predict')} gives {name} as {what}, and its first dimension must be the size of the batch, {size}"
            )
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        return values.cpu().numpy()

    def _method(self, name: str) -> str:
        return f"{type(self.task).__name__}.{name}"

    @contextmanager
    def _missing_columns(self, table: pa.Table) -> Iterator[None]:
        """A column that the task looks for and that the rows lack is named."""
        try:
            yield
        except KeyError as error:
            missing = [name for name in self.rows.columns if name not in table.column_names and name in str(error)]
            if not missing:
                raise
            raise UserError(f"the rows have no {missing[0]}, which {type(self.task).__name__} needs to predict") from None


def _values(column: pa.ChunkedArray) -> Sequence[Any]:
    """The values of a table's column: arrays where they are fixed lists of numbers."""
    whole = pa.types.is_fixed_size_list(column.type) and not any(chunk.null_count or chunk.values.null_count for chunk in column.chunks)
    if whole and pa.types.is_primitive(column.type.value_type):
        return list(fixed_array(pa.table({"values": column}), "values"))
    return column.to_pylist()
