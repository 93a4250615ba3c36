"""Forecasts and point clouds: what is learned, what is measured, and the data that is made for them."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from perceiver.config import Experiment, UserError
from perceiver.data.examples import ExampleSource
from perceiver.data.made import FUTURE, HELD_OUT, HOURS, PAST, SERIES, SHAPES, Seasons, Shapes, series
from perceiver.models import ArrayOutput, build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.tasks.base import EACH, dummy_split
from perceiver.tasks.check import check_task

NAMES = ("forecast-seasons", "points-shapes")
SOURCES: dict[str, ExampleSource] = {"forecast-seasons": Seasons(), "points-shapes": Shapes()}
COUNT = 11


@cache
def experiment_of(name: str) -> Experiment:
    experiment = PRESETS[name]()
    rows = rows_of(experiment, name)
    return replace(experiment, task=experiment.task.measure(experiment.model, iter([rows.slice(0, 4), rows.slice(4)])))


def rows_of(experiment: Experiment, name: str):
    examples = [example for example, _ in zip(SOURCES[name].examples("val", 0), range(COUNT), strict=False)]
    rows = experiment.task.rows(experiment.model, experiment.data).table(examples, "here")
    return rows.append_column("row", [list(range(COUNT))]).append_column("epoch", [[0] * COUNT])


def sums_of(name: str, parts: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Sums of a validation of rows (first, count, size of the batch), as a worker and as several add them up."""
    experiment = experiment_of(name)
    task, model = build_task(experiment), build_model(experiment.model).eval()
    rows, total = rows_of(experiment, name), {}
    for first, count, size in parts:
        batch = task.collate(rows.slice(first, count), size, dummy_split(task.rows, COUNT), False, 0)
        with torch.no_grad():
            loss, sums = task.loss(model, batch)
        sums = {key: value for key, value in sums.items() if not key.startswith(EACH)}
        for key, value in {"loss": loss.double(), "targets": task.num_targets(batch), **sums}.items():
            total[key] = total.get(key, 0) + value.numpy()
    return total


