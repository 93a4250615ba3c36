"""What a task is: one file that says how rows become batches, what the model computes from them, and what is measured.

To add a task is to add a file with a `TaskConfig` and its `Task`, here or outside of the package (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.config.optimization import raw_metric
from perceiver.costs.activations import StepSizes
from perceiver.costs.count import CountedStep
from perceiver.costs.memory import FormulaStep, Step, has_formulas
from perceiver.data.components import Component, weighted
from perceiver.data.manifest import Manifest, Split
from perceiver.data.reader import as_stored
from perceiver.data.rows import ArrayRows
from perceiver.models import build_model
from perceiver.tasks.baselines import Baseline, Guess, beside

Batch = dict[str, Tensor]
C = TypeVar("C", bound=TaskConfig)
M = TypeVar("M", bound=ModelConfig)

IGNORE_INDEX = -100
"""Label of positions and rows that carry no target (cross_entropy's default)."""

EACH = "each_"
"""Begins the names of what `Task.loss` returns for each example of a batch, in validation."""


@dataclass(frozen=True)
class Sample:
    """Something validation shows to a person, at the end of a pass: a text, a picture (height, width, 3; uint8), or a file."""

    name: str
    text: str | None = None
    image: np.ndarray | None = None
    file: bytes | None = None
    """Content of a file of another kind, such as .mid."""
    suffix: str = ""
    """End of that file's name."""


class Task(ABC, Generic[C, M]):
    """A task: its settings, for one model and one kind of data. Knows nothing of devices, ranks and optimizers.

    Args:
        config: the task's own settings.
        model: of the model that it trains.
        data: of the data that it reads; its tokenizer, say.
        seed: of all random choices.
    """

    metric_directions: ClassVar[Mapping[str, Literal["min", "max"]]] = {"loss": "min"}
    """All that `metrics` returns, by name, and which values are better: low ("min") or high ("max")."""

    baseline_metrics: Mapping[str, tuple[str, str]] = {}
    """Of what is measured without training in the same pass, by the metric that it stands beside: its metric, and how it is reached."""

    def __init__(self, config: C, model: M, data: DataConfig, seed: int) -> None:
        self.config, self.model_config, self.data, self.seed = config, model, data, seed

    @classmethod
    def higher_is_better(cls, metric: str) -> bool:
        """Whether higher values of a metric are better. A name may have the prefix "val_" or "val_ema_", and a suffix "/SOURCE" in
        mixtures.
        """
        return cls.metric_directions.get(raw_metric(metric).removeprefix("val_").partition("/")[0]) == "max"

    def build_model(self) -> Any:
        """The model, on the current default device (also "meta"), weights uninitialised there."""
        return build_model(self.model_config)

    def examples(self, block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
        """Turns one block as stored into its examples, one a row. Runs in data tasks, in parallel.

        Args:
            block: the physical rows of the block, with `split.lookahead` rows of the next block at the end.
            split: the data set's split that the block belongs to.
            first_row: number of the block's first row in the split.
            epoch: the pass over the data; random choices may depend on (seed, epoch, row) alone.
            train: whether the examples are for training (random choices) or for validation (none).
        """
        return as_stored(block, split, first_row, epoch, train)

    def decode(self, rows: pa.Table, split: Split, train: bool) -> pa.Table:
        """Turns chosen examples into what `collate` takes: for work that is worth its time only for rows that are used. Runs in data
        tasks, in parallel.

        Args:
            rows: examples with "row" and "epoch", as of `collate`; also none.
            split: that they are of.
            train: random choices may be made, which depend on (seed, epoch, row) alone.
        """
        return rows

    def arrange(self, rows: pa.Table) -> pa.Table:
        """A worker's rows of one step in the order in which they are cut into micro-batches. Any order gives the same step."""
        return rows

    @property
    def rows(self) -> ArrayRows:
        """The columns of the task's rows, of one that reads arrays (`TaskConfig.rows`)."""
        found = self.config.rows(self.model_config, self.data)
        assert found is not None
        return found

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """Makes a batch of exactly `size` examples, all tensors with first dimension `size`.

        By default, of a task that reads arrays, each of its columns, `(size, *shape)`, as far as `rows` has it, and "valid" (size,) bool,
        which examples are no padding.

        `rows` has the columns of `examples` and, besides, "row" (int64, its number in the split) and "epoch" (int64).
        It holds between 0 and `size` rows; the examples missing at its end are padding that carries no target: their
        "labels" are IGNORE_INDEX. (So shapes are the same for all batches, and a last, partial batch counts right.)
        In a mixture the rows come from several data sets: what depends on the size of one comes from `examples`, not from `split`.

        `step` counts optimizer steps over all epochs: what all examples of a step share, on all workers, may depend on
        (seed, step).
        """
        batch = {name: padded(values, size) for name, values in self.rows.arrays(rows).items()}
        return {**batch, "valid": padded(np.ones(rows.num_rows, bool), size)}

    def examples_of(self, rows: pa.Table, size: int) -> np.ndarray | None:
        """Which of a validation batch's examples each of its parts belongs to, (B,) from 0 to size - 1, of a task whose batches may have
        several parts for an example (windows that overlap). None: one each.

        Args:
            rows, size: what `collate` was given.
        """
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum (not mean) of the loss over the batch's valid targets, and sums of what `metrics` needs.

        The sums are tensors without gradient, to be added up over batches and ranks. "targets" and "loss" are added by
        the caller and need not be among them. In training they are `loss_of_sources` alone. In validation `of_examples` may be
        among them, which is not summed.
        """

    def each(self, model: nn.Module, batch: Batch, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each example of a validation batch adds to the sums of a pass, (B,) by name: "loss" and "targets", and "acc", the number
        of its targets that are answered right, where answers are right or wrong. Two runs are compared by it, example by example.

        By default what `loss` returned beside its sums (`of_examples`); of a task that returns none, "loss" and "targets" by `loss` of
        one example after the other.

        Args:
            sums: what `loss` returned with this batch.
        """
        if found := {name.removeprefix(EACH): values for name, values in sums.items() if name.startswith(EACH)}:
            return found
        alone = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(len(next(iter(batch.values()))))]
        losses = [self.loss(model, example)[0].double() for example in alone]
        return {"loss": torch.stack(losses), "targets": torch.stack([self.num_targets(example) for example in alone])}

    def num_targets(self, batch: Batch) -> Tensor:
        """The number of valid targets of a batch: a scalar int64 tensor. By default that of its labels, else of its examples."""
        return (batch["labels"] != IGNORE_INDEX).sum() if "labels" in batch else batch["valid"].sum()

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What the model says of each example of a batch that may lack its targets, (size, ...) by name: for new data."""
        raise UserError(f"{type(self).__name__} has no method predict(model, batch), so its models cannot be applied to new data")

    def prediction_names(self) -> dict[str, tuple[str, ...]]:
        """Of predictions, by their names, what the numbers in their last dimension are of; or the classes that a whole number counts."""
        return {}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Metrics of a whole pass from its sums ("targets" and "loss" among them), without the prefix "val_"."""
        return {"loss": float(sums["loss"] / max(sums["targets"], 1))}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        """What to show a person after a validation. Called on all ranks together (the model may be sharded)."""
        return []

    class_column: str | None = None
    """Column of prepared rows that the class of a row follows from, of a task with classes; None: there is none."""

    def classes(self, rows: pa.Table) -> np.ndarray:
        """The class of each row, from the column `class_column`: int (n,)."""
        return rows[self.class_column].to_numpy()

    def details(self, sums: dict[str, np.ndarray]) -> list[str]:
        """Lines that say more than `metrics` of a whole pass, such as a table of classes."""
        return []

    def check(self) -> None:
        """Checks what the configuration alone tells about the task; the model's own checks are elsewhere.

        Raises:
            UserError: settings of the task that do not fit its model.
        """

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        """What guessing by the frequencies of the training data reaches on a validation split; None where that is not known.

        Args:
            manifest: of one data set, whose validation split is guessed.
            trained_on: of the data set whose training split is counted, usually the same.
        """
        return None

    def baselines(self, parts: list[Component], trained_on: Manifest | None = None) -> dict[str, Baseline]:
        """What a model that learned nothing but frequencies reaches in validation, by the names of metrics (val_...).

        Args:
            parts: the data sets that are validated on, as in `evaluate`: of a mixture there is a baseline for each and for all.
            trained_on: the data set that the model was trained on, where it is not that of each part.
        """
        guesses = [(part, self.guess(part.manifest, trained_on or part.manifest)) for part in parts]
        known = [(part, guess) for part, guess in guesses if guess is not None]
        found: dict[str, Baseline] = {}
        for part, guess in known:
            metrics = self.metrics(guess.sums, part.manifest.splits["val"])
            suffix = f"/{part.name}" if part.name else ""
            found |= {f"val_{name}{suffix}": Baseline(metrics[name], means) for name, means in guess.means.items()}
        if len(parts) == 1 or len(known) < len(parts):
            return found
        metrics = self.metrics(*weighted(parts, [guess.sums for _, guess in known]))
        for name, means in known[0][1].means.items():
            same = all(guess.means[name] == means for _, guess in known)
            found[f"val_{name}"] = Baseline(metrics[name], means if same else "guessing so in each data set")
        return found

    def measured_baselines(self, metrics: Mapping[str, float]) -> dict[str, Baseline]:
        """What `metrics` of a pass (val_...) has of `baseline_metrics`, by the names of the metrics that they stand beside."""
        return beside(metrics, self.baseline_metrics)

    def throughput_unit(self) -> tuple[str, int]:
        """What throughput is counted in and how many of it an example holds, e.g. ("tokens", 4096)."""
        return "examples", 1

    def targets_per_example(self) -> int | None:
        """How many of an example's units (`throughput_unit`) are predicted at most, where that is not all of them; else None."""
        return None

    def step_sizes(self) -> StepSizes:
        """What of an example the model computes at once at most, where that is not all: for the memory of a step."""
        return StepSizes()

    def flops_per_example(self) -> float:
        """FLOPs of one training step per example: forward and backward. Counted on the meta device where the task has no formula."""
        return self.counted_step.flops_per_example()

    def step(self) -> Step:
        """What a training step takes: by the closed formulas of this package's models, else counted."""
        return FormulaStep(self.model_config, self.step_sizes()) if has_formulas(self.model_config) else self.counted_step

    @cached_property
    def counted_step(self) -> CountedStep:
        """What a training step takes, counted on the meta device."""
        with torch.device("meta"):
            return self.count(self.build_model())

    def count(self, model: nn.Module) -> CountedStep:
        """What a training step of its model takes, of which parameters may be frozen: on the meta device, where it is counted."""
        with torch.device("meta"):
            return CountedStep(model, self.loss, {name: t.to("meta") for name, t in self.dummy_batch(2).items()})

    def dummy_rows(self, size: int) -> pa.Table:
        """Rows that `collate` takes, whose values are not looked at."""
        return self.rows.zeros(size)

    def dummy_batch(self, size: int) -> Batch:
        """A training batch of examples of the greatest size, to count with: values are not looked at. By default rows of zeros."""
        rows = self.dummy_rows(size)
        numbers = pa.array(np.arange(size))
        rows = rows.append_column("row", numbers).append_column("epoch", pa.array(np.zeros(size, np.int64)))
        return self.collate(rows, size, dummy_split(self.rows, size), True, 0)


def loss_of_sources(each: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Sums of the loss and of the valid targets of each data set of a mixture, as `Task.loss` returns sums in training.

    Args:
        each: what each label adds to the loss, (B, ...) as the labels.
        batch: of a mixture, with "sources", (B, data sets) bool: which one an example is from.

    Returns:
        "source_loss" and "source_targets": float64, (data sets,). Nothing where a batch has no "sources".
    """
    if "sources" not in batch:
        return {}
    sources, valid = batch["sources"].double(), batch["labels"] != IGNORE_INDEX
    sums = {"source_loss": each.detach(), "source_targets": valid}
    return {name: values.double().reshape(len(values), -1).sum(1) @ sources for name, values in sums.items()}


def of_examples(loss: Tensor, targets: Tensor, right: Tensor | None = None) -> dict[str, Tensor]:
    """What `Task.loss` returns beside its sums in validation, for `Task.each`: sums over all but the first dimension.

    Args:
        loss: what each target adds to the loss, (B, ...).
        targets: which of them are targets, (B, ...) bool.
        right: which of them are answered right, (B, ...) bool; None: answers are not right or wrong.
    """
    values = {"loss": loss, "targets": targets} | ({} if right is None else {"acc": right & targets})
    return {f"{EACH}{name}": value.detach().double().reshape(len(value), -1).sum(1) for name, value in values.items()}


def dummy_split(rows: ArrayRows, size: int) -> Split:
    """A split of `size` rows that lie nowhere."""
    return Split(
        name="train", kind=rows.kind, rows=size, tokens=0, bytes=size * rows.bytes_per_row, words=0, documents=size, row_length=0,
        rows_per_block=size, blocks_per_shard=1, lookahead=0, shards=(),
    )  # fmt: skip


def padded(values: np.ndarray, size: int, fill: float = 0) -> Tensor:
    """(n, ...) as a tensor (size, ...), the missing rows filled with `fill`. Copies, so that the result can be written."""
    result = np.full((size, *values.shape[1:]), fill, dtype=values.dtype)
    result[: len(values)] = values
    return torch.from_numpy(result)
