"""Runs kept in an object store: workers whose folders are their own, as on machines without a shared file system."""

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import perceiver
from perceiver.config import Experiment, UserError, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.datasets import Dataset
from perceiver.extensions import Code
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.remote_copy import RemoteCopy, fetch_run
from perceiver.training.run import Training, save_experiment
from ray_jobs.evaluate import evaluate_run
from tests.support.logged import logged
from tests.support.preparing import evaluating_here
from tests.support.small import Call, image_experiment, leave
from tests.support.weights import full


def train_here(rank: int, world: int, port: int, config: dict, data: str, run: str, stop_at: int | None, output: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    experiment: Experiment = from_dict(config)
    manifest = Manifest.load(data)
    if rank == 0:
        save_experiment(Run(Path(run)), experiment, manifest, data)

    def die(step: int, metrics: dict[str, float]) -> None:
        if stop_at is not None and step >= stop_at:
            training.checkpointer.close()
            os._exit(9)

    training = Training(
        experiment, build_task(experiment), data, manifest, join_world(torch.device("cpu")), Path(run), read_here,
        [Call(after_validation=die)],
    )  # fmt: skip
    training.run()
    weights = {name: full(p).numpy() for name, p in training.state.model.named_parameters()}
    if rank == 0:
        np.savez(output, **weights)
    leave()


def run(experiment: Experiment, data: Path, folders: list[Path], output: Path, stop_at: int | None = None) -> dict[str, np.ndarray]:
    """Trains with a process for each of `folders`, its run folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=train_here, args=(rank, len(folders), port, to_dict(experiment), str(data), str(folder), stop_at, str(output))
        )
        for rank, folder in enumerate(folders)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [9 if stop_at is not None else 0] * len(folders)
    return {} if stop_at is not None else dict(np.load(output))


def stored(folder: Path) -> Experiment:
    experiment = image_experiment()
    return replace(experiment, run=replace(experiment.run, name="run", storage=f"file://{folder}"))


@pytest.fixture(scope="module")
def moved(images, tmp_path_factory):
    """The store of a run whose two workers died and went on on other machines; its final weights."""
    folder = tmp_path_factory.mktemp("machines")
    experiment = stored(folder / "store")
    run(experiment, images, [folder / name / "run" for name in "ab"], folder / "none.npz", stop_at=6)
    shutil.rmtree(folder / "a")  # this machine is lost; b takes the other rank, c is new
    return folder / "store", run(experiment, images, [folder / name / "run" for name in "cb"], folder / "end.npz")


def test_a_run_goes_on_on_other_machines_to_bitwise_the_same_weights(images, moved, tmp_path):
    plain = run(image_experiment(), images, [tmp_path / "plain"] * 2, tmp_path / "plain.npz")
    store, weights = moved
    assert weights.keys() == plain.keys() and all(np.array_equal(weights[name], plain[name]) for name in plain)
    losses = [r["loss"] for r in Run(store / "run").metrics() if "loss" in r]
    assert losses == [r["loss"] for r in Run(tmp_path / "plain").metrics() if "loss" in r] and len(losses) == 12


def test_the_store_keeps_the_newest_checkpoints_and_the_best_and_all_records(moved):
    store, _ = moved
    checkpoints = RemoteCopy(f"file://{store}", store / "run").checkpoints()
    best = min((r for r in Run(store / "run").metrics() if "val_loss" in r), key=lambda r: r["val_loss"])
    assert {c.step for c in checkpoints} == {9, 12} | {best["step"]}
    assert json.loads((store / "run" / "result.json").read_text())["step"] == 12
    assert list((store / "run" / "tensorboard").iterdir()) and (store / "run" / "experiment.json").is_file()


def test_a_run_of_the_store_is_loaded_by_its_uri(moved, monkeypatch, tmp_path):
    store, weights = moved
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    model = perceiver.load(f"file://{store}/run", "last")
    assert all(np.array_equal(p.numpy(), weights[name]) for name, p in model.model.named_parameters())
    assert fetch_run(f"file://{store}/other") is None


def test_a_run_of_the_store_is_evaluated_by_its_uri_and_the_result_kept_there(images, moved, monkeypatch, tmp_path):
    store, _ = moved
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    evaluating_here(monkeypatch)
    monkeypatch.setattr("ray_jobs.evaluate.Dataset.find", lambda experiment, _: Dataset(experiment, str(images), Manifest.load(images)))
    with logged() as said:
        metrics = evaluate_run(f"file://{store}/run/", "last")
    assert metrics["val_loss"] == pytest.approx([r["val_loss"] for r in Run(store / "run").metrics() if "val_loss" in r][-1])
    kept, examples = sorted((store / "run" / "evaluations").iterdir())
    assert examples.name == f"{kept.stem}.npz"
    assert json.loads(kept.read_text())["metrics"] == metrics and said[-1] == f"  written to file://{kept}"


def test_a_run_that_was_replaced_in_the_store_is_fetched_anew(images, moved, tmp_path):
    """Its checkpoints have the old one's names, and the machine still has a copy of the old one."""
    store, _ = moved
    shutil.copytree(store, tmp_path / "store")
    remote = RemoteCopy(f"file://{tmp_path}/store", tmp_path / "here" / "run")
    remote.fetch(None)
    marker = Path("checkpoints") / "step-00000012" / "checkpoint.json"
    (shard,) = (path.name for path in (tmp_path / "here" / "run" / marker).parent.glob("rank-00000*"))
    (tmp_path / "store" / "run" / marker).write_text(json.dumps({"step": 12, "metrics": {"val_loss": 9.0}}))
    (tmp_path / "store" / "run" / marker).with_name(shard).write_bytes(b"other")
    (tmp_path / "store" / "run" / "result.json").unlink()
    remote.fetch(None)
    here = tmp_path / "here" / "run"
    assert (here / marker).with_name(shard).read_bytes() == b"other" and not (here / "result.json").exists()
    assert (here / "experiment.json").is_file()


def test_code_of_the_users_is_in_the_store_and_on_any_machine_that_continues(tmp_path):
    one, other = (RemoteCopy(f"file://{tmp_path}/store", tmp_path / machine / "run") for machine in ("one", "other"))

    def save(**files: str) -> None:
        Run(one.folder).save_code(Code({name.replace("__", "/") + ".py": text for name, text in files.items()}))
        one.send_code()

    one.folder.mkdir(parents=True)
    save(mine="x = 1", part__of="y = 1")
    other.fetch(0)
    assert Run(other.folder).code() == Run(one.folder).code() and len(Run(other.folder).code().files) == 2
    save(mine="x = 2")  # it no longer needs the other file
    other.fetch(0)
    assert Run(other.folder).code().files == {"mine.py": "x = 2"}


def test_a_checkpoint_that_was_not_completed_in_the_store_is_not_there(images, moved, tmp_path):
    """Its files lie in the local folder and in the store, the marker in the local folder alone."""
    store, _ = moved
    shutil.copytree(store, tmp_path / "store")
    remote = RemoteCopy(f"file://{tmp_path}/store", tmp_path / "here" / "run")
    remote.fetch(None)
    steps = [c.step for c in remote.checkpoints()]
    (tmp_path / "store" / "run" / "checkpoints" / "step-00000012" / "checkpoint.json").unlink()
    remote.fetch()
    assert [c.step for c in remote.checkpoints()] == steps[:-1]
    assert sorted(p.name for p in (tmp_path / "here" / "run" / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in steps[:-1]]


def test_a_store_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="run.storage nowhere://bucket cannot be read"):
        RemoteCopy("nowhere://bucket", tmp_path / "run").check()
