"""Mean and standard deviation of more numbers than memory holds."""

from __future__ import annotations

import numpy as np


class Moments:
    """Mean and standard deviation of columns that are added block by block; NaN does not count.

    Blocks are joined by their own means (Chan's formula), so that large numbers that differ little keep their deviation.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._count, self._mean, self._squares = np.zeros(size), np.zeros(size), np.zeros(size)

    def add(self, values: np.ndarray) -> None:
        """values (n, size)."""
        there = ~np.isnan(values)
        values = np.where(there, values, 0).astype(np.float64)
        count = there.sum(0)
        mean = values.sum(0) / np.maximum(count, 1)
        squares = (np.where(there, values - mean, 0) ** 2).sum(0)
        together = np.maximum(self._count + count, 1)
        difference = mean - self._mean
        self._squares += squares + difference**2 * self._count * count / together
        self._mean += difference * count / together
        self._count += count

    @property
    def mean(self) -> np.ndarray:
        return self._mean

    @property
    def scale(self) -> np.ndarray:
        """The standard deviation; 1 of what is always the same, so that dividing by it changes nothing."""
        found = np.sqrt(self._squares / np.maximum(self._count, 1))
        return np.where(found > 0, found, 1.0)
