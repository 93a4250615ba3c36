"""Several targets of a table at once: classes, labels and numbers on a shared encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.models import ClassOutput, ValueOutput, build_model
from perceiver.tasks import build_task
from perceiver.tasks.base import dummy_split
from perceiver.tasks.check import check_task
from ray_jobs.cli import parse_experiment

ROWS = 40


@pytest.fixture(scope="module")
def table() -> dict[str, list]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, ROWS))
    mass = 1000 + 50 * a
    mass[3] = np.nan
    return {
        "a": a.tolist(), "b": b.tolist(), "species": np.array(["cat", "dog", "owl"])[np.digitize(b, [-0.5, 0.5])].tolist(),
        "mass": mass.tolist(), "awake": (a > 0).astype(float).tolist(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(table, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "animals.parquet"
    pq.write_table(pa.table(table), path)
    return path


def parsed(file: Path, *heads: str) -> Experiment:
    small = ["--model.num-latents", "4", "--model.encoder.num-self-attention-layers-per-block", "1"]
    return parse_experiment(["table-heads", "--data.source", str(file), *small, "--task.heads", *heads], "ray_jobs.train")


def examples(table) -> list[dict]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def ready(file: Path, table, *heads: str):
    """A measured experiment, its task, its rows and a batch of all of them."""
    chosen = parsed(file, *(heads or ("species=classes", "mass=mse*0.5", "awake=labels*2")))
    rows = chosen.task.rows(chosen.model, chosen.data).table(examples(table), "here")
    chosen = replace(chosen, task=chosen.task.measure(chosen.model, iter([rows.slice(0, 7), rows.slice(7)])))
    task = build_task(chosen)
    return chosen, task, rows, task.collate(rows, ROWS, dummy_split(task.rows, ROWS), True, 0)


def test_heads_come_from_the_columns_of_the_file(file: Path) -> None:
    chosen = parsed(file, "species", "mass", "awake=labels")
    output = chosen.model.output
    assert output.names == ("species", "mass", "awake") and chosen.model.input.columns == ("a", "b")
    assert isinstance(output.heads[0], ClassOutput) and output.heads[0].num_classes == 3
    assert [type(head) for head in output.heads[1:]] == [ValueOutput, ValueOutput]
    assert [part.loss for part in chosen.task.parts] == ["classes", "mse", "labels"] and chosen.task.parts[0].class_names[0] == "cat"
    assert from_dict(to_dict(chosen)) == chosen


def test_it_keeps_the_contract_of_tasks(file: Path, table) -> None:
    chosen, _, rows, _ = ready(file, table)
    numbers = pa.array(np.arange(ROWS))
    check_task(chosen, rows.append_column("row", numbers).append_column("epoch", pa.array(np.zeros(ROWS, np.int64))))


def test_what_a_step_takes_is_counted_where_classes_are_texts(file: Path, table) -> None:
    _, task, *_ = ready(file, table)
    assert task.flops_per_example() > 0 and task.dummy_batch(3)["species.labels"].tolist() == [0, 0, 0]


def test_moments_of_each_target_are_those_of_the_training_split(file: Path, table) -> None:
    chosen, *_ = ready(file, table)
    mass = np.array(table["mass"], np.float32)
    assert chosen.task.parts[1].target_mean == pytest.approx((np.nanmean(mass),)) and chosen.task.parts[0].input_mean == pytest.approx(
        [np.mean(table["a"]), np.mean(table["b"])], abs=1e-6
    )
    assert chosen.task.parts[0].target_mean == pytest.approx(tuple(np.mean(np.array(table["species"]) == n) for n in ("cat", "dog", "owl")))


def test_the_loss_is_the_weighted_sum_of_what_each_head_alone_would_have(file: Path, table) -> None:
    chosen, task, _, batch = ready(file, table)
    model = build_model(chosen.model, 0)
    loss, _ = task.loss(model, batch)
    said = model(batch["inputs"])
    species = np.array(["cat", "dog", "owl"]).searchsorted(table["species"])
    classes = torch.nn.functional.cross_entropy(said["species"], torch.from_numpy(species), reduction="sum")
    mass = torch.tensor(table["mass"], dtype=torch.float32)
    there = ~mass.isnan()
    part = chosen.task.parts[1]
    squares = ((said["mass"][:, 0] - (mass - part.target_mean[0]) / part.target_scale[0])[there] ** 2).sum()
    labels = torch.nn.functional.binary_cross_entropy_with_logits(said["awake"][:, 0], torch.tensor(table["awake"]), reduction="sum")
    assert loss.item() == pytest.approx((classes + 0.5 * squares + 2 * labels).item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_head_reports_its_metrics_whatever_the_batches(file: Path, table) -> None:
    chosen, task, rows, _ = ready(file, table)
    model, split = build_model(chosen.model, 0).eval(), dummy_split(task.rows, ROWS)

    def metrics(parts: list[tuple[int, int, int]]) -> dict[str, float]:
        total: dict[str, np.ndarray] = {}
        for first, count, size in parts:
            batch = task.collate(rows.slice(first, count), size, split, False, 0)
            with torch.no_grad():
                loss, sums = task.loss(model, batch)
            each = task.each(model, batch, sums)
            assert each["loss"].sum().item() == pytest.approx(loss.item(), rel=1e-5)
            sums = {key: value for key, value in sums.items() if not key.startswith("each_")}
            for key, value in {"loss": loss.double(), "targets": task.num_targets(batch), **sums}.items():
                total[key] = total.get(key, 0) + value.numpy()
        return task.metrics(total, split)

    whole = metrics([(0, ROWS, ROWS)])
    assert whole == pytest.approx(metrics([(0, 3, 4), (3, 37, 40), (0, 0, 4)]), rel=1e-5), "a worker may have no row of a last batch"
    assert set(whole) <= set(task.metric_directions)
    assert {"species_acc", "species_f1", "mass_rmse", "mass_r2", "awake_acc", "awake_loss", "loss"} <= set(whole)
    assert task.higher_is_better("val_species_acc") and not task.higher_is_better("val_mass_rmse") and task.higher_is_better("val_mass_r2")


def test_a_few_rows_are_learned_by_all_heads_and_predicted_without_targets(file: Path, table) -> None:
    chosen, task, rows, batch = ready(file, table)
    model = build_model(chosen.model, 0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        loss, _ = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / ROWS).backward()
        optimizer.step()
    bare = rows.select(["a", "b"])
    with torch.no_grad():
        said = task.predict(model.eval(), task.collate(bare, ROWS, dummy_split(task.rows, ROWS), False, 0))
    names = np.array(["cat", "dog", "owl"])
    assert (names[said["species_class"].numpy()] == np.array(table["species"])).mean() > 0.9
    error = said["mass_prediction"][:, 0].numpy() - np.array(table["mass"])
    assert np.sqrt(np.nanmean(error**2)) < 15, "the deviation is 50"
    assert ((said["awake_probabilities"][:, 0] > 0.5).numpy() == np.array(table["awake"])).mean() > 0.9


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (["colour"], "--task.heads"),
        (["mass=tall"], r"task.heads has 'mass=tall', and each must be COLUMN, COLUMN=LOSS or COLUMN=LOSS\*WEIGHT"),
        (["mass=mse*0"], r"task.heads has 'mass=mse\*0'"),
        (["mass", "mass=mae"], "task.heads names 'mass' twice"),
        (["a", "b", "species", "mass", "awake"], "has no column beside the targets that a model can take"),
    ],
)
def test_heads_that_cannot_be_are_named(heads: list[str], message: str, file: Path) -> None:
    with pytest.raises(UserError, match=message):
        parsed(file, *heads)
