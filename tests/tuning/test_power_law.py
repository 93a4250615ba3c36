"""IsoFLOP fits on synthetic losses with known exponents."""

import numpy as np
import pytest

from perceiver.config import UserError
from tuning.power_law import Measurement, fit_study

BUDGETS = [1e15, 3e15, 1e16, 3e16, 1e17]


def measurements(exponent: float, noise: float, seed: int = 0, sizes: int = 7) -> list[Measurement]:
    """Losses that are parabolas over log10 N, with the minimum at N = 0.3 C^exponent, where C = 6 N D."""
    rng = np.random.default_rng(seed)
    found = []
    for budget in BUDGETS:
        best = np.log10(0.3 * budget**exponent)
        for x in best + np.linspace(-0.6, 0.7, sizes):
            loss = 3 - 0.1 * np.log10(budget / 1e15) + 0.2 * (x - best) ** 2 + noise * rng.standard_normal()
            found.append(Measurement(budget=budget, parameters=10**x, tokens=budget / 6 / 10**x, loss=loss))
    return found


@pytest.mark.parametrize("exponent", [0.35, 0.5, 0.7])
def test_exact_losses_give_the_exact_exponents(exponent):
    study = fit_study(measurements(exponent, noise=0), num_samples=20)
    assert study.parameters.exponent == pytest.approx(exponent, abs=1e-6)
    assert study.parameters.factor == pytest.approx(0.3, rel=1e-4)
    assert study.tokens.exponent == pytest.approx(1 - exponent, abs=1e-6)
    assert all(p.inside for p in study.parabolas)


def test_the_interval_holds_the_true_exponent_about_as_often_as_it_says():
    hits = 0
    for seed in range(40):
        law = fit_study(measurements(0.5, noise=0.005, seed=seed), num_samples=200).parameters
        hits += law.exponent_low <= 0.5 <= law.exponent_high
        assert law.exponent_low <= law.exponent <= law.exponent_high
    assert hits >= 34


def test_chinchilla_losses_give_the_closed_form_exponent():
    """L = E + A N^-a + B D^-b has its minimum at N ~ C^(b / (a + b)) (arXiv 2203.15556, equation 4)."""
    a, b = 0.34, 0.28
    found = []
    for budget in BUDGETS:
        center = 0.2 * budget ** (b / (a + b))
        for n in center * np.geomspace(0.5, 2, 7):
            d = budget / 6 / n
            found.append(Measurement(budget=budget, parameters=n, tokens=d, loss=1.69 + 406.4 / n**a + 410.7 / d**b))
    study = fit_study(found, num_samples=50)
    assert study.parameters.exponent == pytest.approx(b / (a + b), abs=0.01)
    assert study.tokens.exponent == pytest.approx(a / (a + b), abs=0.01)


def test_a_prediction_lies_in_its_interval_which_widens_away_from_the_data():
    law = fit_study(measurements(0.5, noise=0.01), num_samples=300).parameters
    near, far = law.predict(1e16), law.predict(1e21)
    assert near[1] < near[0] < near[2] and far[1] < far[0] < far[2]
    assert far[2] / far[1] > near[2] / near[1]
    assert near[0] == pytest.approx(0.3 * 1e8, rel=0.2)


def test_losses_that_are_no_parabolas_give_wide_intervals_and_no_nan():
    """Those of the small study in docs/tuning.md: resampled, some of its parabolas are nearly flat."""
    sizes = (2458, 5806, 15958, 50086)
    losses = {3e10: (3.0458, 2.8538, 3.1927, 3.1943), 6e10: (2.6845, 2.5682, 2.8367, 3.0886), 1.2e11: (2.6262, 2.4260, 2.4662, 2.7572)}
    found = [
        Measurement(budget=b, parameters=n, tokens=b / 6 / n, loss=loss)
        for b, row in losses.items()
        for n, loss in zip(sizes, row, strict=True)
    ]
    law = fit_study(found).parameters
    assert np.isfinite([law.exponent_low, law.exponent_high]).all() and law.exponent_high - law.exponent_low > 1


def test_too_few_sizes_budgets_or_no_minimum_are_refused_in_a_sentence():
    found = measurements(0.5, noise=0)
    with pytest.raises(UserError, match="at least 3"):
        fit_study([m for i, m in enumerate(found) if i % 7 < 2])
    with pytest.raises(UserError, match="at least 2 budgets"):
        fit_study(found[:7])
    falling = [Measurement(budget=m.budget, parameters=m.parameters, tokens=m.tokens, loss=-(np.log10(m.parameters) ** 2)) for m in found]
    with pytest.raises(UserError, match="no minimum"):
        fit_study(falling)


def test_a_diverged_training_does_not_count():
    found = measurements(0.5, noise=0)
    found[3] = Measurement(budget=found[3].budget, parameters=found[3].parameters, tokens=1.0, loss=float("nan"))
    assert fit_study(found, num_samples=10).parameters.exponent == pytest.approx(0.5, abs=1e-6)
