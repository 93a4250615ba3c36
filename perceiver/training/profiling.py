"""A profile of some steps (`run.profile 20..25`) by torch.profiler: a trace for Perfetto, and the operators that cost most.

What the profiler watches it does not change: a profiled run has the weights of one that is not.
"""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Any

import torch

from perceiver.config import UserError
from perceiver.config.running import profiled_steps
from perceiver.data.storage import write_file
from perceiver.runs import Run
from perceiver.training.callbacks import Callback, TrainingView

if TYPE_CHECKING:
    from perceiver.training.loop import StepResult

logger = logging.getLogger(__name__)

STEP = "ProfilerStep"
MOST_EXPENSIVE = 10
"""Operators that the table lists."""


class Profiler(Callback):
    """Watches the steps `first` to `last` (counted from 1) of the first worker. A start that begins after `first` profiles what is left."""

    def __init__(self, steps: str) -> None:
        self.first, self.last = profiled_steps(steps)
        self._profile: Any = None

    def on_start(self, training: TrainingView) -> None:
        self._begin(training.step)

    def after_step(self, step: int, result: StepResult) -> None:
        if self._profile is not None:
            self._mark.__exit__(None, None, None)
            if step >= self.last:
                self._finish(step)
            else:
                self._begin_step(step + 1)
        self._begin(step)

    def on_end(self, step: int, metrics: dict[str, float], error: BaseException | None) -> None:
        if self._profile is not None:
            self._finish(step)

    def _begin(self, step: int) -> None:
        """Begins where the step after `step` is among those to watch."""
        if self._profile is not None or self.training.world.rank > 0 or not self.first <= step + 1 <= self.last:
            return
        from torch.profiler import ProfilerActivity, profile

        self._gpu = self.training.world.device.type == "cuda"
        self._from = step + 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()
        self._begin_step(step + 1)

    def _begin_step(self, step: int) -> None:
        """Marks the step in the trace, by the name that TensorBoard knows."""
        self._mark = torch.profiler.record_function(f"{STEP}#{step}")
        self._mark.__enter__()

    def _finish(self, step: int) -> None:
        found, self._profile = self._profile, None
        if self._gpu:
            torch.cuda.synchronize()
        found.stop()
        folder = Run(self.training.run_folder).profile_folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        steps = f"{self._from}-{step}" if step > self._from else f"{step}"
        try:
            found.export_chrome_trace(str(folder / f"trace-{steps}.json.gz"))
            lines = operators(found.key_averages(), self._gpu)
            title = f"operators of step{'s' if step > self._from else ''} {steps.replace('-', ' to ')} that cost most:"
            write_file(folder, f"operators-{steps}.txt", "\n".join([title, *lines, ""]).encode())
        except OSError as error:  # a full disk, say: no reason to stop the training
            logger.warning("the profile of steps %s cannot be written: %s", steps, error)
            return
        for line in (title, *(f"  {line}" for line in lines)):
            logger.info("%s", line)


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


def check_profile(steps: str | None, total_steps: int) -> None:
    """Refuses steps that a run does not have.

    Raises:
        UserError: it ends before the first of them.
    """
    if steps is not None and (first := profiled_steps(steps)[0]) > total_steps:
        raise UserError(f"--run.profile is {steps}, but the run ends at step {total_steps:,}: step {first:,} is never taken")
