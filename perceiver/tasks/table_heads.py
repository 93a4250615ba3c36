"""Several targets of a table at once: a head for each column, of any kind, on a shared encoder, their losses weighted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.manifest import Split
from perceiver.data.rows import ArrayRows
from perceiver.data.table_schema import TableSchema
from perceiver.models import HeadsOutput, PerceiverIOConfig, TableInput
from perceiver.tasks.base import EACH, IGNORE_INDEX, Batch, Sample, Task, loss_of_sources, of_examples, padded
from perceiver.tasks.table_classes import TableClassification, with_classes
from perceiver.tasks.table_columns import with_columns
from perceiver.tasks.table_labels import TableLabels
from perceiver.tasks.table_measure import measured
from perceiver.tasks.table_numbers import TableRegression
from perceiver.tasks.table_positions import TablePositions
from perceiver.tasks.table_task import TableSettings, model_input

LOSSES = ("classes", "positions", "labels", "mse", "mae", "huber", "gaussian", "quantiles")
_KINDS: dict[str, Any] = {"classes": TableClassification, "positions": TablePositions, "labels": TableLabels}
_PARTS = (TableClassification, TablePositions, TableLabels, TableRegression)


class TableHead(TableSettings):
    """One target of several, as `tables` has it."""

    name: str = ""
    """Its column, which is the name of its head and the beginning of its metrics' names."""
    weight: float = 1.0
    """Weight of its loss."""

    @classmethod
    def parse(cls, text: str) -> TableHead:
        """COLUMN, COLUMN=LOSS or COLUMN=LOSS*WEIGHT.

        Raises:
            UserError: anything else.
        """
        name, equals, rest = text.rpartition("=")
        loss, star, weight = rest.partition("*")
        if not equals:
            name, loss, star = text, "auto", ""
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            number = 0.0
        if not name or "." in name or loss not in ("auto", *LOSSES) or not 0 < number < float("inf"):
            raise UserError(
                f"task.heads has {text!r}, and each must be COLUMN, COLUMN=LOSS or COLUMN=LOSS*WEIGHT with one of {', '.join(LOSSES)} and "
                "a weight above 0, such as mass=mse*0.5; a column's name has no dot"
            )
        chosen: Any = loss
        return cls(targets=(name,), name=name, loss=chosen, weight=number)

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        return _KINDS.get(self.loss, TableRegression)(self, model, data, seed)


class TableHeadsConfig(TaskConfig):
    """Several columns of a table, each with a head and a loss of its own."""

    measured = ("parts",)

    heads: tuple[str, ...] = ()
    """Columns to predict, each as COLUMN, COLUMN=LOSS or COLUMN=LOSS*WEIGHT (species=classes mass=mse*0.5): the losses are those of the
    task tables; without one, classes for texts and whole numbers, else mse."""
    parts: tuple[TableHead, ...] = ()
    """Settings of each head, as found in the data, set by the training."""

    def parsed(self) -> list[TableHead]:
        """What `heads` says.

        Raises:
            UserError: it says something else, or a column twice.
        """
        found = [TableHead.parse(text) for word in self.heads for text in word.split(",") if text]
        names = [head.name for head in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"task.heads names {twice[0]!r} twice")
        return found

    def check(self, where: str) -> None:
        self.parsed()

    def completed(self, experiment: Experiment) -> Experiment:
        model = experiment.model
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TableInput) or model.input.shapes:
            return experiment
        if not experiment.data.source:
            raise UserError("data.source is empty: name your table, --data.source FILE.parquet")
        schema, heads = TableSchema(experiment.data), self.parsed()
        if not heads:
            there = ", ".join(schema.types)
            raise UserError(f"task.heads is empty: name the columns to predict, --task.heads A=classes B=mse ({schema.name} has: {there})")
        for head in heads:
            schema.check(head.name, "--task.heads")
        names = {head.name for head in heads}
        table = with_columns(model.input, schema, names, experiment.data, "--task.heads")
        channels = getattr(model.output, "num_query_channels", 64)
        found = [replace(head, loss=head.loss_for(schema, head.targets)).with_targets(schema) for head in heads]
        output = HeadsOutput(names=tuple(head.name for head in heads), heads=tuple(part.output(number, channels) for part, number in found))
        made = replace(model, input=table, output=output)
        return replace(experiment, task=replace(self, parts=tuple(part for part, _ in found)), model=made)

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        columns: dict[str, Any] = {}
        gaps: set[str] = set()
        for rows in (part.rows(model, data) for part in self.parts):
            columns |= {name: (c.shape, c.dtype) for name, c in rows.columns.items()}
            gaps |= rows.may_miss
        if not columns:
            raise UserError("task.heads is empty: name the columns to predict, --task.heads A=classes B=mse")
        return ArrayRows(**columns).missing(gaps)

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        output = _output(model)
        numbers = [part.num_measured(head) for part, head in zip(self.parts, output.heads, strict=True)]
        return replace(self, parts=tuple(measured(self.parts, numbers, model, self.rows(model, DataConfig()), blocks)))

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        output = _output(model)
        if not self.parts or output.names != tuple(part.name for part in self.parts):
            raise UserError("task.heads and model.output.names must be the same columns, which a command line finds in the data")
        assert isinstance(model, PerceiverIOConfig)
        return TableHeads(self, model, data, seed)


