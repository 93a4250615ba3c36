"""Callbacks: what watches a training, and may end it. One of your own is two small classes in a file of yours.

class WeightNorm(CallbackConfig):
    "Writes the norm of all weights to a file."

    every: int = 100
    "Steps between two lines."

    def build(self):
        return WriteNorm(self)

class WriteNorm(Callback):
    def __init__(self, config):
        self.config = config

    def after_step(self, step, result):
        if step % self.config.every == 0 and self.training.world.rank == 0:
            ...

Experiment(..., callbacks=(WeightNorm(every=50),))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.config import CallbackConfig, Experiment, UserError, nearest, spelled
from perceiver.config.checks import check_positive
from perceiver.config.optimization import raw_metric

if TYPE_CHECKING:
    import torch
    from torch import nn

    from perceiver.tasks.base import Sample, Task
    from perceiver.training.loop import StepResult
    from perceiver.training.parallel import World
    from perceiver.training.state import TrainState

STOP, PAUSE, SAVE, MEET = "stop", "pause", "save", "meet"
REQUESTS = (STOP, PAUSE, SAVE, MEET)
"""What callbacks may ask of a training."""


class TrainingView:
    """What a callback sees of the training that it watches, and what it may ask of it.

    A request may be made on one worker or on several, in any hook: all workers act on it at the end of the same step, which is
    this one or the next.

    Attributes:
        experiment: the configuration, all of it.
        task: its task, which knows which metrics there are and in which direction they are better.
        world: this process among the workers: `rank`, `size`, `device`. Files are written where `rank` is 0.
        run_folder: where the run is kept.
        total_steps: the run's length.
    """

    def __init__(
        self, experiment: Experiment, task: Task[Any, Any], state: TrainState, world: World, run_folder: Path, total_steps: int
    ) -> None:
        self.experiment, self.task, self.world, self.run_folder, self.total_steps = experiment, task, world, run_folder, total_steps
        self._state = state
        self._requests: set[str] = set()
        self.reason: str | None = None
        """Why a callback on this worker asked for the end."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._state.step

    @property
    def model(self) -> nn.Module:
        """The model. Its parameters are shards (DTensor); to change them changes the training."""
        return self._state.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; its settings are set anew before every step."""
        return self._state.optimizer

    def stop(self, reason: str) -> None:
        """Asks to end the training for good, with a validation and a checkpoint. The run's result names the reason."""
        self._requests.add(STOP)
        self.reason = self.reason or reason

    def pause(self) -> None:
        """Asks to save a checkpoint and end, to be continued later."""
        self._requests.add(PAUSE)

    def save(self) -> None:
        """Asks for a checkpoint."""
        self._requests.add(SAVE)

    def meet(self) -> None:
        """Asks that `on_meeting` be called on all workers at the same step."""
        self._requests.add(MEET)

    def take_requests(self) -> set[str]:
        """What has been asked for on this worker since the last call. Called by the training alone."""
        taken, self._requests = self._requests, set()
        return taken


class Callback:
    """Hooks that a training calls, all on every worker, in the order of the steps; each does nothing by default.

    A hook runs between two steps: while it runs, training stands still. An exception in one ends the run.

    Attributes:
        training: what it watches; set before `on_start`.
    """

    training: TrainingView

    def on_start(self, training: TrainingView) -> None:
        """Before the first step of this start, when model, optimizer and the callback's own state are restored."""

    def after_step(self, step: int, result: StepResult) -> None:
        """After every step. Its numbers are tensors on the device: to read one waits for the device."""

    def after_log(self, step: int, metrics: dict[str, float]) -> None:
        """After every `run.log_every` steps, with loss, learning rate, throughput, ... as in metrics.jsonl."""

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        """After every validation, with its metrics (val_loss, ...; none where the data has no target): the same on all workers."""

    def after_samples(self, step: int, samples: list[Sample]) -> None:
        """After every validation, before `after_validation`, with what the task shows a person: the same on all workers."""

    def after_checkpoint(self, step: int, path: Path) -> None:
        """When a checkpoint is complete, some steps after it was begun and not on all workers at once."""

    def on_meeting(self, step: int) -> None:
        """On all workers at the same step, when a callback has called `training.meet()`."""

    def while_waiting(self, seconds: float) -> None:
        """From time to time while data does not come, with the seconds waited."""

    def on_end(self, step: int, metrics: dict[str, float], error: BaseException | None) -> None:
        """At the end, with the last validation's metrics: of the training, of this start if it is paused, or with the error that ends it.
        Not when the process is killed.
        """

    def state_dict(self) -> dict[str, Any]:
        """The callback's own state, saved with every checkpoint: dicts, lists, numbers, strings and tensors.

        Called on all workers after all hooks of the step; that of the first worker is kept and given to all, whatever their number
        (a DTensor as the whole tensor).
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, before `on_start`. Not called where a checkpoint has no state of this callback."""


