"""Checkpoints: nothing foreign is run, nothing damaged is taken for whole, and metrics are those of the weights."""

import json
import os
import pickle
import re
import shutil
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.staging import StagingOptions

import perceiver
from perceiver.checkpoints import best_of, list_checkpoints
from perceiver.config import Experiment, UserError
from perceiver.data.manifest import Manifest
from perceiver.datasets import Dataset
from perceiver.inference.load import describe
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import make_val_loaders, read_here
from perceiver.training.checkpoint import staging_of
from perceiver.training.checkpoint_files import check_files, differing_weights, stored_shapes
from perceiver.training.init_from import find_start
from perceiver.training.metrics import evaluate
from perceiver.training.old_checkpoints import OldReader
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from perceiver.training.state import load_model
from ray_jobs import export, runs
from ray_jobs.evaluate import evaluate_run
from ray_jobs.preflight import check_experiment
from ray_jobs.train_checks import check_start, check_validation
from tests.conftest import ROOT
from tests.support.preparing import evaluating_here
from tests.support.small import heard, image_experiment, masked_experiment, text_experiment, write_stream
from tests.support.weights import full

OLD = ROOT / "tests/support/files/run-before-safetensors.tar.gz"
"""A run of 6 steps on `write_images` by two workers, of which step 3 is kept, written when checkpoints were DCP's own; with the
weights of that step."""


def train(experiment: Experiment, data: Path, folder: Path, stop_at: int | None = None, values: dict[int, float] | None = None):
    """Trains with one worker; its weights and what it said. `values`: of val_loss by step, in place of measured ones."""
    manifest = Manifest.load(data)
    save_experiment(Run(folder), experiment, manifest, str(data))
    with heard() as said:
        training = Training(
            experiment, build_task(experiment), str(data), manifest, join_world(torch.device("cpu")), folder, read_here, stop_at=stop_at
        )
        if values is not None:
            training.validate = lambda: {"val_loss": values[training.state.step]}
        training.run()
    return {name: full(p).numpy() for name, p in training.state.model.named_parameters()}, said


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder / "checkpoints")]


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """Folder of an undisturbed run, and its final weights."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return folder, train(image_experiment(), images, folder)[0]


@pytest.fixture(scope="module")
def halted(images, tmp_path_factory) -> Path:
    """A run that ended at step 9 of 12, with checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("runs") / "halted"
    train(image_experiment(), images, folder, stop_at=9)
    return folder


@pytest.fixture
def run(halted, tmp_path) -> Path:
    return Path(shutil.copytree(halted, tmp_path / "run"))


@pytest.fixture
def old(tmp_path) -> Path:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return (tmp_path / "run").rename(tmp_path / "old")


# What is written


def test_gpus_copy_to_pinned_memory_that_all_saves_use():
    assert staging_of(torch.device("cpu")) is None
    assert staging_of(torch.device("cuda", 1)) == StagingOptions(
        use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=True
    )


def test_checkpoints_that_are_copied_to_the_same_memory_each_have_their_own_steps_weights(plain, images, tmp_path, monkeypatch):
    """As on GPUs, but for the memory, which is pinned there."""
    folder, _ = plain
    monkeypatch.setattr("perceiver.training.checkpoint.staging_of", lambda device: StagingOptions(False, False, False, False))
    train(image_experiment(), images, tmp_path)
    assert steps(tmp_path) == steps(folder) and len(steps(folder)) > 1
    for one, other in zip(list_checkpoints(tmp_path / "checkpoints"), list_checkpoints(folder / "checkpoints"), strict=True):
        assert differing_weights(one.path, other.path)[1] == {}


