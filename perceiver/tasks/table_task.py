"""What the tasks on tables share: their settings, the input, normalised, and targets of which some may be missing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from perceiver.config import DataConfig, ModelConfig, UserError
from perceiver.data.labels import MOST_CLASSES
from perceiver.data.manifest import Split
from perceiver.data.rows import ArrayRows
from perceiver.data.table_schema import TableSchema
from perceiver.data.tokenizers import tokenizer_of
from perceiver.models import ArrayOutput, ClassOutput, OutputConfig, PerceiverIOConfig, TableInput, ValueOutput
from perceiver.models.table_input import Cells, shape_of, text_of
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, loss_of_sources, padded
from perceiver.tasks.class_settings import ClassSettings


class TableSettings(ClassSettings):
    """Classes, labels or numbers from the columns of a table."""

    measured = ("input_mean", "input_scale", "target_mean", "target_scale", *ClassSettings.measured)

    targets: tuple[str, ...] = ()
    """Columns to predict, separated by spaces or commas."""
    loss: Literal["auto", "classes", "positions", "labels", "mse", "mae", "huber", "gaussian", "quantiles"] = "auto"
    """classes: one of several classes; positions: a class for each number of one column of lists (negative: none); labels: each target is
    0 or 1, any number of them together; numbers: mse, mae, huber, gaussian
    (mean and deviation) or quantiles. auto: classes for one column of texts or whole numbers, else mse."""
    huber: float = 1.0
    """Of loss huber: the error, in standard deviations of the target, above which the loss grows linearly."""
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Of loss quantiles: which ones, ascending."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes: as found in a column of texts; None: their numbers."""
    target_shapes: tuple[str, ...] = ()
    """Shape of each target's value in a row, as model.input.shapes; None: as found in the data."""
    input_mean: tuple[float, ...] = ()
    """Mean of each channel of the input columns in the training split, set by the training."""
    input_scale: tuple[float, ...] = ()
    """Standard deviation of the same."""
    target_mean: tuple[float, ...] = ()
    """Mean of each target in the training split (of classes: each one's share), set by the training."""
    target_scale: tuple[float, ...] = ()
    """Standard deviation of the same."""

    def check(self, where: str) -> None:
        super().check(where)
        if self.class_weights and self.loss not in ("auto", "classes"):
            raise UserError(f"--{where}class-weights is given, but {where}loss is {self.loss}, which has no classes: leave it out")
        if not self.huber > 0:
            raise UserError(f"{where}huber is {self.huber} and must be above 0")
        ascending = all(low < high for low, high in zip(self.quantiles, self.quantiles[1:], strict=False))
        if not self.quantiles or not ascending or not 0 < self.quantiles[0] or not self.quantiles[-1] < 1:
            raise UserError(f"{where}quantiles is {' '.join(map(str, self.quantiles))} and must be ascending numbers between 0 and 1")

    @property
    def outputs_per_target(self) -> int:
        """Numbers that the model says of one number to predict."""
        return {"gaussian": 2, "quantiles": len(self.quantiles)}.get(self.loss, 1)

    @property
    def num_targets(self) -> int:
        """Numbers to predict in a row."""
        return sum(math.prod(shape_of(text)) for text in self.target_shapes)

    @property
    def number_names(self) -> tuple[str, ...]:
        """Names of the numbers to predict: those of their columns, of lists with each one's place."""
        found: list[str] = []
        for name, text in zip(self.targets, self.target_shapes, strict=True):
            size = math.prod(shape_of(text))
            found += [f"{name}_{place}" for place in range(size)] if size > 1 else [name]
        return tuple(found)

    def output(self, number: int, channels: int) -> OutputConfig:
        """The model's output, with this number of classes or numbers."""
        if self.loss == "positions":
            return ArrayOutput(num_outputs=number, num_queries=self.num_targets, num_query_channels=channels)
        if self.loss == "classes":
            return ClassOutput(num_classes=number, num_query_channels=channels)
        return ValueOutput(num_values=number, num_query_channels=channels)

    def num_measured(self, output: OutputConfig) -> int:
        """Of how many classes the shares, or of how many targets the moments, are measured in the training split."""
        match self.loss, output:
            case "classes", ClassOutput(num_classes=number):
                return number
            case "positions", ArrayOutput(num_outputs=number):
                return number
        return self.num_targets

    def loss_for(self, schema: TableSchema, targets: tuple[str, ...]) -> Any:
        """The loss of targets, where it is auto that which suits them."""
        if self.loss != "auto":
            return self.loss
        first = targets[0]
        return "classes" if len(targets) == 1 and (schema.is_text(first) or schema.is_whole(first)) else "mse"

    def with_targets(self, schema: TableSchema) -> tuple[Self, int]:
        """With the targets' shapes and classes, and the number of outputs."""
        if self.loss == "positions":
            return self._with_positions(schema)
        if self.loss != "classes":
            shapes = [schema.shape(name, "--task.targets") for name in self.targets]
            texts = tuple(text_of(shape) for shape in shapes)
            return replace(self, target_shapes=texts), sum(map(math.prod, shapes)) * self.outputs_per_target
        name = self.targets[0]
        if len(self.targets) > 1:
            raise UserError(
                f"--task.targets names {len(self.targets)} columns and task.loss is classes, which takes one: or labels, mse, ..."
            )
        if schema.is_text(name):
            classes = tuple(schema.distinct(name))
            return replace(self, target_shapes=(text_of(()),), class_names=classes), len(classes)
        if schema.shape(name, "--task.targets") != ():
            raise UserError(
                f"--task.targets names {name!r}, which holds lists: task.loss classes takes one class a row, positions one for each number "
                "of a list"
            )
        values = schema.distinct(name)
        if not values or min(values) < 0 or max(values) >= MOST_CLASSES or any(value != int(value) for value in values):
            found = f"{min(values):g} .. {max(values):g}" if values else "nothing"
            raise UserError(
                f"--task.targets names {name!r} with {found}, and classes are whole numbers from 0 to {MOST_CLASSES - 1:,}: for a quantity "
                "give --task.loss mse"
            )
        return replace(self, target_shapes=(text_of(()),)), int(max(values)) + 1

    def _with_positions(self, schema: TableSchema) -> tuple[Self, int]:
        name = self.targets[0]
        if len(self.targets) > 1:
            raise UserError(f"--task.targets names {len(self.targets)} columns and task.loss is positions, which takes one")
        shape, greatest = schema.shape(name, "--task.targets"), schema.greatest(name)
        if not shape or not schema.is_whole(name, in_lists=True) or not 0 <= greatest < MOST_CLASSES:
            raise UserError(
                f"--task.targets names {name!r} and task.loss is positions, which needs a column of lists of whole numbers up to "
                f"{MOST_CLASSES - 1:,}, not {schema.types[name]}{f' up to {greatest:g}' if shape else ''}"
            )
        return replace(self, target_shapes=(text_of(shape),)), int(greatest) + 1

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        table = input_of(model)
        columns: dict[str, tuple[tuple[int, ...], str]] = {
            name: (shape_of(text), "float32") if cells.kind == "numbers" else ((), "string")
            for name, text, cells in zip(table.columns, table.shapes, table.cells(), strict=True)
        }
        kind = "float32" if self.loss not in ("classes", "positions") else "string" if self.class_names else "int64"
        targets = {name: (shape_of(text), kind) for name, text in zip(self.targets, self.target_shapes, strict=True)}
        return ArrayRows(**columns, **targets).missing([*columns, *(targets if kind == "float32" else ())])


