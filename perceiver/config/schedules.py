"""Learning-rate schedules besides the two that `optimization.py` starts from. All are functions of the step."""

from __future__ import annotations

import math
from dataclasses import replace

from perceiver.config.checks import check_positive
from perceiver.config.core import UserError, spelled
from perceiver.config.optimization import ScheduleConfig, check_epochs


def _check_fraction(where: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"--{spelled(where)}{name} is {value} and must be from 0 to 1")


class Linear(ScheduleConfig):
    """A straight line from the peak down to `min_lr_fraction` at the last step."""

    min_lr_fraction: float = 0.0
    """The last learning rate as a fraction of the peak."""

    def check(self, where: str) -> None:
        _check_fraction(where, "min-lr-fraction", self.min_lr_fraction)

    def factor(self, step: int, total_steps: int) -> float:
        return 1 - (1 - self.min_lr_fraction) * min(1.0, step / max(1, total_steps))


class Wsd(ScheduleConfig):
    """Warm-up, stable, decay (arXiv 2404.06395): the peak, then a fall over the last steps. Until the fall the length does not matter."""

    decay_fraction: float = 0.2
    """Share of the steps over which it falls."""
    min_lr_fraction: float = 0.0
    """The last learning rate as a fraction of the peak."""

    def check(self, where: str) -> None:
        _check_fraction(where, "decay-fraction", self.decay_fraction)
        _check_fraction(where, "min-lr-fraction", self.min_lr_fraction)

    def factor(self, step: int, total_steps: int) -> float:
        falling = round(self.decay_fraction * total_steps)
        progress = (step - (total_steps - falling)) / max(1, falling)
        return 1 - (1 - self.min_lr_fraction) * min(1.0, max(0.0, progress))


class FlatCosine(ScheduleConfig):
    """The peak, then half a cosine down to 0 at the last step (the ImageNet recipe of Perceiver IO)."""

    flat_fraction: float = 0.5
    """Share of the steps at the peak."""

    def check(self, where: str) -> None:
        _check_fraction(where, "flat-fraction", self.flat_fraction)

    def factor(self, step: int, total_steps: int) -> float:
        flat = round(self.flat_fraction * total_steps)
        return _cosine(1.0, 0.0, min(1.0, max(0.0, (step - flat) / max(1, total_steps - flat))))


class InverseSquareRoot(ScheduleConfig):
    """The peak divided by the square root of the steps (arXiv 1706.03762), whatever the length."""

    timescale: int = 1000
    """Steps after which it is the peak divided by the square root of 2; the number of warm-up steps is usual."""
    timescale_epochs: float | None = None
    """The same in epochs, in place of `timescale`; None: as `timescale` says."""

    def check(self, where: str) -> None:
        check_positive(self, where, "timescale")
        check_epochs(where, "timescale_epochs", self.timescale_epochs)

    def in_steps(self, epoch: int) -> ScheduleConfig:
        if self.timescale_epochs is None:
            return self
        return replace(self, timescale=max(1, round(self.timescale_epochs * epoch)), timescale_epochs=None)

    def factor(self, step: int, total_steps: int) -> float:
        return math.sqrt(self.timescale / (self.timescale + step))


class OneCycle(ScheduleConfig):
    """Up to the peak and down again, each half a cosine (arXiv 1708.07120)."""

    rise_fraction: float = 0.3
    """Share of the steps over which it rises."""
    start_lr_fraction: float = 0.04
    """The first learning rate as a fraction of the peak."""
    min_lr_fraction: float = 0.0
    """The last learning rate as a fraction of the peak."""

    def check(self, where: str) -> None:
        for name in ("rise_fraction", "start_lr_fraction", "min_lr_fraction"):
            _check_fraction(where, spelled(name), getattr(self, name))

    def factor(self, step: int, total_steps: int) -> float:
        rising = round(self.rise_fraction * total_steps)
        if step < rising:
            return _cosine(self.start_lr_fraction, 1.0, step / rising)
        return _cosine(1.0, self.min_lr_fraction, min(1.0, (step - rising) / max(1, total_steps - rising)))


class WarmRestarts(ScheduleConfig):
    """Cosines from the peak down to `min_lr_fraction`, one after the other (arXiv 1608.03983), whatever the length."""

    cycle_steps: int = 1000
    """Steps of the first cycle."""
    cycle_epochs: float | None = None
    """The same in epochs, in place of cycle_steps; None: as cycle_steps says."""
    growth: float = 2.0
    """How many times as long each cycle is as the one before."""
    min_lr_fraction: float = 0.0
    """The learning rate at the end of a cycle as a fraction of the peak."""

    def check(self, where: str) -> None:
        check_positive(self, where, "cycle_steps")
        check_epochs(where, "cycle_epochs", self.cycle_epochs)
        if not self.growth >= 1:
            raise UserError(f"--{spelled(where)}growth is {self.growth} and must be at least 1")
        _check_fraction(where, "min-lr-fraction", self.min_lr_fraction)

    def in_steps(self, epoch: int) -> ScheduleConfig:
        if self.cycle_epochs is None:
            return self
        return replace(self, cycle_steps=max(1, round(self.cycle_epochs * epoch)), cycle_epochs=None)

    def factor(self, step: int, total_steps: int) -> float:
        length, begun = self.cycle_steps, 0
        while step >= begun + length:
            begun, length = begun + length, max(1, round(length * self.growth))
            if self.growth == 1:
                begun += (step - begun) // length * length
        return _cosine(1.0, self.min_lr_fraction, (step - begun) / length)


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
