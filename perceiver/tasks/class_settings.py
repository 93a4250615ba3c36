"""Settings that tasks with a class per example share: the weights of classes in the training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import numpy as np

from perceiver.config import TaskConfig, UserError
from perceiver.config.core import spelled

BALANCED = "balanced"


class ClassSettings(TaskConfig):
    """A class per example."""

    measured: ClassVar[tuple[str, ...]] = ("measured_weights",)

    class_weights: tuple[str, ...] = ()
    """Weights of the classes in the training loss: a number for each class, in order, or "balanced": rows of the training split /
    (classes * rows of the class), so that each class counts alike. Empty: all are 1. Validation is not weighted."""
    leave_out: tuple[str, ...] = ()
    """Labels whose rows are left out (and counted). Set automatically where class-names chooses some of the classes that the data has."""
    measured_weights: tuple[float, ...] = ()
    """The balanced weights; set by the training."""

    def check(self, where: str) -> None:
        super().check(where)
        self.weights(where)

    def weights(self, where: str = "task.") -> tuple[float, ...] | None:
        """The weight of each class; None: all are 1, or balanced ones that are not measured yet.

        Raises:
            UserError: they are neither "balanced" nor numbers of at least 0.
        """
        given = tuple(weight for word in self.class_weights for weight in word.split(",") if weight)
        if not given:
            return None
        if given == (BALANCED,):
            return self.measured_weights or None
        field = f"--{spelled(where)}class-weights"
        try:
            found = tuple(map(float, given))
        except ValueError:
            raise UserError(f"{field} is {' '.join(given)} and must be {BALANCED}, or a number for each class") from None
        if not all(math.isfinite(weight) and weight >= 0 for weight in found) or not any(found):
            raise UserError(f"{field} is {' '.join(given)} and must have numbers of at least 0, one of them above 0")
        return found

    def check_weights(self, num_classes: int) -> None:
        """Raises UserError where there are weights, but not one for each class."""
        found = self.weights()
        if found is not None and len(found) != num_classes:
            raise UserError(f"--task.class-weights has {len(found)} numbers, but there are {num_classes} classes")

    def counted(self, counts: Sequence[float]) -> Self:
        if self.class_weights != (BALANCED,):
            return self
        return replace(self, measured_weights=balanced_weights(counts))


def balanced_weights(counts: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """The weight of each class by which all count alike and the mean weight of a row is 1; 0 of one without rows."""
    rows = np.asarray(counts, np.float64)
    there = rows > 0
    weights = rows.sum() / (max(there.sum(), 1) * np.where(there, rows, 1))
    return tuple(np.where(there, weights, 0.0).tolist())