def input_of(model: ModelConfig) -> TableInput:
    """The model's input, which is a table's."""
    found = getattr(model, "input", None)
    assert isinstance(found, TableInput)
    return found


def model_input(batch: Batch) -> Any:
    """What the model takes of a batch: its numbers, where it has categories or texts with their ids."""
    ids = batch.get("input_ids")
    return batch["inputs"] if ids is None else {"numbers": batch["inputs"], "ids": ids}


def flat(arrays: dict[str, np.ndarray], names: tuple[str, ...], num_rows: int) -> np.ndarray:
    """Columns side by side, (rows, numbers of a row)."""
    return np.concatenate([arrays[name].reshape(num_rows, math.prod(arrays[name].shape[1:])) for name in names], axis=1)


class TableTask(Task[TableSettings, PerceiverIOConfig]):
    """What the tasks on tables share: the input, normalised."""

    def inputs(self, rows: pa.Table, size: int) -> Batch:
        """What goes in of rows, of which `model_input` makes what the model takes.

        "inputs" (size, numbers of a row): each channel of a column with the mean 0 and the deviation 1 that it has in the training split.
        Where there are categories or texts, "input_ids" (size, ids of a row) int64, as `TableAdapter` takes them.
        """
        arrays, table, config = self.rows.arrays(rows), input_of(self.model_config), self.config
        found, first = [np.empty((rows.num_rows, 0), np.float32)], 0
        for cells in table.numbers():
            values = arrays[cells.name].reshape(rows.num_rows, cells.positions, cells.channels).astype(np.float64)
            if config.input_mean:
                place = slice(first, first + cells.channels)
                values = (values - np.array(config.input_mean[place])) / np.array(config.input_scale[place])
            found.append(values.reshape(rows.num_rows, cells.positions * cells.channels).astype(np.float32))
            first += cells.channels
        batch = {"inputs": padded(np.concatenate(found, axis=1), size)}
        if ids := [self._ids(cells, rows[cells.name].to_pylist()) for cells in table.ids()]:
            batch["input_ids"] = padded(np.concatenate(ids, axis=1), size, -1)
        return batch

    def _ids(self, cells: Cells, values: list[str]) -> np.ndarray:
        """Numbers of categories (n, 1), or tokens of texts (n, positions) and -1 after them."""
        if cells.kind == "category":
            numbers = {name: number for number, name in enumerate(cells.values, 1)}
            return np.array([[numbers.get(value, 0)] for value in values], np.int64).reshape(-1, 1)
        ids, lengths = tokenizer_of(self.data).encode_batch(values)
        ends = np.cumsum(lengths)
        found = np.full((len(values), cells.positions), -1, np.int64)
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            taken = min(length, cells.positions)
            found[row, :taken] = ids[end - length : end - length + taken]
        return found


class NumberTargets(TableTask):
    """Targets that are numbers, each of which may be missing (NaN)."""

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """The inputs, and "targets" (size, numbers), NaN where there is none, unless the rows lack a column of them."""
        batch, names = self.inputs(rows, size), self.config.targets
        if all(name in rows.column_names for name in names):
            batch["targets"] = padded(flat(self.rows.arrays(rows), names, rows.num_rows), size, math.nan)
        return batch

    def num_targets(self, batch: Batch) -> Tensor:
        return (~batch["targets"].isnan()).sum()


def losses_of_sources(each: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The sums of a mixture's sources from losses (B, targets), of which some are of targets that are not there."""
    return loss_of_sources(each, {**batch, "labels": torch.where(given, 0, IGNORE_INDEX)})
