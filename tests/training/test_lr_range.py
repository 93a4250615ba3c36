"""The learning-rate range test: its rates, when it ends, what it suggests, and that it leaves nothing behind."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from perceiver.config import UserError
from perceiver.data.manifest import Manifest
from perceiver.datasets import Dataset
from perceiver.plots import range_curve
from perceiver.training.lr_range import RangeTest, ramp, range_test
from perceiver.training.parallel import join_world
from ray_jobs import lr_find
from tests.support.small import image_experiment


def test_rates_grow_by_the_same_multiple_from_the_first_to_the_last():
    rate = ramp(1e-6, 1.0, 7)
    assert [rate(step) for step in range(7)] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_third_of_the_rate_with_the_lowest_loss_is_suggested():
    rates = np.geomspace(1e-6, 1, 121)
    falling = 2 - 1 / (1 + np.exp(-4 * np.log10(rates / 1e-3)))
    growing = np.where(rates > 3e-2, 30 * (np.log10(rates / 3e-2)) ** 2, 0)
    noise = np.random.default_rng(0).normal(0, 0.02, 121)
    found = RangeTest(rates, falling + growing + noise, True)
    assert 5e-3 < found.lowest < 5e-2 and found.suggestion == pytest.approx(found.lowest / 3)
    assert RangeTest(rates, 2 + noise / 10 + growing, True).suggestion is None, "a loss that never falls suggests nothing"
    assert RangeTest(rates[:5], falling[:5], True).suggestion is None
    broken = found.losses.copy()
    broken[-1] = math.nan
    assert RangeTest(rates, broken, True).suggestion == pytest.approx(found.suggestion)
    assert range_curve(rates, broken, RangeTest(rates, broken, True).smoothed, found.lowest, found.suggestion, "x").axes


@pytest.mark.slow
def test_a_test_ends_where_the_loss_runs_away_and_learns_on_the_way(images):
    made = image_experiment()
    without_dropout = replace(made.model, encoder=replace(made.model.encoder, dropout=0.0))
    made = replace(made, model=without_dropout, optim=replace(made.optim, max_grad_norm=None), parallel=replace(made.parallel, workers=2))
    found = range_test(made, str(images), Manifest.load(images), join_world(torch.device("cpu")), 1e-3, 30, 200)
    assert found.diverged and 20 < len(found.rates) < 200
    assert found.rates[0] == pytest.approx(1e-3) and found.rates[1] / found.rates[0] == pytest.approx(3e4 ** (1 / 199))
    assert 1e-3 < found.suggestion < 0.1 and found.smoothed.min() < 0.7 * found.smoothed[0]


def test_the_command_draws_the_picture_and_prints_the_flag(images, tmp_path, monkeypatch, capsys):
    prepared = Dataset(image_experiment(), str(images), Manifest.load(images))
    monkeypatch.setattr(lr_find.Dataset, "find", lambda experiment: prepared)
    monkeypatch.setattr(lr_find, "parse_experiment", lambda words, prog: image_experiment())
    monkeypatch.chdir(tmp_path)
    begun = dist.is_initialized()
    status = lr_find.main(["quickstart", "--from", "1e-4", "--to", "10", "--steps", "30"])
    assert dist.is_initialized() == begun, "the process group that the test began is closed"
    printed = capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == ["lr-find-quickstart.png"]
    assert status == 0 and " quickstart --optim.lr " in printed
    assert lr_find._without(["a", "--optim.lr", "3", "--optim.lr=4", "--x", "--optim.lr"], "--optim.lr") == ["a", "--x"]
    first = Path("lr-find-quickstart.png").read_bytes()
    for _ in range(2):
        lr_find.main(["quickstart", "--from", "1e-3", "--to", "10", "--steps", "10"])
    assert sorted(path.name for path in Path().iterdir()) == [
        "lr-find-quickstart-2.png", "lr-find-quickstart-3.png", "lr-find-quickstart.png",
    ] and Path("lr-find-quickstart.png").read_bytes() == first  # fmt: skip
    for words, message in (
        (["--from", "1", "--to", "0.1"], "--from is 1 and --to 0.1"),
        (["--steps", "3"], "--steps is 3 and must be at least 10"),
        (["--out", "x.svg"], "--out is x.svg and must be a .png file"),
    ):
        with pytest.raises(UserError, match=message):
            lr_find.main(["quickstart", *words])
