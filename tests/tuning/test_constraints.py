"""What trials must keep to, what they cost, which of them are not beaten; how failures are counted; a sweep that was mended."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from ray import tune

from perceiver.config import UserError
from perceiver.disk import write_json
from ray_jobs.cli import parse_experiment
from tests.support.small import text_experiment
from tests.tuning.test_tuning import GOOD, folder  # noqa: F401
from tuning import report, sweep, trial
from tuning.constraints import Refused, check_constraints, costs, refuse
from tuning.page import importances
from tuning.pareto import front
from tuning.trials import read_trials


def test_costs_are_those_of_the_plan_and_grow_with_the_model():
    small, large = text_experiment(), replace(text_experiment(), model=replace(text_experiment().model, num_channels=32))
    found = costs(small, 100, True), costs(large, 100, True)
    assert all(found[1][name] > found[0][name] > 0 for name in ("parameters", "flops", "memory"))
    assert costs(small, 200, False)["flops"] == 2 * found[0]["flops"]


def test_a_trial_that_a_constraint_does_not_allow_is_refused_with_what_it_has():
    made = parse_experiment(["quickstart"], "x")
    has = {"parameters": 3_000_000, "flops": 1e12, "memory": 0.5}
    refuse(["parameters<=3e6", "memory<1 and optim.lr<1"], made, has)
    with pytest.raises(Refused, match="^refused: parameters 3,000,000, and the sweep's constraint is parameters<3e6$"):
        refuse(["parameters<3e6"], made, has)
    for text, message in (
        ("parameters+1", r"--constraint 'parameters\+1' cannot be read"),
        ("parametres<3", "is about parametres, which is neither a field nor one of parameters, flops, memory, did you mean parameters"),
    ):
        with pytest.raises(UserError, match=message):
            check_constraints([text], made)
    with pytest.raises(UserError, match="--against is 'size' and must be one of parameters, flops, memory, seconds"):
        sweep.check_values(replace(GOOD, against="size"))


def test_a_refused_trial_does_not_train_and_says_why(tmp_path, monkeypatch):
    made = parse_experiment(["quickstart"], "x")
    monkeypatch.setattr(trial.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "x_00003"))
    monkeypatch.setattr(trial, "_experiment", lambda *_: (made, 10))
    monkeypatch.setattr(trial, "from_dict", lambda tree: made)
    monkeypatch.setattr(trial, "use_gpus", lambda parallel: False)
    monkeypatch.setattr(trial.train, "run", lambda *_, **__: pytest.fail("it was trained"))
    settings = {"code": {}, "trials": str(tmp_path), "experiment": {}, "data": "", "constraints": ["parameters<10"]}
    with pytest.raises(Refused):
        trial.run_trial({"values": {"optim.lr": 1e-3}}, settings)
    (run,) = tmp_path.iterdir()
    assert (run / "failed.txt").read_text().startswith("refused: parameters ")
    assert json.loads((run / "costs.json").read_text())["parameters"] > 10


def test_trials_are_counted_by_what_became_of_them(folder):  # noqa: F811
    events = (folder / "events.jsonl").read_text()
    for number, reason in ((4, "refused: parameters 9, and ..."), (5, "worker 0: DefaultCPUAllocator: can't allocate memory"), (6, "no")):
        write_json(folder / "trials" / f"trial-{number}" / "values.json", {"optim.lr": 0.1})
        made = ({"time": 0.0, "trial": f"trial-{number}", **event} for event in ({"event": "start"}, {"event": "end", "failed": reason}))
        events = "".join(json.dumps(event) + "\n" for event in made) + events
    (folder / "events.jsonl").write_text(events)
    lines = report.table(read_trials(folder), report.read_settings(folder))
    assert "7 trials: 1 finished, 1 stopped, 1 diverged, 3 failed, 1 refused (of the failed ones 1 not finite, 1 out of memory)" in lines
    assert "trial-4 refused: parameters 9, and ..." in lines


def ended(name: str, value: float | None, flops: float, status: str = "finished") -> dict:
    return {"trial": name, "value": value, "status": status, "costs": {"flops": flops}, "seconds": 1.0}


def test_the_front_has_the_finished_trials_that_none_beats_in_both():
    trials = [
        ended("a", 0.9, 8),
        ended("b", 0.8, 2),
        ended("c", 0.8, 4),
        ended("d", 0.7, 1),
        ended("e", 0.99, 1, "stopped"),
        ended("f", None, 1),
    ]
    assert [t["trial"] for t in front(trials, {"mode": "max", "against": "flops"})] == ["d", "b", "a"]
    assert [t["trial"] for t in front(trials, {"mode": "min", "against": "flops"})] == ["d"]
    assert [t["trial"] for t in front(trials, {"mode": "max", "against": "seconds"})] == ["a"]


def test_a_sweep_against_its_costs_has_the_picture_and_the_chart(folder):  # noqa: F811
    for run in (folder / "trials").iterdir():
        write_json(run / "costs.json", {"flops": 1e9})
    write_json(folder / "sweep.json", {**sweep.describe(replace(GOOD, against="flops"))})
    trials, settings = report.write(folder), report.read_settings(folder)
    assert report.draw(trials, settings).axes[-1].get_xlabel() == "FLOPs of a whole training"
    assert any("not beaten in val_loss against FLOPs of a whole training: trial-0" in line for line in report.table(trials, settings))
    assert "against FLOPs of a whole training" in (folder / "report.html").read_text()
    assert pq.read_table(folder / "results.parquet")["flops"].to_pylist() == [1e9] * 4


def test_a_sweep_whose_space_was_mended_before_its_first_trial_is_replaced(tmp_path):
    write_json(tmp_path / "sweep.json", sweep.describe(GOOD))
    (tmp_path / "tune").mkdir()
    mended = replace(GOOD, space={"optim.lr": tune.loguniform(1e-3, 1e-2)})
    sweep.check_folder(mended, tmp_path)
    assert not (tmp_path / "tune").exists()
    write_json(tmp_path / "trials" / "trial-0" / "values.json", {"optim.lr": 1e-3})
    with pytest.raises(UserError, match=r"holds another sweep \(space.optim.lr: Float .* -> Float .*: choose another --name"):
        sweep.check_folder(mended, tmp_path)


def test_a_sweep_without_constraints_describes_itself_as_before():
    assert not {"constraints", "against"} & sweep.describe(GOOD).keys()
    assert sweep.describe(replace(GOOD, constraints=("parameters<3",)))["constraints"] == ("parameters<3",)


def test_importances_are_those_of_optuna_where_it_is_installed():
    pytest.importorskip("optuna")
    rates = [10 ** (-4 + 3 * number / 39) for number in range(40)]
    noise = [(number * 17 % 40) / 40 for number in range(40)]
    found, how = importances({"lr": rates, "noise": noise, "kind": ["a", "b"] * 20}, [rates.index(rate) / 40 for rate in rates])
    assert "PED-ANOVA (optuna)" in how and found.keys() == {"lr", "noise", "kind"}
    assert sum(found.values()) == pytest.approx(1.0) and found["lr"] > 0.8
