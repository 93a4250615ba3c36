"""Whose process the next trial of a sweep gets."""

import csv
import json
from importlib import import_module
from types import SimpleNamespace

import pytest
from ray.tune.execution.tune_controller import TuneController
from ray.tune.result import RESULT_DUPLICATE

from tests.support.jobs import Job
from tuning.controller import Controller, handing_processes_on


@pytest.mark.parametrize(("results", "handed_on"), [([{}, {"done": True}], False), ([{}, {RESULT_DUPLICATE: True}], True)])
def test_a_process_is_handed_on_where_its_trial_has_returned_and_not_where_it_was_stopped(results, handed_on, monkeypatch):
    monkeypatch.setattr(TuneController, "_process_trial_result", lambda self, trial, result: None)
    monkeypatch.setattr(TuneController, "_maybe_cache_trial_actor", lambda self, trial: True)
    controller, trial = object.__new__(Controller), SimpleNamespace(trial_id="ab12_00003")
    for result in results:
        assert not controller._maybe_cache_trial_actor(trial)
        controller._process_trial_result(trial, result)
    assert controller._maybe_cache_trial_actor(trial) is handed_on
    assert not controller._maybe_cache_trial_actor(SimpleNamespace(trial_id="ab12_00004"))


def test_ray_tune_has_its_own_controller_again_after_a_sweep():
    with pytest.raises(KeyError), handing_processes_on():
        assert import_module("ray.tune.tune").TuneController is Controller
        raise KeyError
    assert import_module("ray.tune.tune").TuneController is TuneController


RUNGS = """
from tuning.sweeps import Sweep

def rungs():
    points = tuple({"optim.lr": rate} for rate in (3e-3, 1e-8, 2e-8, 1e-2))
    short = ("--workers", "1", "--training.max-steps", "30", "--training.max-epochs", "None", "--run.val-batches", "2")
    return Sweep(preset="quickstart", points=points, reports=3, scheduler="asha", grace=1 / 3, reduction=2, overrides=short)
"""


@pytest.mark.slow
def test_trials_after_those_that_were_stopped_train_and_those_after_finished_ones_have_their_process(tmp_path):
    (tmp_path / "mine.py").write_text(RUNGS)
    Job("tuning.sweep", f"{tmp_path / 'mine.py'}:rungs", "--concurrent", "1", home=tmp_path).finish(400)
    folder = tmp_path / "sweeps" / "rungs"
    with open(folder / "results.csv") as file:
        trials = {row["trial"]: row for row in csv.DictReader(file)}
    statuses = [trials[f"trial-0000{number}"]["status"] for number in range(4)]
    assert statuses[:3] == ["finished", "stopped", "stopped"] and statuses[3] in ("finished", "stopped")
    pids = [json.loads(path.read_text().splitlines()[0])["pid"] for path in sorted(folder.glob("tune/*/result.json"))]
    assert len(pids) == 4 and len(set(pids)) == 3