def test_a_checkpoint_is_safetensors_that_any_tool_reads_and_no_pickle(plain):
    folder, weights = plain
    path = folder / "checkpoints" / "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]
    from safetensors.torch import load_file

    tensors = load_file(path / "rank-00000.safetensors")
    assert same({name: tensors[f"model.{name}"].numpy() for name in weights}, weights)
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("optimizer.state.")} == {"exp_avg", "exp_avg_sq", "step"}
    index = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    assert {name: tuple(entry.size) for name, entry in index.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert stored_shapes(path) == {name: value.shape for name, value in weights.items()}


def test_all_files_are_on_disk_before_the_marker_makes_them_count(images, tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", str(b))), move(a, b)))
    train(image_experiment(max_steps=3), images, tmp_path / "run")
    folder = str(tmp_path / "run" / "checkpoints" / "step-00000003")
    named = events.index(("name", f"{folder}/checkpoint.json"))
    before = {path for event, path in events[:named] if event == "sync"}
    assert {f"{folder}/rank-00000.safetensors", folder, str(Path(folder).parent)} <= before
    assert any("checkpoint.json" in path for path in before), "the marker's content"
    assert ("sync", folder) in events[named:], "the marker's name"


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "a flipped bit": ("rank-00000.safetensors", flip, "rank-00000.safetensors has changed"),
    "a cut file": ("rank-00000.safetensors", cut, "rank-00000.safetensors has [0-9,]+ bytes instead of"),
    "a missing file": ("rank-00000.safetensors", Path.unlink, "rank-00000.safetensors is missing"),
    "a foreign file": ("other.safetensors", lambda path: path.write_bytes(b""), "other.safetensors does not belong to it"),
    "an empty marker": ("checkpoint.json", lambda path: path.write_bytes(b""), "checkpoint.json is damaged"),
    "a cut marker": ("checkpoint.json", cut, "checkpoint.json is damaged"),
    "a list as marker": ("checkpoint.json", lambda path: path.write_text("[1, 2]"), "checkpoint.json is damaged"),
    "null as marker": ("checkpoint.json", lambda path: path.write_text("null"), "checkpoint.json is damaged"),
    "a marker without metrics": ("checkpoint.json", lambda path: path.write_text('{"step": 9}'), "checkpoint.json is damaged"),
    "a marker of another step": ("checkpoint.json", lambda path: path.write_text('{"step": 7, "metrics": {}}'), "its step is 7"),
    "a marker that names other folders": (
        "checkpoint.json",
        lambda path: path.write_text('{"step": 9, "metrics": {}, "files": {"../x": {"bytes": 1, "sha256": ""}}}'),
        "it names the file '../x'",
    ),
    "words for numbers": ("checkpoint.json", lambda path: path.write_text('{"step": "9", "metrics": {}}'), "its step is '9'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_weights(damage, run, images, plain):
    name, spoil, message = DAMAGES[damage]
    spoil(run / "checkpoints" / "step-00000009" / name)
    weights, said = train(image_experiment(), images, run)
    assert re.search(message, said[0])
    assert "step-00000009 is damaged and set aside as damaged-step-00000009" in said[0] and "continuing from step 6" in said[1]
    assert same(weights, plain[1])
    assert (run / "checkpoints" / "damaged-step-00000009").is_dir() and steps(run)[-2:] == [9, 12]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence_at_every_door(damage, run, images, tmp_path, monkeypatch):
    name, spoil, message = DAMAGES[damage]
    spoil(run / "checkpoints" / "step-00000009" / name)
    evaluating_here(monkeypatch)
    monkeypatch.setattr("ray_jobs.evaluate.Dataset.find", lambda experiment, _: Dataset(experiment, str(images), Manifest.load(images)))
    for door in (
        lambda: perceiver.load(run, "last"),
        lambda: describe(run, "last"),
        lambda: evaluate_run(run, "last"),
        lambda: export.main([str(run), "--checkpoint", "last", "--out", str(tmp_path / "out")]),
        lambda: check_start(starting_from(run), []),
    ):
        with pytest.raises(UserError, match=message) as caught:
            door()
        assert "\n" not in str(caught.value)
    assert perceiver.load(run, "6").provenance["step"] == 6


def starting_from(run: Path) -> Experiment:
    experiment = image_experiment()
    return replace(experiment, training=replace(experiment.training, init_from=str(run), init_checkpoint="last"))


def test_of_two_damaged_checkpoints_both_are_set_aside_and_the_run_begins_anew(run, images, plain):
    for step in (6, 9):
        flip(run / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    weights, said = train(image_experiment(), images, run)
    assert [line.split()[1] for line in said[:2]] == ["step-00000009", "step-00000006"] and said[2].startswith("starting")
    assert same(weights, plain[1])


def test_a_damaged_marker_or_run_does_not_hide_other_runs(run, halted):
    (run / "checkpoints" / "step-00000009" / "checkpoint.json").write_text("[]")
    for name, content in {
        "list": "[]",
        "null": "null",
        "cut": '{"experi',
        "lacking": "{}",
        "typed": '{"experiment": 3, "data": 1}',
    }.items():
        (run.parent / name).mkdir()
        (run.parent / name / "experiment.json").write_text(content)
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\nnot json\n[]\n{"step": "x"}\n{"step": 6, "loss": null}\n')
    found = {entry["name"]: entry for entry in runs.list_runs(run.parent)}
    assert found["run"]["checkpoint"] == 6 and found["run"]["step"] == 6
    assert {name for name, entry in found.items() if entry["status"] == "damaged"} == {"list", "null", "cut", "lacking", "typed"}
    assert runs.main([str(run.parent)]) == 0 and runs.main([str(run.parent), "--json"]) == 0
    with pytest.raises(UserError, match="experiment.json is damaged"):
        Run(run.parent / "cut").load()


def test_a_store_gives_what_is_damaged_here_again_and_the_checkpoint_before_what_is_damaged_there(images, plain, tmp_path):
    experiment = image_experiment()
    experiment = replace(experiment, run=replace(experiment.run, name="run", storage=f"file://{tmp_path}/store"))
    here, store = tmp_path / "here" / "run", tmp_path / "store" / "run" / "checkpoints"
    train(experiment, images, here, stop_at=9)
    flip(here / "checkpoints" / "step-00000009" / "rank-00000.safetensors")
    _, said = train(experiment, images, here, stop_at=9)
    assert "continuing from step 9" in said[0]
    flip(store / "step-00000009" / "rank-00000.safetensors")
    shutil.rmtree(here)
    weights, said = train(experiment, images, here)
    assert "damaged-step-00000009" in said[0] and "continuing from step 6" in said[1]
    assert (store / "damaged-step-00000009" / "checkpoint.json").is_file() and same(weights, plain[1])


def test_a_damaged_checkpoint_of_a_store_is_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    flip(run / "checkpoints" / "step-00000009" / "rank-00000.safetensors")
    with pytest.raises(UserError, match="step-00000009 is damaged: .*rank-00000.safetensors has changed"):
        perceiver.load(f"file://{run}", "last")
    assert perceiver.load(f"file://{run}", "6").provenance["step"] == 6


# Of before


def test_a_checkpoint_of_before_safetensors_loads_and_continues(old, images, tmp_path):
    stored = dict(np.load(old / "weights.npz"))
    loaded = perceiver.load(old, "last")
    assert same({name: p.numpy() for name, p in loaded.model.named_parameters()}, stored)
    assert stored_shapes(old / "checkpoints" / "step-00000003") == {name: value.shape for name, value in stored.items()}
    experiment, _ = Run(old).load()
    before = [record["loss"] for record in Run(old).metrics() if "loss" in record]
    shutil.rmtree(old / "tensorboard", ignore_errors=True)
    _, said = train(experiment, images, old)
    assert "continuing from step 3" in said[0] and steps(old) == [3, 6]
    # That many workers and another machine's arithmetic: what Adam has gathered must be there for the losses to be the same.
    after = [record["loss"] for record in Run(old).metrics() if "loss" in record]
    assert after[:3] == before[:3] and len(after) == 6
    np.testing.assert_allclose(after, before, rtol=1e-4)


def test_a_cut_shard_of_before_ends_no_run_and_is_one_sentence(old, images):
    shard = old / "checkpoints" / "step-00000003" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="checkpoint step-00000003 is damaged") as caught, warnings.catch_warnings(action="ignore"):
        perceiver.load(old, "last")
    assert "\n" not in str(caught.value)
    _, said = train(Run(old).load()[0], images, old)
    assert "set aside as damaged-step-00000003" in said[0] and said[1].startswith("starting")


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def in_index(folder: Path, proof: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Malice(proof)))


def in_a_field_of_the_index(folder: Path, proof: Path) -> None:
    index = OldReader(str(folder)).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(replace(index, planner_data=Malice(proof))))


def in_a_shard(folder: Path, proof: Path) -> None:
    """A tensor that the index calls a pickled object."""
    index: Metadata = OldReader(str(folder)).read_metadata()
    name = next(name for name in index.state_dict_metadata if name.startswith("model."))
    key = next(key for key in index.storage_data if key.fqn == name)
    content = pickle.dumps(Malice(proof))
    (folder / "__9_0.distcp").write_bytes(content)
    place = replace(index.storage_data[key], relative_path="__9_0.distcp", offset=0, length=len(content))
    places = {k: v for k, v in index.storage_data.items() if k.fqn != name} | {replace(key, fqn=name): place}
    entries = {**index.state_dict_metadata, name: BytesStorageMetadata()}
    (folder / ".metadata").write_bytes(pickle.dumps(replace(index, state_dict_metadata=entries, storage_data=places)))


@pytest.mark.parametrize("prepare", [in_index, in_a_field_of_the_index, in_a_shard])
def test_nothing_in_a_foreign_run_is_executed_at_any_door(prepare, old, images, tmp_path, monkeypatch):
    proof, folder = tmp_path / "executed", old / "checkpoints" / "step-00000003"
    pickle.loads(pickle.dumps(Malice(proof)))
    assert proof.exists()
    proof.unlink()
    prepare(folder, proof)
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    evaluating_here(monkeypatch)
    monkeypatch.setattr("ray_jobs.evaluate.Dataset.find", lambda experiment, _: Dataset(experiment, str(images), Manifest.load(images)))
    experiment = Run(old).load()[0]
    shapes = {name: value.shape for name, value in np.load(old / "weights.npz").items()}

    def start() -> None:
        begun = replace(experiment, training=replace(experiment.training, init_from=str(old), init_checkpoint="last"))
        found = find_start(begun, shapes)
        found.apply(build_task(begun).build_model())

    doors = {
        "load": lambda: perceiver.load(old),
        "a store": lambda: perceiver.load(f"file://{old}"),
        "evaluate": lambda: evaluate_run(old),
        "evaluate a store's": lambda: evaluate_run(f"file://{old}"),
        "export": lambda: export.main([str(old), "--out", str(tmp_path / "out")]),
        "init-from": start,
    }
    for name, door in doors.items():
        with pytest.raises(UserError) as caught, warnings.catch_warnings(action="ignore"):
            door()
        assert "\n" not in str(caught.value), name
    _, said = train(experiment, images, old)
    assert "set aside as damaged-step-00000003" in said[0]
    assert not proof.exists()


def test_the_message_names_the_file_and_the_class_that_it_asks_for(old, tmp_path):
    in_index(old / "checkpoints" / "step-00000003", tmp_path / "executed")
    message = "^checkpoint step-00000003 is damaged: .*step-00000003/.metadata asks for (pathlib|builtins).*which no checkpoint holds"
    for door in (lambda: perceiver.load(old), lambda: check_files(old / "checkpoints" / "step-00000003")):  # the latter before Ray starts
        with pytest.raises(UserError, match=message):
            door()


# Best


def watched(**run_fields) -> Experiment:
    experiment = image_experiment(max_steps=24)
    return replace(experiment, run=replace(experiment.run, **{"val_every": 4, "checkpoint_every": 3, "keep_checkpoints": 2} | run_fields))


def test_a_metric_on_record_is_that_of_the_weights_it_stands_beside(images, tmp_path):
    experiment = watched(keep_checkpoints=100)
    train(experiment, images, tmp_path / "run")
    recorded = {r["step"]: r["val_loss"] for r in Run(tmp_path / "run").metrics() if "val_loss" in r}
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert {c.step for c in checkpoints if c.metrics} <= recorded.keys() and any(not c.metrics for c in checkpoints)
    task, manifest = build_task(experiment), Manifest.load(images)
    model = perceiver.load(tmp_path / "run", "last").model
    for checkpoint in checkpoints:
        if checkpoint.metrics:
            load_model(checkpoint.path, model)
            loaders = make_val_loaders(experiment, task, str(images), manifest)
            metrics, _, _ = evaluate(task, model, loaders, join_world(torch.device("cpu")), read_here)
            assert metrics == checkpoint.metrics and metrics["val_loss"] == recorded[checkpoint.step]
    best = best_of(checkpoints, "val_loss")
    assert best.metrics["val_loss"] == min(recorded.values())


VALUES = {4: 3.0, 8: 1.0, 12: 2.0, 16: 1.0, 20: 1.5, 24: 1.2}
"""The best is at step 8, of two equal ones the earlier, and falls on no step of a usual checkpoint."""


@pytest.mark.parametrize("stops", [(), (8,), (12,), (16,), (20,), (4, 8, 12, 16, 20)], ids=str)
def test_the_best_is_the_same_with_and_without_interruption(stops, images, tmp_path):
    for stop in (*stops, None):
        train(watched(), images, tmp_path / "run", stop_at=stop, values=VALUES)
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert best_of(checkpoints, "val_loss").step == 8
    assert {c.step for c in checkpoints} == {8, 21, 24}


@pytest.mark.parametrize("stops", [(), (12,)], ids=str)
def test_the_best_few_are_kept_and_each_of_them_makes_a_checkpoint_of_its_own(stops, images, tmp_path):
    for stop in (*stops, None):
        train(watched(keep_best=3), images, tmp_path / "run", stop_at=stop, values=VALUES)
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [8, 16, 21, 24]


def test_what_is_no_number_is_never_the_best_and_null_on_record(images, tmp_path):
    values = {**VALUES, 4: float("nan"), 8: float("inf")}
    train(watched(), images, tmp_path / "run", values=values)
    assert best_of(list_checkpoints(tmp_path / "run" / "checkpoints"), "val_loss").step == 16

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["val_loss"] for r in records if "val_loss" in r][:3] == [None, None, 2.0]
    assert np.isnan(next(r["val_loss"] for r in Run(tmp_path / "run").metrics() if "val_loss" in r))
    train(watched(), images, tmp_path / "nan", values=dict.fromkeys(VALUES, float("nan")))
    assert json.loads((tmp_path / "nan" / "result.json").read_text(), parse_constant=refuse)["val_loss"] is None
    assert np.isnan(Run(tmp_path / "nan").result()["val_loss"])
    assert best_of(list_checkpoints(tmp_path / "nan" / "checkpoints"), "val_loss") is None


