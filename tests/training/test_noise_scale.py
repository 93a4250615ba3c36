"""The gradient noise scale: that it is what its definition says, whatever the workers and micro-batches, and that it changes no bit."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from perceiver.config import Experiment, ParallelConfig, UserError
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import make_train_loader, read_here
from perceiver.training.noise_scale import GRADIENT, NOISE, SCALE, NoiseScale
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state
from ray_jobs.cli import parse_experiment
from ray_jobs.preflight import check_experiment
from tests.support.small import image_experiment
from tests.support.weights import full
from tests.training.test_callbacks import same, train
from tests.training.test_training import run


def measured(dropout: float = 0.0, micro: int | None = None, batch: int = 12, **settings) -> Experiment:
    made = image_experiment(global_batch_size=batch)
    model = replace(made.model, encoder=replace(made.model.encoder, dropout=dropout))
    chosen = {"noise_scale": True, "log_every": 2, **settings}
    return replace(made, model=model, parallel=ParallelConfig(micro_batch_size=micro), run=replace(made.run, **chosen))


def records(folder: Path) -> dict[int, dict[str, float]]:
    return {record["step"]: record for record in Run(folder).metrics() if NOISE in record}


def halves(each: torch.Tensor) -> tuple[float, float]:
    """The estimates by their definition, from the squared norms of the gradients of the batch and of its halves."""
    size, large = len(each), each.mean(0).square().sum()
    small = (each[::2].mean(0).square().sum() + each[1::2].mean(0).square().sum()) / 2
    return ((size * large - size / 2 * small) / (size / 2)).item(), ((small - large) / (2 / size - 1 / size)).item()


def test_the_definition_estimates_the_true_gradient_and_its_covariance_without_bias():
    torch.manual_seed(0)
    true = torch.linspace(-1, 1, 5, dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    found = np.array([halves(true + spread * torch.randn(8, 5, dtype=torch.float64)) for _ in range(4000)])
    expected = [true.square().sum().item(), spread.square().sum().item()]
    assert np.all(np.abs(found.mean(0) - expected) < 4 * found.std(0) / math.sqrt(4000))


def test_a_step_is_measured_by_the_gradients_of_its_examples(images, tmp_path):
    """Against the gradients of single examples, without any code of the training."""
    made = measured(log_every=1)
    train(replace(made, training=replace(made.training, max_steps=1)), images, tmp_path)
    world = join_world(torch.device("cpu"))
    task, state = build_task(made), build_state(made, build_task(made), world)
    (batch,) = next(iter(make_train_loader(made, task, str(images), Manifest.load(str(images))).steps(read_here, 0, 1, 0, 1)))
    each = []
    for number in range(12):
        state.model.zero_grad()
        task.loss(state.model, {name: value[number : number + 1] for name, value in batch.items()})[0].backward()
        each.append(torch.cat([full(p.grad).flatten() for p in state.model.parameters()]))
    gradient, noise = halves(torch.stack(each).double())
    record = records(tmp_path)[1]
    assert record[GRADIENT] == pytest.approx(gradient, rel=1e-4) and record[NOISE] == pytest.approx(noise, rel=1e-4)
    assert noise > 0 and ((gradient <= 0) or record[SCALE] == pytest.approx(noise / gradient, rel=1e-4))


def test_halves_of_an_odd_batch_count_by_their_sizes(images):
    made = measured(batch=5)
    world = join_world(torch.device("cpu"))
    task, state = build_task(made), build_state(made, build_task(made), world)
    batches = next(iter(make_train_loader(made, task, str(images), Manifest.load(str(images))).steps(read_here, 0, 1, 0, 1)))
    each = []
    for number in range(5):
        state.model.zero_grad()
        task.loss(state.model, {name: value[number : number + 1] for name, value in batches[0].items()})[0].backward()
        each.append(torch.cat([full(p.grad).flatten() for p in state.model.parameters()]).double())
    state.model.zero_grad()
    first, second = torch.stack(each[::2]).mean(0), torch.stack(each[1::2]).mean(0)
    found = NoiseScale(5, 0, None, ()).estimates(task, state.model, batches, world)
    assert found[GRADIENT].item() == pytest.approx((first @ second).item(), rel=1e-4)
    assert found[NOISE].item() == pytest.approx(((first - second).square().sum() / (1 / 3 + 1 / 2)).item(), rel=1e-4)


def test_to_measure_it_changes_no_bit_and_a_continued_run_has_the_same_averages(images, tmp_path):
    plain = train(measured(0.1, batch=36, noise_scale=False), images, tmp_path / "plain")
    assert same(plain, train(measured(0.1, batch=36), images, tmp_path / "whole"))
    assert not records(tmp_path / "plain")
    train(measured(0.1, batch=36), images, tmp_path / "killed", kill_at=8)
    assert same(plain, train(measured(0.1, batch=36), images, tmp_path / "killed"))
    whole, killed = records(tmp_path / "whole"), records(tmp_path / "killed")
    names = (GRADIENT, NOISE, SCALE)
    assert list(whole) == list(killed) == [2, 4, 8, 10] and any(SCALE in record for record in whole.values())  # step 6 is partial
    assert [[record.get(name) for name in names] for record in whole.values()] == [
        [record.get(name) for name in names] for record in killed.values()
    ]


def check_same(one: Path, other: Path) -> None:
    first, second = records(one), records(other)
    assert first.keys() == second.keys() and len(first) == 6
    for step, record in first.items():
        for name in (GRADIENT, NOISE):
            assert second[step][name] == pytest.approx(record[name], rel=2e-4, abs=1e-7), (step, name)


def test_micro_batches_of_any_size_measure_the_same(images, tmp_path):
    train(measured(), images, tmp_path / "one")
    for micro in (1, 5, 6):  # every second example is none of some micro-batches of one example
        train(measured(micro=micro), images, tmp_path / f"micro-{micro}")
        check_same(tmp_path / "one", tmp_path / f"micro-{micro}")


@pytest.mark.slow
def test_workers_of_any_number_measure_the_same(images, tmp_path):
    train(measured(), images, tmp_path / "one")
    run(measured(), images, tmp_path / "two", world=2)
    check_same(tmp_path / "one", tmp_path / "two")
    run(measured(micro=2), images, tmp_path / "three", world=3)
    check_same(tmp_path / "one", tmp_path / "three")


def test_the_averages_are_of_both_estimates_and_not_of_their_ratio():
    scale = NoiseScale(8, 0, None, [{GRADIENT: 1.0, NOISE: 10.0}, {"loss": 1.0}, {GRADIENT: None, NOISE: 1.0}])
    assert scale.scale(3.0, 20.0) == {SCALE: pytest.approx((0.09 * 10 + 0.1 * 20) / (0.09 * 1 + 0.1 * 3))}
    assert NoiseScale(8, 0, None, ()).scale(-1.0, 20.0) == {}


def test_batches_that_are_not_full_are_not_measured_and_one_example_is_refused():
    assert [step for step in range(1, 9) if NoiseScale(4, 0, 10, ()).measures(step)] == [1, 2, 4, 5, 7, 8]
    assert all(NoiseScale(5, 0, 10, ()).measures(step) for step in range(1, 9))
    with pytest.raises(
        UserError, match="--run.noise-scale compares the halves of a batch.* training.global-batch-size is 1 and must be at least 2"
    ):
        check_experiment(parse_experiment(["quickstart", "--run.noise-scale", "True", "--training.global-batch-size", "1"], "x"))


def test_no_gradient_is_left_behind(images):
    made = measured()
    world = join_world(torch.device("cpu"))
    task, state = build_task(made), build_state(made, build_task(made), world)
    batches = next(iter(make_train_loader(made, task, str(images), Manifest.load(str(images))).steps(read_here, 0, 1, 0, 1)))
    assert NoiseScale(12, 0, None, ()).estimates(task, state.model, batches, world)[NOISE] > 0
    assert isinstance(state.model, nn.Module) and all(parameter.grad is None for parameter in state.model.parameters())
