"""Learning from tables: classes, several labels or numbers from columns of numbers, which the command line names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.table_schema import TableSchema
from perceiver.models import PerceiverIOConfig, TableInput
from perceiver.models.table_input import text_of
from perceiver.tasks.base import Task
from perceiver.tasks.table_classes import TableClassification
from perceiver.tasks.table_labels import TableLabels
from perceiver.tasks.table_measure import measured
from perceiver.tasks.table_numbers import TableRegression
from perceiver.tasks.table_positions import TablePositions
from perceiver.tasks.table_task import TableSettings


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
        task = replace(self, targets=targets, loss=self.loss_for(schema, targets))
        task, num_outputs = task.with_targets(schema)
        output = task.output(num_outputs, getattr(model.output, "num_query_channels", 128))
        made = replace(model, input=replace(model.input, columns=columns, shapes=shapes), output=output)
        return replace(experiment, task=task, model=made)

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        assert isinstance(model, PerceiverIOConfig)
        return measured([self], [self.num_measured(model.output)], model, self.rows(model, DataConfig()), blocks)[0]

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TableInput):
            raise UserError("tables need a Perceiver IO model whose input is a TableInput")
        if not model.input.columns or not self.targets:
            raise UserError("tables need columns to read and to predict: --model.input.columns and --task.targets")
        kinds: dict[str, Any] = {"classes": TableClassification, "labels": TableLabels, "positions": TablePositions}
        return kinds.get(self.loss, TableRegression)(self, model, data, seed)


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of columns, given as words or separated by commas."""
    return tuple(name for word in given for name in word.split(",") if name)


def _list(names: Any) -> str:
    return ", ".join(names)
