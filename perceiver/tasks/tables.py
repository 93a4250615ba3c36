"""Learning from tables: classes, several labels or numbers from columns of numbers, categories and texts, which the command line names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.table_schema import TableSchema
from perceiver.models import PerceiverIOConfig, TableInput
from perceiver.tasks.base import Task
from perceiver.tasks.table_classes import TableClassification
from perceiver.tasks.table_columns import names_of, with_columns
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
        targets = names_of(self.targets)
        if not targets:
            raise UserError(
                f"task.targets is empty: name the columns to predict, --task.targets NAME ({schema.name} has: {_list(schema.types)})"
            )
        for name in targets:
            schema.check(name, "--task.targets")
        table = with_columns(model.input, schema, targets, experiment.data, "--task.targets")
        task = replace(self, targets=targets, loss=self.loss_for(schema, targets))
        task, num_outputs = task.with_targets(schema)
        output = task.output(num_outputs, getattr(model.output, "num_query_channels", 128))
        made = replace(model, input=table, output=output)
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


def _list(names: Any) -> str:
    return ", ".join(names)