class EarlyStop(CallbackConfig):
    """Ends the training when a validation metric has stopped improving."""

    metric: str = ""
    """A validation metric (val_loss, val_acc, ...); "": run.best-metric. The task says in which direction it is better."""
    patience: int = 3
    """Number of validations in a row without improvement after which the training ends."""
    threshold: float = 0.0
    """By how much a value must be better than the best before it to count as an improvement."""
    min_steps: int = 0
    """The training does not end before this step."""

    def check(self, where: str) -> None:
        check_positive(self, where, "patience")
        if self.threshold < 0:
            raise UserError(f"{where}threshold is {self.threshold} and must not be negative")
        if self.min_steps < 0:
            raise UserError(f"{spelled(where)}min-steps is {self.min_steps} and must not be negative")

    def check_metrics(self, where: str, names: Sequence[str]) -> None:
        if self.metric and self.metric not in names:
            raise UserError(
                f"--{spelled(where)}metric is {self.metric!r} and must be one of {', '.join(names)}{nearest(self.metric, names)}"
            )

    def build(self) -> Callback:
        return _EarlyStop(self)


class _EarlyStop(Callback):
    def __init__(self, config: EarlyStop) -> None:
        self.config = config
        self.best: float | None = None
        self.misses = 0

    def on_start(self, training: TrainingView) -> None:
        self.metric = self.config.metric or training.experiment.run.best_metric
        names = training.task.metric_directions
        if raw_metric(self.metric).removeprefix("val_").partition("/")[0] not in names or not self.metric.startswith("val_"):
            raise UserError(f"the metric of an early stop is {self.metric!r} and must be one of {', '.join(f'val_{n}' for n in names)}")

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        value = metrics.get(self.metric, math.nan)
        if self._improves(value):
            self.best, self.misses = value, 0
            return
        self.misses += 1
        if self.misses >= self.config.patience and step >= self.config.min_steps:
            best = "never finite" if self.best is None else f"best {self.best:.4g}"
            self.training.stop(f"{self.metric} has not improved in {self.misses} validations ({best})")

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.training.task.higher_is_better(self.metric) else self.best - value
        return gain > self.config.threshold

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.misses = state["best"], state["misses"]


class Divergence(CallbackConfig):
    """Ends the training when its loss runs away; one that is no number ends it anyway (training.skip-not-finite)."""

    factor: float = 2.0
    """The loss has run away where its mean since the last line of progress is above the lowest such mean before it by this factor."""
    patience: int = 3
    """Number of lines of progress (run.log-every) in a row, all above, that end the training."""
    min_steps: int = 0
    """The training does not end before this step."""

    def check(self, where: str) -> None:
        check_positive(self, where, "patience")
        if not self.factor > 1:
            raise UserError(f"--{spelled(where)}factor is {self.factor} and must be above 1")
        if self.min_steps < 0:
            raise UserError(f"--{spelled(where)}min-steps is {self.min_steps} and must not be negative")

    def build(self) -> Callback:
        return _Divergence(self)


class _Divergence(Callback):
    def __init__(self, config: Divergence) -> None:
        self.config = config
        self.lowest: float | None = None
        self.above = 0

    def after_log(self, step: int, metrics: dict[str, float]) -> None:
        loss = metrics["loss"]
        # Of a loss that may be negative, above means higher by that share of its size.
        if self.lowest is not None and loss > self.lowest + (self.config.factor - 1) * abs(self.lowest):
            self.above += 1
        else:
            self.above = 0
        self.lowest = loss if self.lowest is None else min(loss, self.lowest)
        if self.above >= self.config.patience and step >= self.config.min_steps:
            self.training.stop(
                f"diverged: loss {loss:.4g}, in {self.above} lines above {self.config.factor:g} times its lowest, {self.lowest:.4g}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "above": self.above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest, self.above = state["lowest"], state["above"]
