"""Profiles of some steps, and norms of the gradient by layer: what they hold, and that they change no bit."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perceiver.config import Experiment, UserError
from perceiver.runs import Run
from perceiver.training.profiling import check_profile
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
    check_profile("20..25", 20)
    with pytest.raises(UserError, match="--run.profile is 20..25, but the run ends at step 19"):
        check_profile("20..25", 19)


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
