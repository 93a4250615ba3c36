"""A class for each position of a list in a table: what is learned, what is measured, and what is left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.models import ArrayOutput, build_model
from perceiver.tasks import build_task
from perceiver.tasks.base import IGNORE_INDEX, dummy_split
from perceiver.tasks.check import check_task
from ray_jobs.cli import parse_experiment

ROWS, LENGTH = 30, 12


@pytest.fixture(scope="module")
def table() -> dict[str, list]:
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(ROWS, LENGTH))
    state = np.digitize(signal, [-0.5, 1.0])
    state[:, 5] = -1
    return {
        "signal": signal.tolist(), "state": state.tolist(), "high": (signal.mean(1) > 0).astype(int).tolist(),
        "grid": state.reshape(ROWS, 3, 4).tolist(), "none": np.full((ROWS, 2), -1).tolist(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(table, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("positions") / "own.parquet"
    fixed = pa.array(table["state"], pa.list_(pa.int16(), LENGTH))
    pq.write_table(pa.table({**table, "state": fixed}), path)
    return path


def parsed(file: Path, *words: str, preset: str = "tables") -> Experiment:
    small = ["--model.num-latents", "8", "--model.encoder.num-self-attention-layers-per-block", "1", "--model.input.columns", "signal"]
    return parse_experiment([preset, "--data.source", str(file), *small, *words], "ray_jobs.train")


def ready(file: Path, table, *words: str, preset: str = "tables"):
    """A measured experiment and its rows, numbered."""
    chosen = parsed(file, *(words or ("--task.targets", "state", "--task.loss", "positions")), preset=preset)
    examples = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    rows = chosen.task.rows(chosen.model, chosen.data).table(examples, "here")
    chosen = replace(chosen, task=chosen.task.measure(chosen.model, iter([rows.slice(0, 7), rows.slice(7)])))
    return chosen, rows.append_column("row", [list(range(ROWS))]).append_column("epoch", [[0] * ROWS])


def batch_of(task, rows, first=0, count=ROWS, size=ROWS, train=True):
    return task.collate(rows.slice(first, count), size, dummy_split(task.rows, ROWS), train, 0)


def test_sizes_and_shares_come_from_the_column(file: Path, table) -> None:
    chosen, rows = ready(file, table)
    assert chosen.model.output == ArrayOutput(num_outputs=3, num_queries=LENGTH, num_query_channels=64)
    state = np.array(table["state"])
    assert chosen.task.target_mean == pytest.approx([(state[state >= 0] == k).mean() for k in range(3)])
    assert from_dict(to_dict(chosen)) == chosen
    check_task(chosen, rows)
    assert parsed(file, "--task.targets", "grid", "--task.loss", "positions").model.output == chosen.model.output


def test_metrics_are_those_of_a_few_lines_whatever_the_batches(file: Path, table) -> None:
    chosen, rows = ready(file, table)
    task, model = build_task(chosen), build_model(chosen.model).eval()

    def metrics(parts: list[tuple[int, int, int]]) -> dict[str, float]:
        total: dict[str, np.ndarray] = {}
        for part in parts:
            batch = batch_of(task, rows, *part, train=False)
            with torch.no_grad():
                loss, sums = task.loss(model, batch)
            sums = {key: value for key, value in sums.items() if not key.startswith("each_")}
            for key, value in {"loss": loss.double(), "targets": task.num_targets(batch), **sums}.items():
                total[key] = total.get(key, 0) + value.numpy()
        assert len(task.details(total)) == 4
        return task.metrics(total, dummy_split(task.rows, ROWS))

    found = metrics([(0, ROWS, ROWS)])
    assert found == pytest.approx(metrics([(0, 3, 4), (3, 27, 32), (0, 0, 2)]), rel=1e-5)
    assert found.keys() == task.metric_directions.keys()
    with torch.no_grad():
        said = task.predict(model, batch_of(task, rows.drop_columns(["state"])))["class"].numpy()
    truth = np.array(table["state"])
    given = truth >= 0
    said, truth = said[given], truth[given]
    both, either = ([op((said == k), (truth == k)).sum() for k in range(3)] for op in (np.logical_and, np.logical_or))
    assert found["miou"] == pytest.approx(np.mean(np.divide(both, either)))
    assert found["f1"] == pytest.approx(np.mean([2 * b / (b + e) for b, e in zip(both, either, strict=True)]))
    assert found["acc"] == pytest.approx((said == truth).mean())
    assert found["baseline_acc"] == pytest.approx(np.bincount(truth).max() / len(truth))


def test_positions_without_a_class_change_nothing(file: Path, table) -> None:
    chosen, rows = ready(file, table)
    task, model = build_task(chosen), build_model(chosen.model)
    batch = batch_of(task, rows, size=ROWS + 2)
    assert task.num_targets(batch) == ROWS * (LENGTH - 1) and (batch["labels"][:, 5] == IGNORE_INDEX).all()
    logits = model(batch["inputs"]).detach()
    losses = []
    for change in (0.0, 5.0):
        other = logits.clone()
        other[:, 5, 0] += change
        other[ROWS:] += change
        task.logits = lambda model, batch, said=other: said
        losses.append(task.loss(model, batch)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("preset", ["tables", "table-heads"])
def test_a_few_rows_are_learned_alone_and_beside_another_head(file: Path, table, preset: str) -> None:
    words = (
        ("--task.targets", "state", "--task.loss", "positions")
        if preset == "tables"
        else ("--task.heads", "state=positions", "high=classes")
    )
    chosen, rows = ready(file, table, *words, preset=preset)
    task, model = build_task(chosen), build_model(chosen.model, 0)
    batch = batch_of(task, rows)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (task.loss(model, batch)[0] / task.num_targets(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        said = task.predict(model.eval(), batch)
    state, name = np.array(table["state"]), "class" if preset == "tables" else "state_class"
    share = (said[name].numpy() == state)[state >= 0].mean()
    assert share > max(np.bincount(state[state >= 0])) / (state >= 0).sum() + 0.15
    if preset == "table-heads":
        assert {"state_miou", "state_acc", "high_acc"} <= task.metric_directions.keys()
        assert task.higher_is_better("val_state_miou") and task.baseline_metrics["state_acc"][0] == "state_baseline_acc"


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ("signal", "'signal' and task.loss is positions, which needs a column of lists of whole numbers"),
        ("high", "'high' and task.loss is positions, which needs a column of lists"),
        ("none", "'none' and task.loss is positions, which needs"),
        ("state,grid", "names 2 columns and task.loss is positions, which takes one"),
    ],
)
def test_a_column_that_cannot_be_is_named(file: Path, targets: str, sentence: str) -> None:
    columns = ("--model.input.columns", "grid") if targets == "signal" else ()
    with pytest.raises(UserError, match=sentence):
        parsed(file, "--task.targets", targets, "--task.loss", "positions", *columns)


def test_a_class_that_training_did_not_have_is_named(file: Path, table) -> None:
    chosen, rows = ready(file, table)
    task, place = build_task(chosen), rows.column_names.index("state")
    other = rows.set_column(place, "state", pa.array([[7] * LENGTH] * ROWS, rows["state"].type))
    with pytest.raises(UserError, match="column 'state' has 7, and the classes of the training data are 0 to 2"):
        batch_of(task, other)
