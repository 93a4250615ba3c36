"""Sweeps on Ray Tune with real trainings: killed and continued, a trial that fails, an exchange of weights."""

import csv
import signal
import time
from pathlib import Path

import pytest
import torch

from perceiver.checkpoints import list_checkpoints
from tests.support.jobs import Job, losses, weights
from tuning.population import exchanges

pytestmark = pytest.mark.long

MODULE = """
from ray import tune
from tuning.sweeps import Sweep

SHORT = ("--workers", "1", "--training.max-steps", "60", "--training.max-epochs", "None", "--run.val-batches", "2")

def rates():
    return Sweep(preset="quickstart", space={"optim.lr": tune.grid_search([1e-3, 3e-3, 1e30, 1e-2])}, trials=1, reports=3,
                 scheduler="fifo", overrides=(*SHORT, "--optim.warmup-steps", "0"))

def population():
    # The first trial has the preset's 3e-3, the other one far too much: it loses from the first report on.
    return Sweep(preset="quickstart", space={"optim.lr": tune.choice([0.05])}, trials=2, reports=6, scheduler="pbt",
                 perturb=1 / 3, overrides=(*SHORT, "--optim.warmup-steps", "0", "--workers", "2",
                                               "--parallel.cpus-per-worker", "0.5",
                                               "--run.log-every", "1"))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "mine.py").write_text(MODULE)
    Job("ray_jobs.preprocess", "quickstart", home=home).finish()
    return home


def sweep(home: Path, function: str, name: str, *args: str) -> Job:
    return Job("tuning.sweep", f"{home / 'mine.py'}:{function}", "--name", name, *args, home=home)


def results(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "results.csv") as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


def wait_for(condition, job: Job, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert job.process.poll() is None and time.monotonic() < end, job.output
        time.sleep(0.1)


def test_a_killed_sweep_continues_to_the_results_of_an_undisturbed_one_and_a_failed_trial_does_not_stop_it(home):
    output = sweep(home, "rates", "plain").finish(400)
    plain = results(home / "sweeps" / "plain")
    assert [row["status"] for row in plain.values()].count("finished") == 3
    (failed,) = [row for row in plain.values() if row["status"] == "failed"]
    assert failed["optim.lr"] == "1e+30" and "the loss became" in failed["reason"] and "the loss became" in output
    assert "no trial is better than the preset's own values (trial-00001)" in output

    folder = home / "sweeps" / "killed"
    job = sweep(home, "rates", "killed")
    done = lambda: [path.parent for path in folder.glob("trials/*/result.json")]  # noqa: E731
    wait_for(lambda: done() and len(list(folder.glob("trials/*/checkpoints/*/checkpoint.json"))) > 3, job)
    job.kill_driver()
    assert not (folder / "results.csv").exists()
    finished = {run: (run / "result.json").stat().st_mtime_ns for run in done()}
    assert len(finished) < 3

    job = sweep(home, "rates", "killed")
    wait_for(lambda: len(done()) > len(finished) and "continuing the sweep" in job.output, job)
    going = [run for run in folder.glob("trials/*") if list_checkpoints(run / "checkpoints") and run not in done()]
    job.process.send_signal(signal.SIGINT)
    assert job.wait(120) == 130 and "the same command continues" in job.output and "finished after" not in job.output
    assert all(list_checkpoints(run / "checkpoints") for run in going if run not in done())
    assert "continuing the sweep" in sweep(home, "rates", "killed").finish(400)
    assert {run: (run / "result.json").stat().st_mtime_ns for run in finished} == finished
    killed = results(folder)
    same = ("status", "value", "step", "loss", "optim.lr")
    assert {n: [row[c] for c in same] for n, row in killed.items()} == {n: [row[c] for c in same] for n, row in plain.items()}

    again = sweep(home, "rates", "killed")
    assert "no trial is better than the preset's own values" in again.finish(120)
    other = sweep(home, "rates", "killed", "--optim.weight-decay", "0.5")
    assert other.wait(60) == 2 and "holds another sweep" in other.output
    report = Job("tuning.report", str(folder), home=home)
    assert "trial-00000" in report.finish(60) and "data:image/png" in (folder / "report.html").read_text()


def test_a_losing_trial_takes_over_the_winners_sharded_checkpoint_and_goes_its_own_way(home):
    trials = home / "sweeps" / "population" / "trials"
    job = sweep(home, "population", "population")
    wait_for(lambda: any(map(exchanges, trials.glob("trial-*"))), job)
    (run,) = [run for run in trials.iterdir() if exchanges(run)]
    first = exchanges(run)[0]
    step = f"step-{first['step']:08d}"
    own, given = (weights(r / "checkpoints" / step) for r in (run, trials / first["from"]))
    assert own.keys() == given.keys() and any(key.startswith("optimizer") for key in own)
    assert all(torch.equal(own[key], given[key]) for key in own)

    job.finish(400)
    # Order and dropout are functions of the step: from the same state the next loss is the same to the last bit, and no later one is.
    own, given = (dict(losses(r)) for r in (run, trials / first["from"]))
    assert own[first["step"] + 1] == given[first["step"] + 1] and own[first["step"] + 2] != given[first["step"] + 2]
    assert own[first["step"]] != given[first["step"]]
    assert f"continuing from step {first['step']:,}" in (run / "log.txt").read_text()
    assert "2 workers" in (run / "log.txt").read_text()
    own, given = (weights(list_checkpoints(r / "checkpoints")[-1].path) for r in (run, trials / first["from"]))
    assert not all(torch.equal(own[key], given[key]) for key in own if key.startswith("model"))
    assert first["from"] in (trials.parent / "report.html").read_text()
