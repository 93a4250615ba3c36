"""IsoFLOP analysis: how large a model should be for a budget of compute (arXiv 2203.15556, Section 3.2, Approach 2).

At each budget C several sizes N are trained on as many tokens D as the budget pays for. The loss over log N is a parabola
whose minimum is the budget's best size; best sizes and tokens over budgets follow power laws N = k C^a and D = k C^b.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perceiver.config import UserError


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One training of an isoFLOP study."""

    budget: float
    """FLOPs that the training was planned for."""
    parameters: float
    tokens: float
    """Tokens that were targets."""
    loss: float


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss = c[0] x^2 + c[1] x + c[2] with x = log10(parameters), at one budget."""

    budget: float
    coefficients: tuple[float, float, float]
    parameters: float
    """At the minimum."""
    tokens: float
    """At the minimum, by a straight line of log tokens over log parameters."""
    loss: float
    inside: bool
    """Whether the minimum lies between the smallest and the largest size measured; otherwise it is a guess."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """value = factor * budget^exponent, with an interval by bootstrap."""

    factor: float
    exponent: float
    exponent_low: float
    exponent_high: float
    samples: tuple[tuple[float, float], ...]
    """(log10 factor, exponent) of each bootstrap sample."""
    level: float

    def predict(self, budget: float) -> tuple[float, float, float]:
        """The value at a budget, and the bounds of its interval."""
        values = np.array([10 ** (k + a * np.log10(budget)) for k, a in self.samples])
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return self.factor * budget**self.exponent, float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The result of an isoFLOP study."""

    measurements: tuple[Measurement, ...]
    parabolas: tuple[Parabola, ...]
    parameters: PowerLaw
    """Best number of parameters over budgets."""
    tokens: PowerLaw
    """Best number of target tokens over budgets."""
    dropped: int
    """Bootstrap samples without minima at all budgets; they are not in the intervals."""
    num_samples: int
    """Bootstrap samples in all."""


def fit_parabola(measurements: Sequence[Measurement]) -> Parabola:
    """The parabola through the trainings of one budget (least squares).

    Raises:
        UserError: fewer than three sizes, or the losses have no minimum.
    """
    budget = measurements[0].budget
    x = np.log10([m.parameters for m in measurements])
    if len(set(x)) < 3:
        raise UserError(f"budget {budget:.3g} has {len(set(x))} model sizes; a parabola needs at least 3")
    return _parabola(budget, x, np.log10([m.tokens for m in measurements]), np.array([m.loss for m in measurements]))


def fit_study(measurements: Sequence[Measurement], *, num_samples: int = 1000, level: float = 0.95, seed: int = 0) -> Study:
    """Parabolas, power laws, and their intervals by a bootstrap of the parabolas' residuals.

    Residuals are scaled by sqrt(n / (n - 3)): a parabola through n points leaves too small ones. The interval is of noise in
    the losses; it does not know of sizes that were badly trained.

    Raises:
        UserError: fewer than two budgets; too few sizes, or no minimum, at a budget.
    """
    groups: dict[float, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        if np.isfinite(measurement.loss):
            groups[measurement.budget].append(measurement)
    if len(groups) < 2:
        raise UserError(f"a power law needs at least 2 budgets with results, not {len(groups)}")
    budgets = sorted(groups)
    parabolas = [fit_parabola(groups[b]) for b in budgets]
    factor_n, exponent_n = _power_law(budgets, [p.parameters for p in parabolas])
    factor_d, exponent_d = _power_law(budgets, [p.tokens for p in parabolas])

    rng = np.random.default_rng(seed)
    samples_n, samples_d, dropped = [], [], 0
    for _ in range(num_samples):
        resampled = [_resample(groups[b], p, rng) for b, p in zip(budgets, parabolas, strict=True)]
        if any(p is None for p in resampled):
            dropped += 1
            continue
        samples_n.append(_power_law(budgets, [p.parameters for p in resampled if p]))
        samples_d.append(_power_law(budgets, [p.tokens for p in resampled if p]))
    if not samples_n:
        raise UserError("the losses are too noisy for an interval: no bootstrap sample has a minimum at every budget")
    return Study(
        measurements=tuple(m for b in budgets for m in groups[b]),
        parabolas=tuple(parabolas),
        parameters=_law(factor_n, exponent_n, samples_n, level),
        tokens=_law(factor_d, exponent_d, samples_d, level),
        dropped=dropped,
        num_samples=num_samples,
    )


def _resample(group: Sequence[Measurement], parabola: Parabola, rng: np.random.Generator) -> Parabola | None:
    x = np.log10([m.parameters for m in group])
    fitted = np.polyval(parabola.coefficients, x)
    residuals = np.array([m.loss for m in group]) - fitted
    count = len(group)
    scale = np.sqrt(count / (count - 3)) if count > 3 else 1.0
    losses = fitted + scale * rng.choice(residuals, count)
    try:
        return _parabola(parabola.budget, x, np.log10([m.tokens for m in group]), losses)
    except UserError:
        return None


def _parabola(budget: float, x: np.ndarray, log_tokens: np.ndarray, losses: np.ndarray) -> Parabola:
    center = x.mean()
    a, b, c = np.polyfit(x - center, losses, 2)
    if a <= 0:
        raise UserError(
            f"the losses at budget {budget:.3g} have no minimum over model sizes: add smaller and larger sizes, or train more evenly"
        )
    best = -b / (2 * a)
    line = np.polyfit(x - center, log_tokens, 1)
    return Parabola(
        budget=budget,
        coefficients=(float(a), float(b - 2 * a * center), float(a * center**2 - b * center + c)),
        parameters=_power_of_ten(best + center),
        tokens=_power_of_ten(np.polyval(line, best)),
        loss=float(c - b * b / (4 * a)),
        inside=bool(x.min() <= best + center <= x.max()),
    )


def _power_of_ten(x: float) -> float:
    """10^x within the range of numbers: a nearly flat parabola has its minimum anywhere."""
    return 10.0 ** float(np.clip(x, -300, 300))


def _power_law(budgets: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(log10 factor, exponent) by least squares of logarithms."""
    x = np.log10(budgets)
    exponent, offset = np.polyfit(x - x.mean(), np.log10(values), 1)
    return float(offset - exponent * x.mean()), float(exponent)


def _law(log_factor: float, exponent: float, samples: list[tuple[float, float]], level: float) -> PowerLaw:
    low, high = np.quantile([a for _, a in samples], [(1 - level) / 2, (1 + level) / 2])
    return PowerLaw(
        factor=10**log_factor, exponent=exponent, exponent_low=float(low), exponent_high=float(high),
        samples=tuple(samples), level=level,
    )  # fmt: skip
