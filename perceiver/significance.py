"""Whether a difference between runs is real: intervals and p-values, over examples and over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from perceiver.comparison import ComparedRun


_DRAWS = 5_000_000
"""Examples drawn in all by a bootstrap, about."""


_LEAST_RESAMPLES, _MOST_RESAMPLES = 1000, 5000
LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Difference:
    """Between a run, or a group of runs, and the one that it is compared with: what its metric is more than the other's."""

    value: float
    low: float
    high: float
    p: float
    """How likely a difference at least as large is by chance, where there is none."""

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone, or that share the value of a field."""

    name: str
    runs: tuple[ComparedRun, ...]
    values: tuple[float, ...]
    """The best value of the metric of each run that has it."""

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over the runs."""
        count, mean = len(self.values), self.mean
        return math.sqrt(sum((value - mean) ** 2 for value in self.values) / (count - 1)) if count > 1 else math.nan

    @property
    def margin(self) -> float:
        """Half the width of the t-interval of the mean."""
        count = len(self.values)
        return _t_quantile(count - 1) * self.deviation / math.sqrt(count) if count > 1 else math.nan


def bootstrap(targets: np.ndarray, differences: np.ndarray) -> list[Difference]:
    """Differences of means over examples that are drawn again and again, the same ones for all.

    Args:
        targets: of each example, (examples,).
        differences: what each example adds to one run's sum more than to the other's, (runs, examples).
    """
    import numpy as np

    rng, count = np.random.default_rng(0), len(targets)
    resamples = min(max(_DRAWS // count, _LEAST_RESAMPLES), _MOST_RESAMPLES)
    size, parts = max(1, 2_000_000 // count), []
    for start in range(0, resamples, size):
        number = min(size, resamples - start)
        drawn = rng.integers(0, count, (number, count))
        drawn += np.arange(number)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count).astype(np.float64)
        parts.append(times @ differences.T / np.maximum(times @ targets, 1)[:, None])
    means = np.concatenate(parts)
    values = differences.sum(1) / max(targets.sum(), 1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    tail = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    p = np.minimum(1.0, 2 * (tail + 1) / (resamples + 1))
    return [Difference(*map(float, row)) for row in zip(values, low, high, p, strict=True)]


def welch(group: Group, other: Group) -> Difference | None:
    """What the mean of a group is more than another's, by Welch's t-test; None where one has less than two runs."""
    if min(len(group.values), len(other.values)) < 2:
        return None
    parts = [each.deviation**2 / len(each.values) for each in (group, other)]
    value, error = group.mean - other.mean, math.sqrt(sum(parts))
    if error == 0:
        return Difference(value, value, value, float(value == 0))
    freedom = sum(parts) ** 2 / sum(part**2 / (len(each.values) - 1) for part, each in zip(parts, (group, other), strict=True))
    # Here and not above: only replicates need it, and it takes longer to load than all else.
    from scipy.special import stdtr

    margin = _t_quantile(freedom) * error
    return Difference(value, value - margin, value + margin, float(2 * stdtr(freedom, -abs(value) / error)))


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit  # see `welch`

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
