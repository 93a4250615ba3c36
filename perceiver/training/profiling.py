"""Profiles of some steps: a trace for Perfetto and the operators that cost most (`run.profile 20..25`), a GPU's memory
(`run.memory-snapshot 20..25`).

What the profiler watches it does not change: a profiled run has the weights of one that is not.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from perceiver.config import UserError
from perceiver.config.running import profiled_steps
from perceiver.data.storage import write_file
from perceiver.runs import Run
from perceiver.training.callbacks import Callback, TrainingView

if TYPE_CHECKING:
    from pathlib import Path

    from perceiver.config import RunConfig
    from perceiver.training.loop import StepResult

logger = logging.getLogger(__name__)

STEP = "ProfilerStep"
MOST_EVENTS = 100_000
"""Allocations that a snapshot has: older ones are left out."""
NO_GPU = "--run.memory-snapshot records what PyTorch's allocator on GPUs gives: %s"
INSTEAD = "perceiver plan says what a step takes, and --run.profile has the memory of each operator"
MOST_EXPENSIVE = 10
"""Operators that the table lists."""


class WatchedSteps(Callback):
    """Watches the steps `first` to `last` (counted from 1) of the first worker. A start that begins after `first` watches what is left."""

    def __init__(self, steps: str) -> None:
        self.first, self.last = profiled_steps(steps)
        self._from: int | None = None

    def on_start(self, training: TrainingView) -> None:
        self._begin(training.step)

    def after_step(self, step: int, result: StepResult) -> None:
        if self._from is not None:
            self.step_ends(step)
            if step >= self.last:
                self._end(step)
            else:
                self.step_begins(step + 1)
        self._begin(step)

    def on_end(self, step: int, metrics: dict[str, float], error: BaseException | None) -> None:
        if self._from is not None:
            self._end(step)

    def begin(self) -> None:
        """Begins to watch."""

    def step_begins(self, step: int) -> None:
        """Before a step that is watched."""

    def step_ends(self, step: int) -> None:
        """After it."""

    def finish(self, folder: Path, steps: str) -> None:
        """Ends, and writes what was seen of the steps ("20-25") into a folder.

        Raises:
            OSError: it cannot be written, which is a warning.
        """

    def _begin(self, step: int) -> None:
        """Begins where the step after `step` is among those to watch."""
        if self._from is not None or self.training.world.rank > 0 or not self.first <= step + 1 <= self.last:
            return
        self._from = step + 1
        self.gpu = self.training.world.device.type == "cuda"
        self.begin()
        self.step_begins(step + 1)

    def _end(self, step: int) -> None:
        began, self._from = self._from, None
        assert began is not None
        folder = Run(self.training.run_folder).profile_folder
        steps = f"{began}-{step}" if step > began else f"{began}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.finish(folder, steps)
        except OSError as error:  # a full disk, say: no reason to stop the training
            logger.warning("the profile of steps %s cannot be written: %s", steps, error)


class Profiler(WatchedSteps):
    """What the steps compute (`run.profile`), by torch.profiler."""

    def begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]
        self._profile: Any = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def step_begins(self, step: int) -> None:
        # Marks the step in the trace, by the name that TensorBoard knows.
        self._mark = torch.profiler.record_function(f"{STEP}#{step}")
        self._mark.__enter__()

    def step_ends(self, step: int) -> None:
        self._mark.__exit__(None, None, None)

    def finish(self, folder: Path, steps: str) -> None:
        found, self._profile = self._profile, None
        if self.gpu:
            torch.cuda.synchronize()
        found.stop()
        for name in ("trace-*", "operators-*"):
            forget(folder, name)
        found.export_chrome_trace(str(folder / f"trace-{steps}.json.gz"))
        lines = operators(found.key_averages(), self.gpu)
        title = f"operators of step{'s' if '-' in steps else ''} {steps.replace('-', ' to ')} that cost most:"
        write_file(folder, f"operators-{steps}.txt", "\n".join([title, *lines, ""]).encode())
        for line in (title, *(f"  {line}" for line in lines)):
            logger.info("%s", line)


class MemorySnapshot(WatchedSteps):
    """Which memory of the GPU the steps take, from where in the code (`run.memory-snapshot`). Of a step that finds no memory, too."""

    def begin(self) -> None:
        if self.gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")
        else:
            logger.warning(NO_GPU, "the first worker computes on a CPU, and no snapshot is written")

    def finish(self, folder: Path, steps: str) -> None:
        if not self.gpu:
            return
        forget(folder, "memory-*")
        path = folder / f"memory-{steps}.pickle"
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("memory of steps %s: %s (drop it on https://pytorch.org/memory_viz)", steps.replace("-", " to "), path)


def watching(run: RunConfig) -> list[WatchedSteps]:
    """What a run wants watched."""
    profiler = [Profiler(run.profile)] if run.profile is not None else []
    return [*profiler, *([MemorySnapshot(run.memory_snapshot)] if run.memory_snapshot is not None else [])]


def forget(folder: Path, pattern: str) -> None:
    """Removes files of an earlier start."""
    for path in folder.glob(pattern):
        path.unlink()


def operators(averages: Any, gpu: bool) -> list[str]:
    """A table of the operators whose own time is longest, without what they call: on the GPU where there is one, else on the CPU.

    Args:
        averages: `torch.profiler.profile.key_averages()`.
        gpu: which of both.
    """

    def own(event: Any) -> float:
        """Microseconds."""
        return float(event.self_device_time_total if gpu else event.self_cpu_time_total)

    events = [event for event in averages if own(event) > 0 and not event.key.startswith(STEP)]
    whole = sum(map(own, events))
    rows = [("operator", "calls", f"own {'GPU' if gpu else 'CPU'} time", "share")]
    for event in sorted(events, key=own, reverse=True)[:MOST_EXPENSIVE]:
        name = event.key if len(event.key) <= 60 else f"{event.key[:57]}..."
        rows.append((name, f"{event.count:,}", f"{own(event) / 1000:,.2f} ms", f"{own(event) / whole:.1%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]) for row in rows]


def check_profile(run: RunConfig, total_steps: int) -> None:
    """Refuses steps that a run does not have.

    Raises:
        UserError: it ends before the first of them.
    """
    for field, steps in (("profile", run.profile), ("memory-snapshot", run.memory_snapshot)):
        if steps is not None and (first := profiled_steps(steps)[0]) > total_steps:
            raise UserError(f"--run.{field} is {steps}, but the run ends at step {total_steps:,}: step {first:,} is never taken")


def check_snapshot(run: RunConfig, gpu: bool) -> None:
    """Refuses a memory snapshot of a training on CPUs.

    Raises:
        UserError: says what there is instead.
    """
    if run.memory_snapshot is not None and not gpu:
        raise UserError(NO_GPU % f"this run computes on CPUs; {INSTEAD}")
