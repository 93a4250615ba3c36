"""The list of runs."""

import fcntl
import json
import shlex
from dataclasses import replace

import pytest

from perceiver.config import UserError
from ray_jobs import runs
from ray_jobs.cli import parse_experiment
from tests.test_tuning import make_run


@pytest.fixture
def folder(tmp_path):
    for name in ("done", "held", "broken", "halted"):
        make_run(tmp_path / name, [10, 20], [0.5, 0.4])
    (tmp_path / "done" / "result.json").write_text("{}")
    (tmp_path / "broken" / "failure.json").write_text("{}")
    (tmp_path / "no-run").mkdir()
    return tmp_path


def test_runs_are_listed_with_their_state_and_how_far_they_are(folder):
    with open(folder / "held" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {run["name"]: run for run in runs.list_runs(folder)}
    assert {name: run["status"] for name, run in found.items()} == {
        "done": "finished", "held": "running", "broken": "failed", "halted": "stopped",
    }  # fmt: skip
    halted = found["halted"]
    assert (halted["step"], halted["checkpoint"], halted["best"]) == (20, 20, "val_loss 0.0500")
    assert found["done"]["continue"] is None and found["halted"]["continue"]


def test_the_command_that_continues_a_run_makes_the_same_experiment(folder):
    words = ["clm-wikitext-small", "--model.num-channels", "128", "--optim.optimizer.betas", "0.9", "0.95", "--training.max-epochs", "2",
             "--training.max-steps", "None", "--task.random-shift", "False", "--data.source", "my texts/*.txt"]  # fmt: skip
    experiment = parse_experiment(words, "ray_jobs.train")
    made = shlex.split(runs.continue_command(experiment, folder / "halted"))
    again = parse_experiment(made[3:], "ray_jobs.train")
    assert again == replace(experiment, run=replace(experiment.run, name="halted", storage=str(folder)))


def test_the_table_and_json_are_printed_and_a_missing_folder_is_a_sentence(folder, capsys):
    assert runs.main([str(folder)]) == 0
    assert "continue halted: python -m ray_jobs.train quickstart" in capsys.readouterr().out
    runs.main([str(folder), "--json"])
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["broken", "done", "halted", "held"]
    with pytest.raises(UserError, match="no folder of runs"):
        runs.main([str(folder / "none")])
