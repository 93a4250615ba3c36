"""The example files of docs/extending.md on Ray, from a folder with nothing but them: every command of that page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from perceiver.checkpoints import list_checkpoints
from tests.conftest import ROOT
from tests.ray_jobs.test_submitted_job import RAY, cluster  # noqa: F401 (a fixture)
from tests.support.jobs import Job, losses, weights
from tests.support.outside import copy_examples

SHORT = ["--training.max-epochs", "None", "--training.max-steps", "60", "--run.checkpoint-every", "10", "--run.log-every", "1",
         "--run.val-every", "30", "--run.val-batches", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="module")
def place(home) -> Path:
    return copy_examples(home / "mine")


def outside(module: str, *args: str, home: Path) -> Job:
    """A job in the folder of the example files."""
    return Job(module, *args, home=home, folder=home / "mine", PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def plain(home, place) -> Path:
    """An undisturbed run on two workers; its data is prepared by the way."""
    outside("ray_jobs.train", "weather.py:tiny", *SHORT, "--workers", "2", "--name", "plain", home=home).finish()
    return home / "runs" / "plain"


@pytest.mark.slow
def test_it_is_killed_and_continued_bitwise_with_its_code_in_the_run(home, place, plain):
    command = ("ray_jobs.train", "weather.py:tiny", *SHORT, "--workers", "2", "--name", "killed")
    run = home / "runs" / "killed"
    job = outside(*command, home=home)
    job.wait_for_step(run, 25)
    job.kill_driver()
    assert (run / "code" / "weather.py").read_text() == (place / "weather.py").read_text()
    # The run's folder is an experiment, too, and brings its code: the file need not be there any more.
    output = Job("ray_jobs.train", str(run), home=home).finish()
    assert "continuing from step" in output
    one, other = (weights(list_checkpoints(r / "checkpoints")[-1].path) for r in (run, plain))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(run) == losses(plain)


@pytest.mark.slow
def test_changed_code_does_not_continue_a_run_unasked(home, place, plain):
    text = (place / "weather.py").read_text()
    try:
        (place / "weather.py").write_text(text.replace("0.5 * week", "0.4 * week"))
        job = outside("ray_jobs.train", "weather.py:tiny", *SHORT, "--workers", "2", "--name", "plain", home=home)
        assert job.wait(100) == 2 and "weather.py changed since run plain began" in job.output and "Traceback" not in job.output
    finally:
        (place / "weather.py").write_text(text)


@pytest.mark.slow
def test_it_is_evaluated_applied_to_new_data_exported_and_loaded(home, place, plain):
    output = outside("ray_jobs.evaluate", "plain", home=home).finish()
    assert "val_mae" in output and "256 targets" in output
    past = np.random.default_rng(7).standard_normal((5, 72 * 7)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(past.reshape(-1)), 72 * 7)
    pq.write_table(pa.table({"past": column, "id": ["a", "b", "c", "d", "e"]}), place / "new.parquet")
    outside("ray_jobs.predict", "plain", "--input", "new.parquet", "--output", "predicted", "--id-column", "id", home=home).finish()
    predicted = pq.read_table(place / "predicted")
    assert predicted["id"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert {len(np.ravel(row)) for row in predicted["forecast"].to_pylist()} == {24 * 7}
    outside("ray_jobs.export", "plain", "--out", "exported", home=home).finish()
    script = (
        "import weather, numpy as np, perceiver\n"
        "print(perceiver.load('exported').predict({'past': np.zeros((2, 72, 7), 'float32')})['forecast'].shape)"
    )
    done = run_script(script, home, place)
    assert done.stdout.strip() == "(2, 24, 7)", done.stderr
    done = run_script(script.replace("import weather, ", "import "), home, place)
    assert done.returncode and "weather:" in done.stderr and "import weather first" in done.stderr


def run_script(script: str, home: Path, place: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PERCEIVER_HOME": str(home)}
    return subprocess.run([sys.executable, "-c", script], cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_it_is_planned_and_a_baseline_trains_under_the_same_task(home, place, plain):
    output = outside("ray_jobs.plan", "weather.py:tiny", home=home).finish()
    assert "parameters" in output and "largest micro-batch" in output
    outside("ray_jobs.train", "transformer.py:baseline", *SHORT, "--workers", "1", home=home).finish()
    run = home / "runs" / "baseline"
    assert sorted(path.name for path in (run / "code").iterdir()) == ["transformer.py", "weather.py"]
    first, last = (losses(run)[i][1] for i in (0, -1))
    assert last < 0.7 * first


@pytest.mark.long
def test_two_of_its_own_fields_are_swept_with_asha(home, place, plain):
    outside(
        "tuning.sweep", "weather.py:tiny", "--space", "weather_sweep.py:space", "--trials", "3", "--reports", "3", "--scheduler", "asha",
        "--metric", "val_mae", "--name", "swept", *SHORT, "--workers", "1", home=home,
    ).finish(500)  # fmt: skip
    trials = sorted((home / "sweeps" / "swept" / "trials").iterdir())
    values = [json.loads((trial / "values.json").read_text()) for trial in trials]
    assert len(values) == 3 and all(set(v) == {"task.huber", "optim.optimizer.momentum"} for v in values)
    assert all((trial / "code" / "weather.py").is_file() for trial in trials)


@pytest.mark.slow
def test_it_is_submitted_to_a_cluster_that_has_none_of_its_files(cluster, home, place):  # noqa: F811
    """The job's folder is uploaded; workers and data tasks run elsewhere, with nothing of it on their import path but what travels."""
    address, environment = cluster[:2]
    command = [
        RAY, "job", "submit", "--address", address, "--working-dir", str(place), "--",
        "python", "-m", "ray_jobs.train", "weather.py:tiny", *SHORT, "--workers", "1", "--name", "submitted-outside",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    run = Path(environment["PERCEIVER_HOME"]) / "runs" / "submitted-outside"
    assert [step for step, _ in losses(run)] == list(range(1, 61)) and (run / "code" / "weather.py").is_file()
