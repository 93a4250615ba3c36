"""The gradient noise scale (`run.noise-scale`): how large a batch is before a larger one hardly saves steps.

McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1: the squared norms of the gradients of a
large batch and of small ones give unbiased estimates of the squared norm of the true gradient, and of the trace of the covariance of
the gradients of single examples. Their ratio, each averaged over time, is the simple noise scale, in examples.

The large batch is the step's global batch. The small ones are its halves: every second example, by the place in the global batch, and the
others; the same examples, whatever the number of workers and micro-batches. With both halves the estimates are the inner product of their
gradients, and a multiple of the squared norm of their difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.training.parallel import World, reduce_gradients

if TYPE_CHECKING:
    from perceiver.tasks.base import Task
    from perceiver.training.batches import Batch

SCALE, GRADIENT, NOISE = "noise_scale", "noise_scale/gradient", "noise_scale/noise"
"""Metrics: the noise scale in examples, averaged; this step's estimates: squared norm of the gradient, trace of the covariance."""
DECAY = 0.9
"""Of the averages of both estimates, from one measured step to the next."""


class NoiseScale:
    """Measures steps whose global batch is full.

    Args:
        batch: examples of a global batch.
        first: place of this worker's first example in it.
        rows: examples of an epoch, whose last batch may not be full; None: all are.
        records: what was measured so far, as `Recorder` has it: the averages continue from there.
    """

    def __init__(self, batch: int, first: int, rows: int | None, records: Iterable[Mapping[str, Any]]) -> None:
        self.batch, self.first = batch, first
        self._rest, self._steps = (0, 1) if rows is None else (rows % batch, -(-rows // batch))
        self._averages = 0.0, 0.0
        for record in records:
            if record.get(GRADIENT) is not None and record.get(NOISE) is not None:
                self._average(record[GRADIENT], record[NOISE])

    def measures(self, step: int) -> bool:
        """Whether a step, counted from 1, has a full batch."""
        return not self._rest or step % self._steps != 0

    def estimates(self, task: Task[Any, Any], model: nn.Module, micro_batches: list[Batch], world: World) -> dict[str, Tensor]:
        """The squared norm of the true gradient and the trace of the covariance, as this step's batch estimates them: float64, (), on all
        workers alike. Leaves no gradient behind.

        Args:
            task: whose loss is meant.
            model: sharded; without gradients.
            micro_batches: of this worker.
            world: all workers, which call this together.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        halves = []
        for half in (0, 1):
            self._backward(half, task, model, micro_batches, world)
            halves.append([local(parameter.grad) for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
        product = difference = torch.zeros((), dtype=torch.float64, device=world.device)
        for first, second in zip(*halves, strict=True):
            if first is not None and second is not None:
                product = product + (first.double() * second.double()).sum().to(world.device)
                difference = difference + (first.double() - second.double()).square().sum().to(world.device)
        copies = world.mesh.size(0) if world.mesh.ndim == 2 else 1  # replicas have the same shards
        product, difference = (world.all_sum(torch.stack([product, difference])) / copies).unbind()
        larger, smaller = -(-self.batch // 2), self.batch // 2
        return {GRADIENT: product, NOISE: difference / (1 / larger + 1 / smaller)}

    def _backward(self, half: int, task: Task[Any, Any], model: nn.Module, micro_batches: list[Batch], world: World) -> None:
        """Computes the gradient of every second example of the global batch, from the first (0) or the second (1) on."""
        parts, place = [], self.first + half
        for batch in micro_batches:
            size = len(next(iter(batch.values())))
            chosen = torch.arange(place % 2, size, 2, device=world.device)
            parts.append((len(chosen) > 0, {name: value[chosen] if len(chosen) else value for name, value in batch.items()}))
            place += size
        targets = world.all_sum(torch.stack([task.num_targets(batch) * taken for taken, batch in parts]).sum())
        for number, (taken, batch) in enumerate(parts, 1):
            reduce_gradients(model, number == len(parts))
            loss, _ = task.loss(model, batch)  # also of a part without an example that is taken: all workers compute together
            (loss * (taken * world.size / targets.clamp(min=1))).backward()

    def scale(self, gradient: float, noise: float) -> dict[str, float]:
        """The noise scale in examples, with the averages up to this step; empty as long as noise hides the gradient."""
        gradients, noises = self._average(gradient, noise)
        return {SCALE: noises / gradients} if gradients > 0 else {}

    def _average(self, *values: float) -> tuple[float, float]:
        # From 0 on, both: what both averages lack at first their ratio does not.
        first, second = (DECAY * old + (1 - DECAY) * new for old, new in zip(self._averages, values, strict=True))
        self._averages = first, second
        return first, second


def local(gradient: Tensor | None) -> Tensor | None:
    """This worker's shard of a gradient."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[union-attr]


def check_noise_scale(measured: bool, batch: int) -> None:
    """Refuses to measure it of batches that have no half.

    Raises:
        UserError: a global batch is one example.
    """
    if measured and batch < 2:
        raise UserError(f"--run.noise-scale compares the halves of a batch: training.global-batch-size is {batch} and must be at least 2")
