"""Profiles of some steps, and norms of the gradient by layer: what they hold, and that they change no bit."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perceiver.config import Experiment, RunConfig, UserError
from perceiver.runs import Run
from perceiver.training.profiling import MemorySnapshot, check_profile, check_snapshot
from ray_jobs.cli import parse_experiment
from ray_jobs.preflight import check_experiment
from tests.support.small import heard, image_experiment
from tests.training.test_callbacks import same, train
from tests.training.test_training import run


def with_run(**settings) -> Experiment:
    made = image_experiment()
    return replace(made, run=replace(made.run, **settings))


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> dict[str, np.ndarray]:
    return train(with_run(), images, tmp_path_factory.mktemp("plain"))


def test_a_profile_has_the_steps_that_were_asked_for_and_leaves_the_weights_what_they_are(plain, images, tmp_path):
    with heard() as lines:
        weights = train(with_run(profile="4..6"), images, tmp_path)
    assert same(plain, weights)
    folder = Run(tmp_path).profile_folder
    events = json.loads(gzip.decompress((folder / "trace-4-6.json.gz").read_bytes()))["traceEvents"]
    marks = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert marks == {f"ProfilerStep#{step}" for step in (4, 5, 6)} and any(event.get("name") == "aten::addmm" for event in events)
    table = (folder / "operators-4-6.txt").read_text().splitlines()
    assert table[0] == "operators of steps 4 to 6 that cost most:" and len(table) == 12
    shares = [float(line.split()[-1].rstrip("%")) for line in table[2:]]
    assert shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.1
    assert table[0] in lines


@pytest.mark.slow
def test_a_start_in_the_middle_of_the_steps_profiles_the_others(images, tmp_path):
    made, folder = with_run(profile="8..12"), Run(tmp_path).profile_folder
    train(made, images, tmp_path, kill_at=11)
    assert [path.name for path in sorted(folder.iterdir())] == ["operators-8-11.txt", "trace-8-11.json.gz"]
    train(made, images, tmp_path)
    assert [path.name for path in sorted(folder.iterdir())] == ["operators-10-12.txt", "trace-10-12.json.gz"]


def test_steps_to_profile_that_are_none_are_refused_before_the_training():
    for text in ("25..20", "x", "0..3", "3.."):
        with pytest.raises(UserError, match=r"--run.profile is .* and must be FIRST..LAST, two steps counted from 1"):
            check_experiment(parse_experiment(["quickstart", "--run.profile", text], "x"))
    for field in ("profile", "memory_snapshot"):
        check_profile(RunConfig(**{field: "20..25"}), 20)
        with pytest.raises(UserError, match=f"--run.{field.replace('_', '-')} is 20..25, but the run ends at step 19"):
            check_profile(RunConfig(**{field: "20..25"}), 19)


def test_a_memory_snapshot_is_refused_on_cpus_with_what_there_is_instead(images, tmp_path):
    words = ["quickstart", "--run.memory-snapshot", "20..25"]
    check_experiment(parse_experiment(words, "x"))
    for refused in (lambda: check_experiment(parse_experiment([*words, "--parallel.device", "cpu"], "x")),
                    lambda: check_snapshot(RunConfig(memory_snapshot="2"), False)):  # fmt: skip
        with pytest.raises(UserError, match="--run.memory-snapshot records .* on GPUs gives: this run computes on CPUs"):
            refused()
    with pytest.raises(UserError, match=r"--run.memory-snapshot is '25..20' and must be FIRST..LAST"):
        check_experiment(parse_experiment(["quickstart", "--run.memory-snapshot", "25..20"], "x"))
    with heard() as lines:
        train(with_run(memory_snapshot="2..3"), images, tmp_path)
    assert len([line for line in lines if "the first worker computes on a CPU, and no snapshot is written" in line]) == 1
    assert not list(Run(tmp_path).profile_folder.glob("memory*")) and Run(tmp_path).result()["step"] == 12


@pytest.mark.parametrize("dies", [False, True])
def test_a_memory_snapshot_records_from_its_first_step_to_its_last_or_to_where_memory_runs_out(dies, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.cuda.memory._record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", lambda path: (calls.append("dump"), Path(path).write_text("x")))
    snapshot = MemorySnapshot("3..5")
    world = SimpleNamespace(rank=0, device=SimpleNamespace(type="cuda"))
    snapshot.training = SimpleNamespace(world=world, run_folder=tmp_path, step=0)
    snapshot.on_start(snapshot.training)
    for step in (1, 2):
        snapshot.after_step(step, None)
        assert calls == ["all"] * (step == 2)
    for step in (3,) if dies else (3, 4, 5, 6):
        snapshot.after_step(step, None)
    snapshot.on_end(4 if dies else 6, {}, torch.OutOfMemoryError() if dies else None)
    assert calls == ["all", "dump", None]
    assert [path.name for path in Run(tmp_path).profile_folder.iterdir()] == ["memory-3-4.pickle" if dies else "memory-3-5.pickle"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_memory_snapshot_has_the_allocations_of_its_steps(tmp_path):
    snapshot = MemorySnapshot("1..2")
    snapshot.training = SimpleNamespace(world=SimpleNamespace(rank=0, device=torch.device("cuda")), run_folder=tmp_path, step=0)
    snapshot.on_start(snapshot.training)
    kept = torch.zeros(1 << 20, device="cuda")
    snapshot.after_step(1, None)
    snapshot.after_step(2, None)
    content = (Run(tmp_path).profile_folder / "memory-1-2.pickle").read_bytes()
    assert b"device_traces" in content and b"test_profiling.py" in content and kept.numel() == 1 << 20


def check_norms(folder: Path) -> None:
    """At each fourth step all norms together are that of the whole gradient; other records have none."""
    found = []
    for record in Run(folder).metrics():
        norms = {name: value for name, value in record.items() if name.startswith("grad_norm/")}
        if "loss" in record and record["step"] % 4 == 0:
            assert {"grad_norm/decoder.cross_attention", "grad_norm/rest"} <= norms.keys() and len(norms) == 5
            assert sum(value**2 for value in norms.values()) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
            found.append(record["step"])
        else:
            assert not norms
    assert found == [4, 8, 12]


def test_norms_of_layers_are_together_that_of_the_whole_gradient(plain, images, tmp_path):
    assert same(plain, train(with_run(layer_grad_norms=True, log_every=4), images, tmp_path))
    check_norms(tmp_path)


@pytest.mark.slow
def test_norms_of_layers_are_those_of_all_workers_together(images, tmp_path):
    run(with_run(layer_grad_norms=True, log_every=4), images, tmp_path / "two", world=2)
    check_norms(tmp_path / "two")