def _output(model: ModelConfig) -> HeadsOutput:
    """The output of a model with several heads.

    Raises:
        UserError: it has none.
    """
    found = model.output if isinstance(model, PerceiverIOConfig) and isinstance(model.input, TableInput) else None
    if not isinstance(found, HeadsOutput):
        raise UserError("table heads need a Perceiver IO model with a TableInput and a HeadsOutput")
    return found


class TableHeads(Task[TableHeadsConfig, PerceiverIOConfig]):
    """A row's loss is the weighted sum of its heads'; each head's metrics bear its column's name before their own."""

    def __init__(self, config: TableHeadsConfig, model: PerceiverIOConfig, data: DataConfig, seed: int) -> None:
        super().__init__(config, model, data, seed)
        outputs = dict(zip(_output(model).names, _output(model).heads, strict=True))
        self.parts: dict[str, Task[Any, Any]] = {
            part.name: part.build(replace(model, output=outputs[part.name]), data, seed) for part in config.parts
        }
        directions: dict[str, Literal["min", "max"]] = {"loss": "min"}
        for name, task in self.parts.items():
            directions |= {f"{name}_{metric}": direction for metric, direction in task.metric_directions.items()}
        vars(self)["metric_directions"] = directions
        self.baseline_metrics = {
            f"{name}_{metric}": (f"{name}_{of}", means)
            for name, task in self.parts.items()
            for metric, (of, means) in task.baseline_metrics.items()
        }

    @classmethod
    def higher_is_better(cls, metric: str) -> bool:
        """Of COLUMN_METRIC as of METRIC."""
        return any(kind.higher_is_better(metric.partition("/")[0].rpartition("_")[2]) for kind in _PARTS)

    def check(self) -> None:
        for task in self.parts.values():
            task.check()

    def dummy_rows(self, size: int) -> pa.Table:
        return with_classes(super().dummy_rows(size), self.config.parts)

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """The inputs, "valid", and what each head needs besides, as COLUMN.NAME; nothing of heads whose column the rows lack."""
        batch: Batch = {"valid": padded(np.ones(rows.num_rows, bool), size)}
        for name, task in self.parts.items():
            for key, values in task.collate(rows, size, split, train, step).items():
                batch[key if key in ("inputs", "input_ids") else f"{name}.{key}"] = values
        return batch

    def num_targets(self, batch: Batch) -> Tensor:
        return batch["valid"].sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sums of the heads' losses; a head whose target is missing in a row adds nothing of it."""
        said, valid = model(model_input(batch)), batch["valid"]
        total, each = torch.zeros((), device=valid.device), torch.zeros(len(valid), dtype=torch.float64, device=valid.device)
        sums: dict[str, Tensor] = {}
        for part, (name, task) in zip(self.config.parts, self.parts.items(), strict=True):
            own = _own(batch, name)
            loss, found = task.loss(_saying(said[name]), own)
            total = total + part.weight * loss
            if torch.is_grad_enabled():
                if "source_loss" in found:
                    sums["source_loss"] = sums.get("source_loss", 0) + part.weight * found["source_loss"]
                continue
            each = each + part.weight * found[f"{EACH}loss"]
            sums |= {f"{name}.{key}": value for key, value in found.items() if not key.startswith(EACH)}
            sums |= {f"{name}.loss": loss.detach().double(), f"{name}.targets": task.num_targets(own)}
        if not torch.is_grad_enabled():
            return total, sums | of_examples(each, valid)
        if "sources" in batch:
            labels = torch.where(valid, 0, IGNORE_INDEX)
            sums["source_targets"] = loss_of_sources(each, {**batch, "labels": labels})["source_targets"]
        return total, sums

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        found = super().metrics(sums, split)
        for name, task in self.parts.items():
            found |= {f"{name}_{metric}": value for metric, value in task.metrics(_own(sums, name), split).items()}
        return found

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        found = []
        for name, task in self.parts.items():
            found += [replace(sample, name=f"{name}_{sample.name}") for sample in task.samples(model, _own(sums, name), split)]
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What each head says, as COLUMN_NAME."""
        said = model(model_input(batch))
        found: dict[str, Tensor] = {}
        for name, task in self.parts.items():
            own = task.predict(_saying(said[name]), _own(batch, name))
            found |= {f"{name}_{key}": values for key, values in own.items()}
        return found

    def prediction_names(self) -> dict[str, tuple[str, ...]]:
        return {f"{name}_{key}": names for name, task in self.parts.items() for key, names in task.prediction_names().items()}


def _own(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What belongs to a head, and what belongs to no head."""
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in values.items() if "." not in key} | own


def _saying(answer: Tensor) -> nn.Module:
    """A model that gives this answer, whatever it is asked."""
    return cast(nn.Module, lambda inputs: answer)
