"""What is reached without learning: by the counts of the training data, beside every result."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from perceiver.config import RunConfig, TrainingConfig
from perceiver.data.components import components
from perceiver.datasets import data_folder
from perceiver.models import HeadsOutput, ValueOutput
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.tasks.baselines import beside
from perceiver.tasks.table_heads import TableHead
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs.evaluate import evaluate_run
from ray_jobs.preprocess import prepare
from ray_jobs.train import closing_lines
from tests.support.logged import logged
from tests.support.preparing import evaluating_here, experiment, load_prepared, serially, stream_of, texts, write_jsonl
from tests.support.small import classification_experiment, masked_experiment, text_experiment


def write_reviews(path, labels: list[int], seed: int = 0) -> None:
    write_jsonl(path, [{"text": text, "label": label} for text, label in zip(texts(len(labels), seed), labels, strict=True)])


def classifier(root, source, **data):
    base, small = experiment("txt-clf-imdb-all", root, source, length=32, **data), classification_experiment()
    task = replace(small.task, class_names=("negative", "positive"))
    training, run = TrainingConfig(global_batch_size=8, max_steps=2), RunConfig(val_every=2, checkpoint_every=2)
    return replace(base, model=small.model, task=task, training=training, run=run, parallel=small.parallel)


@pytest.fixture
def lopsided(tmp_path, monkeypatch):
    """Reviews of which three quarters are positive in training and two thirds negative in validation."""
    serially(monkeypatch)
    (tmp_path / "in").mkdir()
    write_reviews(tmp_path / "in" / "train.jsonl", [1, 1, 1, 0] * 10)
    write_reviews(tmp_path / "in" / "test.jsonl", [0, 0, 1] * 6, seed=1)
    chosen = classifier(tmp_path / "data", tmp_path / "in")
    return chosen, prepare(chosen)


def test_a_classifiers_baseline_answers_the_most_frequent_class_of_the_training_split(lopsided):
    chosen, manifest = lopsided
    found = build_task(chosen).baselines(components(data_folder(chosen), manifest))
    assert found.keys() == {f"val_{name}" for name in ("acc", "loss", "f1", "recall", "auroc", "ap")}
    assert (found["val_auroc"].value, found["val_recall"].value) == (0.5, 0.5)
    assert found["val_ap"].value == pytest.approx(6 / 18) and found["val_f1"].value == pytest.approx(0.25)
    assert found["val_acc"].value == pytest.approx(6 / 18) and found["val_acc"].means == "always answering 'positive'"
    frequencies = np.array([11, 31]) / 42  # one more of each class
    assert found["val_loss"].value == pytest.approx(-(12 * math.log(frequencies[0]) + 6 * math.log(frequencies[1])) / 18)
    assert closing_lines({"step": 2, "val_acc": 0.5}, found) == ["  val_acc  0.5       (always answering 'positive': 0.3333)"]


def test_what_a_pass_measures_without_the_model_stands_beside_the_metric_that_it_is_for():
    pairs = {"mae": ("naive_mae", "the last season again"), "rmse": ("naive_rmse", "the last season again")}
    metrics = {"step": 3, "val_mae": 1.5, "val_naive_mae": 2.0, "val_ema_mae": 1.4, "val_ema_naive_mae": 2.0, "val_rmse": 3.0}
    found = beside(metrics, pairs)
    assert closing_lines({"val_mae": 1.5}, found) == ["  val_mae  1.5       (the last season again: 2)"]
    assert found.keys() == {"val_mae", "val_ema_mae"}, "nothing stands beside what was not measured"
    mixed = beside({"val_mae/a.b": 1.0, "val_naive_mae/a.b": 4.0, "val_mae": 1.5, "val_naive_mae": 2.0}, pairs)
    assert {name: baseline.value for name, baseline in mixed.items()} == {"val_mae/a.b": 4.0, "val_mae": 2.0}


@pytest.mark.parametrize("name", ["forecast-seasons", "optical-flow-small", "multimodal-small", "tables", "table-heads"])
def test_baselines_of_a_pass_are_metrics_of_the_task_with_the_same_direction(name):
    task = build_task(with_a_table(name))
    assert task.baseline_metrics
    for metric, (of, means) in task.baseline_metrics.items():
        assert task.metric_directions[metric] == task.metric_directions[of] and means


def with_a_table(name):
    chosen = PRESETS[name]()
    if not name.startswith("table"):
        return chosen
    given = replace(chosen.model.input, columns=("a",), shapes=("scalar",))
    settings = {"targets": ("y",), "target_shapes": ("scalar",)}
    if name == "tables":
        model = replace(chosen.model, input=given, output=ValueOutput(num_values=1, num_query_channels=64))
        return replace(chosen, model=model, task=replace(chosen.task, loss="mse", **settings))
    head = TableHead(name="y", loss="mse", **settings)
    output = HeadsOutput(names=("y",), heads=(head.output(1, 64),))
    return replace(chosen, model=replace(chosen.model, input=given, output=output), task=replace(chosen.task, heads=("y",), parts=(head,)))


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_texts_baseline_guesses_by_the_frequencies_of_its_training_tokens(kind, tmp_path, monkeypatch):
    serially(monkeypatch)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(200)])
    chosen = experiment({"causal": "clm-wikitext", "masked": "mlm-imdb"}[kind], tmp_path / "data", tmp_path / "a.jsonl", val_fraction=0.2)
    small = {"causal": text_experiment, "masked": masked_experiment}[kind]()
    chosen = replace(chosen, model=small.model, task=small.task)
    manifest = prepare(chosen)
    folder = data_folder(chosen)
    found = build_task(chosen).baselines(components(folder, manifest))
    train, val = (np.bincount(stream_of(folder, manifest, split), minlength=262) for split in ("train", "val"))
    nats = -(val * np.log((train + 1) / (train + 1).sum())).sum() / val.sum()
    assert found["val_loss"].value == pytest.approx(nats, rel=1e-5)
    assert found["val_bits_per_byte"].value == pytest.approx(nats / math.log(2), rel=0.2), "a token of this text is about a byte"
    assert ("val_perplexity" in found) == (kind == "causal") and "val_acc" not in found
    assert all(math.isfinite(baseline.value) and "single tokens" in baseline.means for baseline in found.values())


def test_a_mixture_has_a_baseline_for_each_source_and_for_all_by_their_shares(tmp_path, monkeypatch):
    serially(monkeypatch)
    for name, labels in (("good", [1, 1, 1, 0] * 25), ("bad", [0, 0, 0, 0, 1] * 20)):
        write_reviews(tmp_path / f"{name}.jsonl", labels, seed=len(name))
    sources = (f"{tmp_path / 'good.jsonl'}=3", f"{tmp_path / 'bad.jsonl'}=1")
    chosen = classifier(tmp_path / "data", "", mixture=sources, val_fraction=0.3)
    manifest = prepare(chosen)
    found = build_task(chosen).baselines(components(data_folder(chosen), manifest))
    good, bad = found["val_acc/good.jsonl"], found["val_acc/bad.jsonl"]
    assert good.means == "always answering 'positive'" and bad.means == "always answering 'negative'"
    assert found["val_acc"].value == pytest.approx(0.75 * good.value + 0.25 * bad.value) and good.value != bad.value
    assert found["val_acc"].means == "guessing so in each data set"
    weighted = 0.75 * found["val_loss/good.jsonl"].value + 0.25 * found["val_loss/bad.jsonl"].value
    assert found["val_loss"].value == pytest.approx(weighted)
    assert found["val_loss"].means == found["val_loss/bad.jsonl"].means


def test_an_evaluation_prints_and_stores_baselines_and_counts_the_training_labels_on_other_files_too(lopsided, tmp_path, monkeypatch):
    chosen, manifest = lopsided
    folder, run_folder = load_prepared(chosen)[0], tmp_path / "run"
    save_experiment(Run(run_folder), chosen, manifest, folder)
    world = join_world(torch.device("cpu"))
    Training(chosen, build_task(chosen), folder, manifest, world, run_folder, read_here).run()
    evaluating_here(monkeypatch)
    with logged() as said:
        evaluate_run(run_folder, "last")
    assert any(line.split()[0] == "val_acc" and line.endswith("(always answering 'positive': 0.3333)") for line in said)
    stored = json.loads(next((run_folder / "evaluations").glob("*.json")).read_text())
    assert stored["baselines"]["val_acc"] == {"means": "always answering 'positive'", "value": pytest.approx(1 / 3)}
    write_reviews(tmp_path / "other.jsonl", [0] * 9 + [1], seed=2)
    with logged() as said:
        evaluate_run(run_folder, "last", ["--data.source", str(tmp_path / "other.jsonl")])
    assert [line.rpartition("(")[2] for line in said if line.split()[0] == "val_acc"][0] == "always answering 'positive': 0.1)"


def test_the_files_that_a_run_was_trained_on_beside_a_source_for_validation_may_be_evaluated(tmp_path, monkeypatch):
    serially(monkeypatch)
    train, held_out = (tmp_path / name for name in ("train.jsonl", "held-out.jsonl"))
    write_reviews(train, [1, 0] * 10)
    write_reviews(held_out, [0, 0, 1], seed=1)
    chosen = classifier(tmp_path / "data", train, val_source=str(held_out))
    manifest, run_folder = prepare(chosen), tmp_path / "run"
    folder = load_prepared(chosen)[0]
    save_experiment(Run(run_folder), chosen, manifest, folder)
    world = join_world(torch.device("cpu"))
    Training(chosen, build_task(chosen), folder, manifest, world, run_folder, read_here).run()
    evaluating_here(monkeypatch)
    for options, place, number in (([], held_out, 3), (["--data.source", str(train)], train, 20)):
        with logged() as said:
            evaluate_run(run_folder, "last", options)
        assert any(f"on {place}: {number} targets" in line for line in said), "what was measured is what is named"
