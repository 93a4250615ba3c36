"""What each example adds to a validation's sums: exact, in the order of the rows, whatever the number of workers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from perceiver.config import UserError
from perceiver.evaluations import evaluations, examples_file
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.base import EACH
from perceiver.training.batches import make_val_loaders, read_here
from perceiver.training.loop import Examples, validate
from perceiver.training.metrics import evaluate
from perceiver.training.parallel import World
from tests.support.small import (
    classification_experiment,
    image_experiment,
    masked_experiment,
    text_experiment,
    write_documents,
    write_images,
    write_stream,
)

ALONE = World(0, 1, torch.device("cpu"), None)


def prepare(kind, folder):
    ids = np.random.default_rng(0).integers(6, 262, 1000).astype(np.uint16)
    if kind == "images":
        return image_experiment(), write_images(folder)
    if kind == "documents":
        return classification_experiment(), write_documents(folder)
    if kind == "masked":
        return masked_experiment(), write_stream(folder, ids, ids[:400], length=32)
    made = text_experiment()
    stride = int(kind.partition("every ")[2] or made.model.max_seq_len)
    made = replace(made, task=replace(made.task, val_stride=stride))
    return made, write_stream(folder, ids, ids[:300])


def build(experiment):
    task = build_task(experiment)
    model = task.build_model()
    model.init_weights(0)
    return task, model.eval()


def measured(experiment, folder, manifest, task, model):
    kept = {}
    loaders = make_val_loaders(experiment, task, str(folder), manifest, numbered=True)
    metrics, sums, _ = evaluate(task, model, loaders, ALONE, read_here, keep=kept.__setitem__)
    return metrics, sums, kept[""]


@pytest.mark.parametrize("kind", ["images", "documents", "masked", "tokens", "tokens every 8", "tokens every 4", "tokens every 2"])
def test_examples_add_up_to_the_metrics_and_are_the_same_for_one_and_three_workers(kind, tmp_path):
    experiment, manifest = prepare(kind, tmp_path)
    task, model = build(experiment)
    metrics, sums, kept = measured(experiment, tmp_path, manifest, task, model)
    assert {len(values) for values in kept.values()} == {manifest.splits["val"].rows}
    assert kept["targets"].sum() == sums["targets"] and kept["loss"].sum() == pytest.approx(float(sums["loss"]), rel=1e-5)
    assert ("acc" in kept) == ("val_acc" in metrics)
    if "acc" in kept:
        assert kept["acc"].sum() / kept["targets"].sum() == pytest.approx(metrics["val_acc"], abs=1e-9)
    together = {}
    (_, loader), *_ = make_val_loaders(experiment, task, str(tmp_path), manifest, numbered=True)
    for rank in range(3):
        examples = Examples(loader.split.rows)
        validate(task, model, loader.steps(read_here, rank, 3, 0, loader.order.steps_per_epoch), ALONE, examples)
        for name, values in examples.together(ALONE).items():
            together[name] = together.get(name, 0) + values
    assert together.keys() == kept.keys()
    for name, values in kept.items():
        np.testing.assert_allclose(together[name], values, rtol=1e-4, atol=1e-5)


def test_an_example_stands_at_the_number_of_its_row(tmp_path):
    experiment, manifest = prepare("images", tmp_path)
    task, model = build(experiment)
    _, _, kept = measured(experiment, tmp_path, manifest, task, model)
    (_, loader), *_ = make_val_loaders(experiment, task, str(tmp_path), manifest)
    tables = [
        rows
        for rows in loader.batches(
            0, 1, 0, loader.order.steps_per_epoch, read_here(loader, loader.plan(0, 1, 0, loader.order.steps_per_epoch))
        )
    ]
    model.eval()
    seen = 0
    for table in tables:
        for i in range(table.num_rows):
            with torch.no_grad():
                loss, _ = task.loss(model, loader.collate(table.slice(i, 1), 1, 0))
            assert kept["loss"][table["row"][i].as_py()] == pytest.approx(float(loss), rel=1e-4)
            seen += 1
    assert seen == manifest.splits["val"].rows


def test_a_task_that_says_nothing_of_its_examples_is_asked_for_one_after_the_other(tmp_path, monkeypatch):
    experiment, manifest = prepare("images", tmp_path)
    task, model = build(experiment)
    expected = measured(experiment, tmp_path, manifest, task, model)[2]
    whole = type(task).loss

    def silent(self, model, batch):
        loss, sums = whole(self, model, batch)
        return loss, {name: values for name, values in sums.items() if not name.startswith(EACH)}

    monkeypatch.setattr(type(task), "loss", silent)
    found = measured(experiment, tmp_path, manifest, task, model)[2]
    assert found.keys() == {"loss", "targets"}
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_damaged_file_of_examples_is_one_sentence_and_one_that_pickles_is_not_executed(tmp_path):
    run = Run(tmp_path / "run")
    path = run.evaluation_file(20, "abc")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"checkpoint": "step-00000020", "data": {"digest": "abc"}, "metrics": {"val_loss": 1.0}, "sums": {}}))
    (found,) = evaluations(run)
    assert (found.step, found.digest, found.metrics, found.has_examples) == (20, "abc", {"val_loss": 1.0}, False)
    for content in ({"loss": np.ones(3)}, {"loss": np.ones(3), "targets": np.ones(2)}, {"loss": np.array([{}, None], dtype=object)}):
        np.savez(examples_file(path), **content)
        with pytest.raises(UserError, match="damaged"):
            found.examples()
    examples_file(path).write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="damaged"):
        found.examples()
    path.write_text("[]")
    assert evaluations(run) == []
