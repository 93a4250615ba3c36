"""The examples tagging.py, spans.py and machines.py: as a user's files outside of the package, trained for some steps."""

import sys

import pytest
import torch

from perceiver.experiments import find_experiment
from perceiver.models import build_model
from perceiver.tasks import build_task
from perceiver.tasks.base import dummy_split
from perceiver.tasks.check import check_task
from tests.support.outside import copy_examples, forget


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    monkeypatch.chdir(copy_examples(tmp_path / "mine"))
    yield tmp_path / "mine"
    forget()


@pytest.mark.parametrize(("name", "source"), [("tagging", "sentences"), ("spans", "questions")])
def test_an_example_keeps_its_contract_and_learns(name, source, folder):
    experiment = find_experiment(f"{name}.py:tiny")
    check_task(experiment)
    task, model = build_task(experiment), build_model(experiment.model, 0)
    found = [example for example, _ in zip(getattr(sys.modules[name], source)("train"), range(24), strict=False)]
    rows = task.rows.table(found, name)
    rows = rows.append_column("row", [list(range(24))]).append_column("epoch", [[0] * 24])
    batch, split = task.collate(rows, 24, dummy_split(task.rows, 24), True, 0), dummy_split(task.rows, 24)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    torch.set_num_threads(1)
    for _ in range(25):
        loss, _ = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / task.num_targets(batch)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    with torch.no_grad():
        said = task.predict(model.eval(), {"tokens": batch["tokens"]})
        loss, sums = task.loss(model, batch)
    totals = {key: value.double().numpy() for key, value in {**sums, "loss": loss, "targets": task.num_targets(batch)}.items()}
    metrics = task.metrics({key: value for key, value in totals.items() if not key.startswith("each_")}, split)
    assert set(metrics) == set(task.metric_directions) and all(0 <= value for value in metrics.values())
    if name == "spans":
        assert (said["stop"] >= said["start"]).all()
        text = bytes(int(i) - 6 for i in found[0]["tokens"][found[0]["start"] : found[0]["stop"] + 1])
        assert text.decode() in sys.modules[name].COLOURS
    else:
        texts = bytes(max(int(i) - 6, 32) for i in found[0]["tokens"]).decode()
        marked = "".join(c for c, tag in zip(texts, found[0]["tags"], strict=True) if tag == 1)
        assert marked in sys.modules[name].NAMES


def test_events_and_properties_are_answered_by_two_heads(folder):
    experiment = find_experiment("machines.py:tiny")
    check_task(experiment)
    task, model = build_task(experiment), build_model(experiment.model, 0)
    found = [example for example, _ in zip(sys.modules["machines"].readings("train"), range(32), strict=False)]
    rows = task.rows.table(found, "machines").append_column("row", [list(range(32))]).append_column("epoch", [[0] * 32])
    split = dummy_split(task.rows, 32)
    batch = task.collate(rows, 32, split, True, 0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.set_num_threads(1)
    for _ in range(40):
        optimizer.zero_grad()
        (task.loss(model, batch)[0] / task.num_targets(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        loss, sums = task.loss(model.eval(), batch)
        said = task.predict(model, task.collate(rows.drop_columns(["part", "hours"]), 32, split, False, 0))
    totals = {key: value.double().numpy() for key, value in {**sums, "loss": loss, "targets": task.num_targets(batch)}.items()}
    metrics = task.metrics({key: value for key, value in totals.items() if not key.startswith("each_")}, split)
    assert set(metrics) == set(task.metric_directions)
    assert metrics["part_acc"] > metrics["part_usual"] + 0.1 and metrics["hours_mae"] < 0.9 * metrics["hours_mean"]
    assert (said["part"] == batch["labels"]).float().mean().item() == pytest.approx(metrics["part_acc"])
    truth = 114 + 25 * batch["hours"]
    assert (said["hours"] - truth).abs().mean().item() == pytest.approx(metrics["hours_mae"], rel=1e-4)
