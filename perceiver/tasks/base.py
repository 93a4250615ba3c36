"""What a task is: one file that says how rows become batches, what the model computes from them, and what is measured.

To add a task is to add a file with a subclass of `Task`, its configuration dataclass in `perceiver/config.py`, and a preset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import Experiment
from perceiver.costs.activations import StepSizes
from perceiver.data.shards import Manifest, Split

Batch = dict[str, Tensor]

IGNORE_INDEX = -100
"""Label of positions and rows that carry no target (cross_entropy's default)."""


@dataclass(frozen=True)
class Sample:
    """Something validation shows to a person, at the end of a pass: a text, or a picture (height, width, 3; uint8)."""

    name: str
    text: str | None = None
    image: np.ndarray | None = None


class Task(ABC):
    """A task of one experiment. Knows nothing of devices, ranks and optimizers."""

    kind: ClassVar[Literal["images", "tokens", "documents"]]
    """What prepared rows the task reads (see perceiver/data/shards.py)."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model, on the current default device (also "meta"), weights uninitialised there."""

    def examples(self, block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
        """Turns one block as stored into its examples, one a row. Runs in data tasks, in parallel.

        Args:
            block: the physical rows of the block, with `split.lookahead` rows of the next block at the end.
            split: the data set's split that the block belongs to.
            first_row: number of the block's first row in the split.
            epoch: the pass over the data; random choices may depend on (seed, epoch, row) alone.
            train: whether the examples are for training (random choices) or for validation (none).
        """
        return block.slice(0, block.num_rows - split.lookahead)

    def arrange(self, rows: pa.Table) -> pa.Table:
        """A worker's rows of one step in the order in which they are cut into micro-batches. Any order gives the same step."""
        return rows

    @abstractmethod
    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """Makes a batch of exactly `size` examples, all tensors with first dimension `size`.

        `rows` has the columns of `examples` and, besides, "row" (int64, its number in the split) and "epoch" (int64).
        It holds between 0 and `size` rows; the examples missing at its end are padding that carries no target: their
        "labels" are IGNORE_INDEX. (So shapes are the same for all batches, and a last, partial batch counts right.)
        In a mixture the rows come from several data sets: what depends on one's size is told by `examples`, not by `split`.

        `step` counts optimizer steps over all epochs: what all examples of a step share, on all workers, may depend on
        (seed, step).
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum (not mean) of the loss over the batch's valid targets, and sums of what `metrics` needs.

        The sums are tensors without gradient, to be added up over batches and ranks. "targets" and "loss" are added by
        the caller and need not be among them. In training they are `loss_of_sources` alone.
        """

    def num_targets(self, batch: Batch) -> Tensor:
        """The number of valid targets of a batch: a scalar int64 tensor."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Metrics of a whole pass from its sums ("targets" and "loss" among them), without the prefix "val_"."""
        return {"loss": float(sums["loss"] / max(sums["targets"], 1))}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        """What to show a person after a validation. Called on all ranks together (the model may be sharded)."""
        return []

    def check(self) -> None:
        """Checks what the configuration alone tells about the task; the model's own checks are elsewhere.

        Raises:
            UserError: settings of the task that do not fit its model.
        """

    def baselines(self, split: Split, manifest: Manifest) -> list[str]:
        """Lines that say what a model that learned nothing would reach on the validation split."""
        return []

    def unit(self) -> tuple[str, int]:
        """What throughput is counted in and how many of it an example holds, e.g. ("tokens", 4096)."""
        return "examples", 1

    def step_sizes(self) -> StepSizes:
        """What of an example the model computes at once at most, where that is not all: for the memory of a step."""
        return StepSizes()

    @abstractmethod
    def flops_per_example(self) -> float:
        """FLOPs of one training step per example: forward and backward, by count of the model's configuration."""


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


def padded(values: np.ndarray, size: int, fill: float = 0) -> Tensor:
    """(n, ...) as a tensor (size, ...), the missing rows filled with `fill`. Copies, so that the result can be written."""
    result = np.full((size, *values.shape[1:]), fill, dtype=values.dtype)
    result[: len(values)] = values
    return torch.from_numpy(result)