def test_of_accuracies_the_highest_is_the_best_also_of_a_mixtures_source(images, tmp_path):
    accuracies = {4: 0.1, 8: 0.9, 12: 0.3, 16: 0.9, 20: 0.5, 24: 0.2}
    experiment = watched(best_metric="val_acc/books")
    manifest = Manifest.load(images)
    training = Training(
        experiment, build_task(experiment), str(images), manifest, join_world(torch.device("cpu")), tmp_path / "run", read_here,
    )  # fmt: skip
    training.validate = lambda: {"val_acc/books": accuracies[training.state.step]}
    training.run()
    assert best_of(list_checkpoints(tmp_path / "run" / "checkpoints"), "val_acc/books").step == 8


def test_each_task_says_which_of_its_metrics_are_better_high():
    images, masked, causal = (build_task(e) for e in (image_experiment(), masked_experiment(), text_experiment()))
    assert images.higher_is_better("val_acc") and images.higher_is_better("val_acc/books") and masked.higher_is_better("val_acc")
    assert not any(task.higher_is_better(f"val_{name}") for task in (masked, causal) for name in ("loss", "bits_per_byte", "perplexity"))


def test_a_misspelt_best_metric_is_refused_with_the_nearest_name_and_the_list(tmp_path):
    experiment = image_experiment()

    def named(metric: str, **data) -> Experiment:
        return replace(experiment, run=replace(experiment.run, best_metric=metric), data=replace(experiment.data, **data))

    check_experiment(named("val_acc"))
    with pytest.raises(UserError, match="run.best-metric is 'val_los' and must be one of val_loss, val_acc, .*, did you mean val_loss?"):
        check_experiment(named("val_los"))
    text = replace(text_experiment(), run=replace(experiment.run, best_metric="val_loss/books"))
    with pytest.raises(UserError, match="'val_loss/books' and must be one of"):
        check_experiment(text)
    check_experiment(replace(text, data=replace(text.data, source="", mixture=("web=1", "books=1"))))


