"""Learning-rate range test (Smith, arXiv 1506.01186): a short training whose learning rate grows until the loss does.

The loss falls as long as rates are small enough to be stable; where it begins to grow they are too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from perceiver.config import Experiment
from perceiver.data.manifest import Manifest
from perceiver.tasks import build_task
from perceiver.training.average import begin_average
from perceiver.training.batches import read_here, train_loader
from perceiver.training.fork import find_fork
from perceiver.training.init_from import find_start
from perceiver.training.loop import StepResult, fit
from perceiver.training.parallel import World, join_world
from perceiver.training.prefetch import Prefetch
from perceiver.training.run import build_state

DIVERGED = 4.0
"""The test ends where the smoothed loss is above its lowest by this multiple of what it has fallen from its first, and above its first."""
MEMORY = 0.8
"""Share of the smoothed loss that is kept at each step while the test runs."""
FEWEST = 10
"""Steps without which nothing is suggested."""


@dataclass(frozen=True)
class RangeTest:
    """What a test has found: learning rate and loss of each step."""

    rates: np.ndarray
    losses: np.ndarray
    diverged: bool
    """Whether it ended before its largest rate, because the loss grew."""

    @property
    def smoothed(self) -> np.ndarray:
        """The losses, each the mean of its neighbours by a Gaussian a thirtieth of the test wide."""
        from scipy.ndimage import gaussian_filter1d

        finite = np.where(np.isfinite(self.losses), self.losses, np.nanmax(np.where(np.isfinite(self.losses), self.losses, np.nan)))
        return gaussian_filter1d(finite, max(1.0, len(finite) / 30), mode="nearest")

    @property
    def suggestion(self) -> float | None:
        """A third of `lowest`, which is the lower end of the range that the paper takes from such a test; None: the loss never fell.

        Where the loss falls fastest says less: the first weights of a model's output are often far off, and any small rate mends them.
        """
        smoothed = self.smoothed
        if len(self.rates) < FEWEST or not smoothed.min() < smoothed[0] - 0.01 * abs(smoothed[0]):
            return None
        return self.lowest / 3

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is lowest, the largest of use."""
        return float(self.rates[int(self.smoothed.argmin())])


def ramp(low: float, high: float, steps: int) -> Callable[[int], float]:
    """Rates from `low` to `high`, each the same multiple of the one before, by the step from 0."""
    return lambda step: low * (high / low) ** (step / max(1, steps - 1))


@contextmanager
def alone_on(device: torch.device) -> Iterator[World]:
    """The world of this process alone on a device. A process group that is begun for it is closed in the end."""
    begun = not dist.is_initialized()
    try:
        yield join_world(device)
    finally:
        if begun:
            dist.destroy_process_group()


def range_test(
    experiment: Experiment,
    data_folder: str,
    manifest: Manifest,
    world: World,
    low: float,
    high: float,
    steps: int,
    on_step: Callable[[int, float, float], None] = lambda step, rate, loss: None,
) -> RangeTest:
    """Trains `steps` steps from the experiment's own start in this process, and keeps nothing of it.

    Args:
        experiment: what is to be trained; its schedule and warm-up are left out, all else counts. Its micro-batches are those of one of
            its workers.
        data_folder, manifest: the prepared data.
        world: this process alone.
        low, high: first and last learning rate, above 0.
        steps: how many, at most.
        on_step: called with the number of steps taken, the learning rate and the loss.

    Raises:
        UserError: the experiment starts from weights that do not fit.
    """
    parallel, training = experiment.parallel, experiment.training
    size = parallel.micro_batch_size or -(-training.global_batch_size // parallel.workers)
    task = build_task(experiment)
    loader = train_loader(task, data_folder, manifest, data=experiment.data, training=training, micro_batch_size=size)
    state = build_state(experiment, task, world)
    if (fork := find_fork(experiment)) is not None:
        fork.apply(state)
    elif (start := find_start(experiment, {name: p.shape for name, p in state.model.named_parameters()})) is not None:
        start.apply(state.model)
        state.average = None if state.average is None else begin_average(state.model)
    first, rate = state.step, ramp(low, high, steps)
    rates: list[float] = []
    losses: list[float] = []
    average, best = 0.0, math.inf
    diverged = False

    def after_step(result: StepResult) -> bool:
        nonlocal average, best, diverged
        loss = (result.loss_sum / result.targets.clamp(min=1)).item()
        rates.append(result.lr)
        losses.append(loss)
        on_step(len(losses), result.lr, loss)
        average = MEMORY * average + (1 - MEMORY) * loss
        smoothed = average / (1 - MEMORY ** len(losses))
        best = min(best, smoothed)
        above = smoothed - best > DIVERGED * max(losses[0] - best, 0.05 * abs(losses[0])) or smoothed > losses[0] + 0.5 * abs(losses[0])
        diverged = not math.isfinite(loss) or (above and smoothed > losses[0])
        return diverged

    batches = Prefetch(loader.steps(read_here, 0, 1, first, first + steps), world.device)
    try:
        fit(
            experiment.optim, training.seed, task, state, batches, world, first + steps, after_step,
            rate=lambda step, _: rate(step - first),
        )  # fmt: skip
    finally:
        batches.close()
    return RangeTest(np.array(rates), np.array(losses), diverged)


def device_of(experiment: Experiment) -> torch.device:
    """The device that this process computes on."""
    gpu = torch.cuda.is_available() and experiment.parallel.device != "cpu"
    return torch.device("cuda" if gpu else "cpu")
