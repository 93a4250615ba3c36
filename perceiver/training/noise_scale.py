"""The gradient noise scale (`run.noise-scale`): how large a batch is before a larger one hardly saves steps.

McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1: the squared norms of the gradients of a
large batch and of a small one give unbiased estimates of the squared norm of the true gradient, and of the trace of the covariance of
the gradients of single examples. Their ratio, each averaged over time, is the simple noise scale, in examples.

The large batch is the step's global batch. The small one is every second example of it, by the place in the global batch: the same
examples, whatever the number of workers and micro-batches.
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
        self._averages: tuple[float, float] | None = None
        for record in records:
            if record.get(GRADIENT) is not None and record.get(NOISE) is not None:
                self._average(record[GRADIENT], record[NOISE])

    def measures(self, step: int) -> bool:
        """Whether a step, counted from 1, has a full batch."""
        return not self._rest or step % self._steps != 0

    def small(self, task: Task[Any, Any], model: nn.Module, micro_batches: list[Batch], world: World) -> Tensor:
        """The squared norm of the gradient of the small batch: (), on all workers alike. Leaves no gradient behind.

        Args:
            task: whose loss is meant.
            model: sharded; without gradients.
            micro_batches: of this worker.
            world: all workers, which call this together.
        """
        parts, place = [], self.first
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
        found = squared_norm(model)
        for parameter in model.parameters():
            parameter.grad = None
        return found

    def estimates(self, small: Tensor, large: Tensor) -> dict[str, Tensor]:
        """Of the squared norms of both gradients: the squared norm of the true gradient, and the trace of the covariance."""
        sizes = -(-self.batch // 2), self.batch
        gradient = (sizes[1] * large - sizes[0] * small) / (sizes[1] - sizes[0])
        return {GRADIENT: gradient, NOISE: (small - large) / (1 / sizes[0] - 1 / sizes[1])}

    def scale(self, gradient: float, noise: float) -> dict[str, float]:
        """The noise scale in examples, with the averages up to this step; empty as long as noise hides the gradient."""
        gradients, noises = self._average(gradient, noise)
        return {SCALE: max(0.0, noises / gradients)} if gradients > 0 else {}

    def _average(self, *values: float) -> tuple[float, float]:
        before = self._averages or values
        first, second = (DECAY * old + (1 - DECAY) * new for old, new in zip(before, values, strict=True))
        self._averages = first, second
        return first, second


def squared_norm(model: nn.Module) -> Tensor:
    """Of the whole gradient, over all shards: float64, ()."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach().double() ** 2


def check_noise_scale(measured: bool, batch: int) -> None:
    """Refuses to measure it of batches that have no half.

    Raises:
        UserError: a global batch is one example.
    """
    if measured and batch < 2:
        raise UserError(f"--run.noise-scale compares a batch with its half: training.global-batch-size is {batch} and must be at least 2")