# Nothing to measure


def test_validation_data_without_a_target_has_no_metric_and_no_best(tmp_path):
    rng = np.random.default_rng(0)
    write_stream(tmp_path / "data", rng.integers(6, 262, 1000).astype(np.uint16), rng.integers(6, 262, 1).astype(np.uint16))
    _, said = train(text_experiment(), tmp_path / "data", tmp_path / "run")
    assert any("step 12: the validation data has no target" in line for line in said)
    assert all(c.metrics == {} for c in list_checkpoints(tmp_path / "run" / "checkpoints"))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"step": 12}


def test_validation_data_without_a_target_is_refused_before_ray(images, tmp_path):
    rng = np.random.default_rng(0)
    manifest = write_stream(tmp_path, rng.integers(6, 262, 1000).astype(np.uint16), rng.integers(6, 262, 1).astype(np.uint16))
    with pytest.raises(UserError, match="the validation data in .* has no target"):
        check_validation(text_experiment(), str(tmp_path), manifest)
    check_validation(image_experiment(), str(images), Manifest.load(images))


def test_evaluating_on_data_without_a_target_is_one_sentence(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    write_stream(tmp_path / "data", rng.integers(6, 262, 1000).astype(np.uint16), rng.integers(6, 262, 1).astype(np.uint16))
    train(text_experiment(max_steps=1), tmp_path / "data", tmp_path / "run")
    evaluating_here(monkeypatch)
    monkeypatch.setattr(
        "ray_jobs.evaluate.Dataset.find",
        lambda experiment, _: Dataset(experiment, str(tmp_path / "data"), Manifest.load(tmp_path / "data")),
    )
    with pytest.raises(UserError, match="the validation data in .* has no target"):
        evaluate_run(tmp_path / "run", "last")


def test_a_training_that_is_over_leaves_no_thread_and_no_group(images, tmp_path):
    """A notebook, say, has many after each other."""
    threads, groups = [], []
    for number in range(4):
        train(image_experiment(), images, tmp_path / str(number))
        threads.append(len(os.listdir("/proc/self/task")))
        groups.append(len(dist.distributed_c10d._world.pg_map))
    assert len(set(groups)) == 1
    assert threads[-1] <= threads[0] + 1  # one may be about to end; a group has three
