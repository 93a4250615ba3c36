"""Throughput, model FLOP utilisation, waiting for data, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Measures between two reports. All rates are of the whole run, not of one worker."""

    total_steps: int
    units_per_step: float
    """Examples or tokens of one global batch."""
    flops_per_step: float | None
    peak: float | None
    """FLOP/s of all devices together."""
    wait_seconds: Callable[[], float]
    """Seconds waited for data since the start."""
    step: int = 0
    _time: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _excluded: float = 0.0

    def exclude(self, seconds: float) -> None:
        """Leaves time that is not training (validation, checkpoints) out of the next report's rates."""
        self._excluded += seconds

    def report(self, step: int) -> dict[str, float]:
        """Rates since the last report: units/s, seconds per step, share waiting for data, goodput, MFU if known, seconds left.

        Goodput is the share of all time, validation and checkpoints included, in which steps were computed.
        """
        now, waited = time.perf_counter(), self.wait_seconds()
        whole = max(now - self._time, 1e-9)
        seconds = max(whole - self._excluded, 1e-9)
        steps = max(step - self.step, 1)
        rates = {
            "throughput": self.units_per_step * steps / seconds,
            "step_seconds": seconds / steps,
            "data_wait": (waited - self._waited) / seconds,
            "goodput": max(0.0, seconds - (waited - self._waited)) / whole,
            "seconds_left": (self.total_steps - step) * seconds / steps,
        }
        if self.flops_per_step and self.peak:
            rates["mfu"] = self.flops_per_step * steps / seconds / self.peak
        self.step, self._time, self._waited, self._excluded = step, now, waited, 0.0
        return rates


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 45s, 3m20s, 2h05m."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
