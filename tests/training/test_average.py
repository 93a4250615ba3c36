"""Averaged weights beside those that are trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import perceiver
from perceiver.config import Experiment, Sgd, UserError
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import make_val_loaders, read_here
from perceiver.training.metrics import evaluate
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs.preflight import check_experiment
from tests.support.small import Call, image_experiment
from tests.support.weights import full
from tests.training.test_training import run as run_workers

DECAY = 0.8


def experiment(decay: float | None = DECAY, dropout: float = 0.1, sgd: bool = False) -> Experiment:
    made = image_experiment()
    encoder = replace(made.model.encoder, dropout=dropout)
    optim = replace(made.optim, ema_decay=decay)
    if sgd:  # whose steps are as exact as its gradients
        optim = replace(optim, optimizer=Sgd(), lr=0.05)
    return replace(made, optim=optim, model=replace(made.model, encoder=encoder))


def train(made: Experiment, data: Path, folder: Path, stop_at: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The weights after each step, those before the first one included."""
    weights, manifest, world = [], Manifest.load(data), join_world(torch.device("cpu"))
    save_experiment(Run(folder), made, manifest, str(data))

    def note(*_: object) -> None:
        named = training.state.model.named_parameters()
        weights.append({name: full(p).clone() for name, p in named})

    call = Call(on_start=note, after_step=note)
    training = Training(made, build_task(made), str(data), manifest, world, folder, read_here, [call], stop_at)
    training.run()
    return weights


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, train(experiment(), images, folder)


def averages(folder: Path, which: str = "last:ema") -> dict[str, torch.Tensor]:
    return dict(perceiver.load(folder, which, device="cpu").model.named_parameters())


def test_the_average_is_the_exponential_one_of_the_weights_of_all_steps(trained):
    folder, weights = trained
    expected = dict(weights[0])
    for step, current in enumerate(weights[1:]):
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * expected[name].double() + (1 - decay) * current[name].double() for name in expected}
    found = averages(folder)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-5, atol=1e-7), name
    assert any(not torch.equal(found[name], weights[-1][name]) for name in found)


def test_an_average_changes_no_bit_of_the_training(trained, images, tmp_path):
    _, weights = trained
    without = train(experiment(decay=None), images, tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for one, other in zip(weights, without, strict=True) for name in one)


def test_an_average_that_is_continued_is_that_of_the_uninterrupted_run_bit_for_bit(trained, images, tmp_path):
    folder, _ = trained
    train(experiment(), images, tmp_path / "run", stop_at=7)
    train(experiment(), images, tmp_path / "run")
    one, other = averages(folder), averages(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_metrics_of_averaged_weights_are_recorded_and_are_what_the_loaded_ones_reach(trained, images):
    folder, _ = trained
    made, world = experiment(), join_world(torch.device("cpu"))
    task = build_task(made)
    feeds = make_val_loaders(made, task, str(images), Manifest.load(images))
    result = Run(folder).result()
    for which, mark in (("last", "val_"), ("last:ema", "val_ema_")):
        metrics, _, _ = evaluate(task, perceiver.load(folder, which, device="cpu").model, feeds, world, read_here)
        assert {name.replace("val_", mark): value for name, value in metrics.items()}.items() <= result.items()
    assert result["val_ema_loss"] != result["val_loss"]
    higher = Run(folder).checkpoint("last", "val_loss").higher_is_better
    assert {"val_acc", "val_ema_acc"} <= higher and not {"val_loss", "val_ema_loss"} & higher


def test_two_workers_keep_the_average_of_one(images, tmp_path):
    for workers in (1, 2):
        folder = tmp_path / f"run-{workers}"
        run_workers(experiment(dropout=0.0, sgd=True), images, folder, world=workers)
        save_experiment(Run(folder), experiment(dropout=0.0, sgd=True), Manifest.load(images), str(images))
    one, two = averages(tmp_path / "run-1"), averages(tmp_path / "run-2")
    assert all(np.allclose(one[name].numpy(), two[name].numpy(), rtol=0, atol=2e-5) for name in one)


def test_averaged_weights_are_exported_and_named_where_there_are_none(trained, images, tmp_path):
    folder, _ = trained
    exported = perceiver.load(folder, "last:ema", device="cpu").export(tmp_path / "export")
    one, other = averages(folder), dict(perceiver.load(exported, device="cpu").model.named_parameters())
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert perceiver.load(folder, "best:ema", device="cpu").provenance["weights"] == "averaged"
    train(experiment(decay=None), images, tmp_path / "raw", stop_at=1)
    with pytest.raises(UserError, match="has no averaged weights"):
        perceiver.load(tmp_path / "raw", "last:ema", device="cpu")


def test_a_fork_of_a_run_without_an_average_begins_one_from_its_weights(images, tmp_path):
    train(experiment(decay=None), images, tmp_path / "parent", stop_at=6)
    made = experiment()
    fork = replace(made, training=replace(made.training, fork=str(tmp_path / "parent")))
    train(fork, images, tmp_path / "fork", stop_at=7)
    parent, average = perceiver.load(tmp_path / "parent", "6", device="cpu"), averages(tmp_path / "fork")
    last = dict(perceiver.load(tmp_path / "fork", "last", device="cpu").model.named_parameters())
    for name, begun in parent.model.named_parameters():
        assert torch.allclose(average[name], begun.lerp(last[name], 1 - min(DECAY, 7 / 16)), rtol=1e-5, atol=1e-7), name


def test_the_metric_of_averaged_weights_may_name_the_best_and_decays_are_checked():
    made = experiment()
    check_experiment(replace(made, run=replace(made.run, name="x", best_metric="val_ema_acc")))
    with pytest.raises(UserError, match="run.best-metric is 'val_ema_acc' and must be one of"):
        check_experiment(replace(experiment(decay=None), run=replace(made.run, name="x", best_metric="val_ema_acc")))
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="--optim.ema-decay is"):
            check_experiment(experiment(decay=decay))
