"""Learning from columns of a user's own table, which the command line names."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.models import ClassOutput, TableInput, ValueOutput, build_model
from perceiver.models.table_input import TableAdapter
from perceiver.tasks import build_task
from perceiver.tasks.base import dummy_split
from perceiver.tasks.check import check_task
from perceiver.tasks.moments import Moments
from perceiver.tasks.table_numbers import gaussian_crps, pinball
from ray_jobs.cli import parse_experiment

ROWS = 40


@pytest.fixture(scope="module")
def table() -> dict[str, list]:
    rng = np.random.default_rng(0)
    a = rng.normal(5000, 3, ROWS)
    return {
        "a": a.tolist(),
        "past": rng.normal(size=(ROWS, 6)).tolist(),
        "grid": rng.normal(size=(ROWS, 4, 3)).tolist(),
        "y": (a * 2).tolist(),
        "next": rng.normal(size=(ROWS, 2)).tolist(),
        "size": (a > 5000).astype(int).tolist(),
        "name": np.array(["low", "high"])[(a > 5000).astype(int)].tolist(),
        "seen": (a > 5001).astype(int).tolist(),
        "bad": ["x"] * ROWS,
    }


@pytest.fixture(scope="module")
def file(table: dict[str, list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "own.parquet"
    fixed = pa.array(table["past"], pa.list_(pa.float32(), 6))
    pq.write_table(pa.table({**table, "past": fixed}), path)
    return path


def parsed(file: Path, *words: str) -> Experiment:
    small = ["--model.num-latents", "4", "--model.encoder.num-self-attention-layers-per-block", "1"]
    return parse_experiment(["tables", "--data.source", str(file), *small, *words], "ray_jobs.train")


def measured(experiment: Experiment, table: dict[str, list]) -> Experiment:
    rows = experiment.task.rows(experiment.model, experiment.data)
    stored = rows.table([dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)], "here")
    return replace(experiment, task=experiment.task.measure(experiment.model, iter([stored.slice(0, 7), stored.slice(7)])))


def batch_of(experiment: Experiment, table: dict[str, list], size: int = ROWS):
    task = build_task(experiment)
    rows = task.rows.table([dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)], "here")
    return task, task.collate(rows, size, dummy_split(task.rows, ROWS), True, 0)


def test_sizes_come_from_the_columns_of_the_file(file: Path) -> None:
    model = parsed(file, "--model.input.columns", "a,past,grid", "--task.targets", "next").model
    assert model.input == TableInput(columns=("a", "past", "grid"), shapes=("scalar", "6", "4x3"))
    assert model.input.num_positions() == 1 + 6 + 4
    assert model.output == ValueOutput(num_values=2, num_query_channels=64)


def test_lines_of_json_are_a_table_like_parquet(file: Path, table: dict[str, list], tmp_path: Path) -> None:
    lines = tmp_path / "own.jsonl"
    rows = zip(*table.values(), strict=True)
    lines.write_text("".join(json.dumps(dict(zip(table, values, strict=True))) + "\n" for values in rows))
    words = ("--model.input.columns", "a,past,grid", "--task.targets", "name")
    assert parsed(lines, *words).model == parsed(file, *words).model


def test_without_columns_all_numbers_and_categories_that_are_no_targets_go_in(file: Path) -> None:
    found = parsed(file, "--task.targets", "y").model.input
    assert found.columns == ("a", "past", "grid", "next", "size", "name", "seen"), "bad has one value in all rows"
    assert found.shapes[5] == "category" and found.categories[0].values == ("high", "low")


@pytest.mark.parametrize(
    ("targets", "loss", "output", "names"),
    [
        ("name", "classes", ClassOutput(num_classes=2, num_query_channels=64), ("high", "low")),
        ("size", "classes", ClassOutput(num_classes=2, num_query_channels=64), None),
        ("y", "mse", ValueOutput(num_values=1, num_query_channels=64), None),
        ("y,next", "mse", ValueOutput(num_values=3, num_query_channels=64), None),
    ],
)
def test_what_is_learned_follows_from_the_type_of_the_target(file: Path, targets: str, loss: str, output, names) -> None:
    experiment = parsed(file, "--model.input.columns", "a", "--task.targets", targets)
    assert (experiment.task.loss, experiment.model.output, experiment.task.class_names) == (loss, output, names)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task.targets", "yy"], r"--task.targets names 'yy', which own.parquet does not have, did you mean y\? \(it has: a, past"),
        (["--model.input.columns", "b", "--task.targets", "y"], "--model.input.columns names 'b', which own.parquet does not have"),
        (
            ["--model.input.columns", "bad=number", "--task.targets", "y"],
            "'bad', which holds string .* in own.parquet and must hold numbers",
        ),
        (["--model.input.columns", "y", "--task.targets", "y"], "both name 'y'"),
        ([], "task.targets is empty"),
        (["--task.targets", "y", "--task.loss", "classes"], "classes are whole numbers from 0 to 9,999"),
        (["--task.targets", "past", "--task.loss", "classes"], "'past', which holds lists"),
        (["--task.targets", "size,seen", "--task.loss", "classes"], "names 2 columns"),
    ],
)
def test_a_mistake_in_the_columns_is_one_sentence(file: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parsed(file, *words)


def test_a_table_without_a_source_is_asked_for() -> None:
    with pytest.raises(UserError, match="data.source is empty"):
        parse_experiment(["tables"], "ray_jobs.train")


LOSSES = [("name", "auto"), ("size,seen", "labels")] + [("y,next", loss) for loss in ("mse", "mae", "huber", "gaussian", "quantiles")]


@pytest.mark.parametrize(("targets", "loss"), LOSSES)
def test_every_loss_keeps_the_contract_of_tasks(file: Path, table: dict[str, list], targets: str, loss: str) -> None:
    experiment = measured(parsed(file, "--model.input.columns", "a,past,grid", "--task.targets", targets, "--task.loss", loss), table)
    rows = experiment.task.rows(experiment.model, experiment.data)
    stored = rows.table([dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)], "here").slice(0, 2)
    check_task(experiment, stored.append_column("row", pa.array([0, 1])).append_column("epoch", pa.array([0, 0])))
    assert from_dict(to_dict(experiment)) == experiment


@pytest.mark.parametrize(("targets", "loss"), [(targets.removesuffix(",next"), loss) for targets, loss in LOSSES])
def test_every_loss_is_learned_below_guessing(file: Path, table: dict[str, list], targets: str, loss: str) -> None:
    experiment = measured(parsed(file, "--model.input.columns", "a", "--task.targets", targets, "--task.loss", loss), table)
    task, batch = batch_of(experiment, table)
    model = build_model(experiment.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        value = task.loss(model, batch)[0] / task.num_targets(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), experiment.optim.max_grad_norm)
        optimizer.step()
    with torch.no_grad():
        total, sums = task.loss(model, batch)
        said, alone = task.each(model, batch, sums), task.each(model, {name: values[:4] for name, values in batch.items()}, {})
    for name in ("loss", "targets"):
        torch.testing.assert_close(said[name][:4].double(), alone[name].double(), rtol=1e-4, atol=1e-5)
    arrays = {name: tensor.numpy() for name, tensor in sums.items()}
    metrics = task.metrics({**arrays, "loss": total.numpy(), "targets": task.num_targets(batch).numpy()}, dummy_split(task.rows, ROWS))
    if "acc" in metrics:
        assert float(said["acc"].sum() / said["targets"].sum()) == pytest.approx(metrics["acc"], abs=1e-6)
        assert metrics["acc"] > metrics["baseline_acc"] + 0.2
    else:
        assert metrics["mae"] < 0.6 * metrics["baseline_mae"] and metrics["r2"] > 0.5


def test_inputs_have_mean_zero_and_deviation_one_in_the_training_split(file: Path, table: dict[str, list]) -> None:
    experiment = measured(parsed(file, "--model.input.columns", "a,grid", "--task.targets", "y"), table)
    _, batch = batch_of(experiment, table)
    a, grid = batch["inputs"][:, :1], batch["inputs"][:, 1:].reshape(-1, 3)
    for values in (a, grid):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1]), atol=1e-4, rtol=0)


def test_metrics_are_in_the_units_of_the_target(file: Path, table: dict[str, list]) -> None:
    experiment = measured(parsed(file, "--model.input.columns", "a", "--task.targets", "y"), table)
    task, batch = batch_of(experiment, table)
    model = build_model(experiment.model)
    with torch.no_grad():
        total, sums = task.loss(model, batch)
        said = task.predict(model, batch)["prediction"].numpy()[:, 0]
    y = np.array(table["y"], np.float32).astype(np.float64)
    arrays = {name: tensor.numpy() for name, tensor in sums.items()}
    metrics = task.metrics({**arrays, "loss": total.numpy(), "targets": np.int64(ROWS)}, dummy_split(task.rows, ROWS))
    assert metrics["mae"] == pytest.approx(np.abs(said - y).mean(), rel=1e-4)
    assert metrics["rmse"] == pytest.approx(math.sqrt(((said - y) ** 2).mean()), rel=1e-4)
    assert metrics["r2"] == pytest.approx(1 - ((said - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-4)
    assert metrics["baseline_mae"] == pytest.approx(np.abs(y - y.mean()).mean(), rel=1e-4)


def test_missing_targets_and_padding_count_for_nothing(file: Path, table: dict[str, list]) -> None:
    experiment = measured(parsed(file, "--model.input.columns", "a", "--task.targets", "y,next"), table)
    task, batch = batch_of(experiment, table, ROWS + 3)
    assert int(task.num_targets(batch)) == 3 * ROWS
    model = build_model(experiment.model)
    whole = task.loss(model, batch)[0]
    batch["targets"][5, 0] = math.nan
    alone = {name: values[5:6] for name, values in batch.items()}
    rest = {name: torch.cat([values[:5], values[6:]]) for name, values in batch.items()}
    assert int(task.num_targets(batch)) == 3 * ROWS - 1
    torch.testing.assert_close(task.loss(model, batch)[0], task.loss(model, alone)[0] + task.loss(model, rest)[0])
    assert task.loss(model, batch)[0] < whole


def test_a_missing_number_of_the_input_is_masked() -> None:
    config = TableInput(columns=("a", "s"), shapes=("scalar", "2x2"), num_channels=8)
    adapter = TableAdapter(config)
    x = torch.tensor([[1.0, 2.0, 3.0, math.nan, 5.0]])
    adapted, missing = adapter(x)
    assert missing.tolist() == [[False, False, True]]
    model = build_model(replace(parse_only_model(), input=config))
    other = x.clone()
    other[0, 4] = -7.0  # beside the missing one, in the same position
    torch.testing.assert_close(model(x), model(other), rtol=0, atol=0)
    other[0, 1] = 9.0
    assert not torch.equal(model(x), model(other))
    assert adapted.shape == (1, 3, 8)


def parse_only_model():
    from perceiver.presets import PRESETS

    return PRESETS["tables"]().model


def test_what_the_training_measures_is_no_part_of_a_run_s_identity(file: Path, table: dict[str, list]) -> None:
    experiment = parsed(file, "--model.input.columns", "a", "--task.targets", "y")
    found = measured(experiment, table)
    assert found.task.target_mean != experiment.task.target_mean and found.identity == experiment.identity


def test_moments_are_those_of_all_rows_however_they_are_cut() -> None:
    values = np.random.default_rng(0).normal(1e6, 1e-2, (100, 3))
    values[::7, 1] = np.nan
    moments = Moments(3)
    for block in np.split(values, [1, 10, 64]):
        moments.add(block)
    np.testing.assert_allclose(moments.mean, np.nanmean(values, 0), rtol=1e-12)
    np.testing.assert_allclose(moments.scale, np.nanstd(values, 0), rtol=1e-6)


def test_the_crps_of_gaussians_is_the_integral_of_its_definition() -> None:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    for mean, deviation, target in ((0.0, 1.0, 0.3), (1.0, 2.0, -2.0)):
        below = torch.distributions.Normal(mean, deviation).cdf(x)
        expected = torch.trapezoid((below - (x >= target).double()) ** 2, x)
        found = gaussian_crps(*(torch.tensor(value, dtype=torch.float64) for value in (mean, deviation, target)))
        assert float(found) == pytest.approx(float(expected), abs=1e-4)


def test_the_pinball_loss_is_least_at_the_quantile() -> None:
    values = torch.arange(101, dtype=torch.float64)
    guesses = torch.arange(0, 100.5, 0.5, dtype=torch.float64)
    for share in (0.1, 0.5, 0.8):
        losses = [float(pinball(torch.full((101, 1), float(g), dtype=torch.float64), values, (share,)).sum()) for g in guesses]
        assert float(guesses[int(np.argmin(losses))]) == pytest.approx(100 * share, abs=1)
