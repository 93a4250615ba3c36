"""Learning from tables: classes, several labels or numbers from columns of numbers, which the command line names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.labels import MOST_CLASSES
from perceiver.data.table_schema import TableSchema
from perceiver.models import ClassOutput, PerceiverIOConfig, TableInput, ValueOutput
from perceiver.models.table_input import text_of
from perceiver.tasks.base import Task
from perceiver.tasks.moments import Moments
from perceiver.tasks.table_classes import TableClassification, class_numbers
from perceiver.tasks.table_labels import TableLabels
from perceiver.tasks.table_numbers import TableRegression
from perceiver.tasks.table_task import TableSettings, flat, input_of


class TablesConfig(TableSettings):
    """Classes, labels or numbers from the columns of a table."""

    def completed(self, experiment: Experiment) -> Experiment:
        model = experiment.model
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TableInput) or model.input.shapes:
            return experiment
        if not experiment.data.source:
            raise UserError("data.source is empty: name your table, --data.source FILE.parquet")
        schema = TableSchema(experiment.data)
        targets = _names(self.targets)
        if not targets:
            raise UserError(
                f"task.targets is empty: name the columns to predict, --task.targets NAME ({schema.name} has: {_list(schema.types)})"
            )
        for name in targets:
            schema.check(name, "--task.targets")
        columns = _names(model.input.columns) or tuple(name for name in schema.types if name not in targets and schema.is_numeric(name))
        if not columns:
            raise UserError(f"{schema.name} has no column of numbers beside the targets: model.input.columns needs one")
        if both := sorted(set(columns) & set(targets)):
            raise UserError(f"--model.input.columns and --task.targets both name {both[0]!r}: what is predicted cannot go in")
        shapes = tuple(text_of(schema.shape(name, "--model.input.columns")) for name in columns)
        task = replace(self, targets=targets, loss=self._loss(schema, targets))
        task, num_outputs = task._with_targets(schema)
        channels = getattr(model.output, "num_query_channels", None)
        kind: Any = ClassOutput if task.loss == "classes" else ValueOutput
        number = {"num_classes" if task.loss == "classes" else "num_values": num_outputs}
        output = kind(**number) if channels is None else kind(**number, num_query_channels=channels)
        made = replace(model, input=replace(model.input, columns=columns, shapes=shapes), output=output)
        return replace(experiment, task=task, model=made)

    def _loss(self, schema: TableSchema, targets: tuple[str, ...]) -> Any:
        if self.loss != "auto":
            return self.loss
        first = targets[0]
        return "classes" if len(targets) == 1 and (schema.is_text(first) or schema.is_whole(first)) else "mse"

    def _with_targets(self, schema: TableSchema) -> tuple[TablesConfig, int]:
        """With the targets' shapes and classes, and the number of outputs."""
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
            raise UserError(f"--task.targets names {name!r}, which holds lists: task.loss classes takes one class a row")
        values = schema.distinct(name)
        if not values or min(values) < 0 or max(values) >= MOST_CLASSES or any(value != int(value) for value in values):
            found = f"{min(values):g} .. {max(values):g}" if values else "nothing"
            raise UserError(
                f"--task.targets names {name!r} with {found}, and classes are whole numbers from 0 to {MOST_CLASSES - 1:,}: for a quantity "
                "give --task.loss mse"
            )
        return replace(self, target_shapes=(text_of(()),)), int(max(values)) + 1

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        table = input_of(model)
        rows = self.rows(model, DataConfig())
        inputs = [Moments(channels) for _, channels in table.sizes()]
        targets = Moments(_num_classes(model) if self.loss == "classes" else self.num_targets)
        for block in blocks:
            arrays = rows.arrays(block)
            for name, moments in zip(table.columns, inputs, strict=True):
                moments.add(arrays[name].reshape(-1, moments.size))
            if self.loss == "classes":
                targets.add(np.eye(targets.size)[class_numbers(self, block)])
            else:
                targets.add(flat(arrays, self.targets, block.num_rows))
        task: Any = self.counted(targets.mean) if self.loss == "classes" else self
        return replace(
            task,
            input_mean=tuple(value for moments in inputs for value in moments.mean.tolist()),
            input_scale=tuple(value for moments in inputs for value in moments.scale.tolist()),
            target_mean=tuple(targets.mean.tolist()),
            target_scale=tuple(targets.scale.tolist()),
        )

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TableInput):
            raise UserError("tables need a Perceiver IO model whose input is a TableInput")
        if not model.input.columns or not self.targets:
            raise UserError("tables need columns to read and to predict: --model.input.columns and --task.targets")
        kinds: dict[str, Any] = {"classes": TableClassification, "labels": TableLabels}
        return kinds.get(self.loss, TableRegression)(self, model, data, seed)


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of columns, given as words or separated by commas."""
    return tuple(name for word in given for name in word.split(",") if name)


def _list(names: Any) -> str:
    return ", ".join(names)


def _num_classes(model: ModelConfig) -> int:
    output = getattr(model, "output", None)
    assert isinstance(output, ClassOutput)
    return output.num_classes