@pytest.mark.parametrize("name", NAMES)
def test_a_task_keeps_its_contract(name: str) -> None:
    check_task(PRESETS[name]())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_each_example_is_what_it_adds_alone(name: str) -> None:
    experiment = experiment_of(name)
    task, model = build_task(experiment), build_model(experiment.model, seed=0).eval()
    batch = task.collate(rows_of(experiment, name).slice(0, 3), 4, dummy_split(task.rows, COUNT), False, 0)
    with torch.no_grad():
        _, sums = task.loss(model, batch)
        said, alone = task.each(model, batch, sums), task.each(model, batch, {})
    assert {"loss", "targets"} == alone.keys() <= said.keys() and said["loss"][3] == said["targets"][3] == 0, "padding adds nothing"
    for key in alone:
        torch.testing.assert_close(said[key].double(), alone[key].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_and_samples_do_not_depend_on_how_rows_are_shared(name: str) -> None:
    task = build_task(experiment_of(name))
    whole, parts = sums_of(name, [(0, COUNT, COUNT)]), sums_of(name, [(0, 3, 4), (3, 8, 8), (0, 0, 4)])
    split = dummy_split(task.rows, COUNT)
    found = [task.metrics(sums, split) for sums in (whole, parts)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert set(found[0]) == set(task.metric_directions)
    (image,) = (sample.image for sample in task.samples(None, whole, split) if sample.image is not None)
    assert image.ndim == 3
    for key in whole:
        np.testing.assert_allclose(parts[key], whole[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_the_metrics_of_a_forecast_are_those_of_a_few_lines() -> None:
    experiment = experiment_of("forecast-seasons")
    task, model = build_task(experiment), build_model(experiment.model).eval()
    batch = task.collate(rows_of(experiment, "forecast-seasons"), COUNT, dummy_split(task.rows, COUNT), False, 0)
    with torch.no_grad():
        said = {name: values.double().numpy() for name, values in task.predict(model, batch).items()}
    past, future = batch["past"].double().numpy(), batch["future"].double().numpy()
    error = said["forecast"] - future
    rng = np.random.default_rng(0)
    one, two = said["forecast"] + said["deviation"] * rng.normal(size=(2, 4000, *future.shape))
    crps = np.abs(one - future).mean(0) - 0.5 * np.abs(one - two).mean(0)
    metrics = task.metrics(sums_of("forecast-seasons", [(0, COUNT, COUNT)]), dummy_split(task.rows, COUNT))
    assert metrics["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert metrics["rmse"] == pytest.approx(math.sqrt((error**2).mean()), rel=1e-4)
    assert metrics["mae_last"] == pytest.approx(np.abs(error[:, -1]).mean(), rel=1e-4)
    assert metrics["crps"] == pytest.approx(crps.mean(), rel=0.02)
    assert metrics["naive_mae"] == pytest.approx(np.abs(past[:, -FUTURE:] - future).mean(), rel=1e-4)
    z = error / said["deviation"]
    nats = 0.5 * z**2 + np.log(said["deviation"] / experiment.task.scale[0]) + 0.5 * math.log(2 * math.pi)
    assert metrics["loss"] == pytest.approx(nats.mean(), rel=1e-4)


def test_the_windows_that_are_drawn_are_the_first_and_others_at_equal_distances() -> None:
    sums, rows = sums_of("forecast-seasons", [(0, 5, 6), (5, 6, 6)]), list(Seasons().examples("val", 0))[:COUNT]
    for place, number in enumerate((0, 3, 6)):
        np.testing.assert_allclose(sums["shown_future"][place], rows[number]["future"][:, 0], rtol=1e-6)


def test_a_pass_that_leaves_out_the_windows_to_be_drawn_draws_others(monkeypatch) -> None:
    experiment = experiment_of("forecast-seasons")
    task, model = build_task(experiment), build_model(experiment.model).eval()
    rows, split, drawn = rows_of(experiment, "forecast-seasons"), dummy_split(build_task(experiment).rows, COUNT), []
    monkeypatch.setattr("perceiver.tasks.forecasting.forecasts", lambda **windows: drawn.append(windows) or windows)
    monkeypatch.setattr("perceiver.tasks.forecasting.pixels", lambda figure: np.zeros((1, 1, 3), np.uint8))
    for first, expected in ((1, [1, 2]), (3, [3, 4])):  # windows 0, 3 and 6 are those to be drawn
        batch = task.collate(rows.slice(first, 2), 4, split, False, 0)
        with torch.no_grad():
            sums = {key: value.numpy() for key, value in task.loss(model, batch)[1].items()}
        assert len(task.samples(model, sums, split)) == 1
        past = np.stack([list(Seasons().examples("val", 0))[number]["past"][:, 0] for number in expected])
        np.testing.assert_allclose(drawn.pop()["past"], past, rtol=1e-6)
    empty = task.collate(rows.slice(0, 0), 4, split, False, 0)
    with torch.no_grad():
        sums = {key: value.numpy() for key, value in task.loss(model, empty)[1].items()}
    assert task.samples(model, sums, split) == []


def test_normalisation_is_that_of_the_training_split() -> None:
    task = experiment_of("forecast-seasons").task
    past = np.concatenate([e["past"] for e, _ in zip(Seasons().examples("val", 0), range(COUNT), strict=False)]).astype(np.float64)
    assert (task.mean[0], task.scale[0]) == pytest.approx((past.mean(), past.std()), rel=1e-6)


def test_hours_that_validation_sees_are_in_no_window_for_training() -> None:
    firsts = {split: list(Seasons().examples(split, 0)) for split in ("train", "val")}
    assert {split: len(found) // SERIES for split, found in firsts.items()} == {"train": 161, "val": 17}
    last = firsts["train"][160]
    np.testing.assert_array_equal(np.concatenate([last["past"], last["future"]])[:, 0], series(0)[960 : 960 + PAST + FUTURE])
    assert 960 + PAST + FUTURE <= HOURS - HELD_OUT
    np.testing.assert_array_equal(firsts["val"][0]["past"][:, 0], series(0)[HOURS - HELD_OUT :][:PAST])


def test_a_cloud_keeps_its_class_whatever_the_order_of_its_points() -> None:
    experiment = experiment_of("points-shapes")
    task, model = build_task(experiment), build_model(experiment.model).eval()
    batch = task.collate(rows_of(experiment, "points-shapes"), COUNT, dummy_split(task.rows, COUNT), False, 0)
    turned = {**batch, "points": batch["points"].flip(1)}
    with torch.no_grad():
        torch.testing.assert_close(task.logits(model, batch), task.logits(model, turned), atol=1e-5, rtol=1e-4)


def test_shapes_are_all_there_and_centred() -> None:
    clouds = [example for example, _ in zip(Shapes().examples("val", 0), range(16), strict=False)]
    assert [cloud["label"] for cloud in clouds] == [*range(len(SHAPES))] * 2
    for cloud in clouds:
        np.testing.assert_allclose(cloud["points"].mean(0), 0, atol=1e-6)
        assert np.abs(cloud["points"]).max() == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_targets_are_predicted(name: str) -> None:
    experiment = experiment_of(name)
    task, model = build_task(experiment), build_model(experiment.model).eval()
    rows = rows_of(experiment, name).drop_columns(["future" if name == "forecast-seasons" else "label"])
    with torch.no_grad():
        found = task.predict(model, task.collate(rows, COUNT, dummy_split(task.rows, COUNT), False, 0))
    shapes = {"forecast-seasons": {"forecast": (COUNT, FUTURE, 1), "deviation": (COUNT, FUTURE, 1)}}
    expected = shapes.get(name, {"class": (COUNT,), "probabilities": (COUNT, len(SHAPES))})
    assert {key: tuple(values.shape) for key, values in found.items()} == expected


def test_a_mistake_in_a_forecast_names_its_field() -> None:
    experiment = PRESETS["forecast-seasons"]()
    with pytest.raises(UserError, match="task.season is 169 and must be from 1 to"):
        build_task(replace(experiment, task=replace(experiment.task, season=169)))
    wrong = replace(experiment.model, output=ArrayOutput(num_outputs=3, num_queries=FUTURE))
    with pytest.raises(UserError, match="model.output.num-outputs is 3 and must be 2"):
        build_task(replace(experiment, model=wrong))
