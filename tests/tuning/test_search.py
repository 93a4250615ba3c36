"""Sweeps that search for two things at once, that know earlier sweeps, and that train every sample under several seeds."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.impl.placeholder import create_resolvers_map, inject_placeholders, resolve_placeholders
from ray.tune.search.basic_variant import BasicVariantGenerator

from perceiver.config import UserError, to_dict
from perceiver.disk import write_json
from perceiver.presets import PRESETS
from tests.tuning.test_tuning import GOOD, make_run
from tuning import report, sweep
from tuning.schedulers import search
from tuning.sweeps import check_sweep, trial_experiment

LONG = replace(GOOD, scheduler="fifo", metric="val_acc")


def make_sweep(folder: Path, made, trials: list[tuple[dict, float]], finished: bool = True) -> Path:
    """A sweep whose trials have the given values of fields and reached the given values of its metric, each at step 10."""
    events = []
    for number, (values, reached) in enumerate(trials):
        name = f"trial-{number}"
        run = make_run(folder / "trials" / name, [10])
        write_json(run / "experiment.json", {"experiment": to_dict(trial_experiment(PRESETS["quickstart"](), values))})
        write_json(run / "values.json", values)
        write_json(run / "costs.json", {"parameters": 1000.0 * (number + 1), "flops": 1e9, "memory": 1.0})
        (run / "metrics.jsonl").write_text(json.dumps({"step": 10, made.metric: reached}) + "\n")
        if finished:
            write_json(run / "result.json", {})
        report_event = {"event": "report", "step": 10, "examples": 640, "loss": 1.0}
        events += [{"event": "start", "time": 0.0}, {**report_event, "time": 1.0}, {"event": "end", "failed": "", "time": 2.0}]
        events[-3:] = [{**event, "trial": name} for event in events[-3:]]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(folder / "sweep.json", sweep.describe(made))
    return folder


def drawn(made, monkeypatch, space=None) -> list[dict]:
    """Values of all trials, as Ray Tune draws them, in their order."""
    algorithm = search(made, 1)
    assert isinstance(algorithm, BasicVariantGenerator)
    monkeypatch.setattr("ray.tune.experiment.experiment.is_function_trainable", lambda run: False)  # which would ask for a real one
    monkeypatch.setattr("ray.tune.experiment.experiment.Experiment.register_if_needed", lambda run: run)
    monkeypatch.setattr(
        "ray.tune.search.basic_variant._create_trial_from_spec",
        lambda spec, parser, trial_id, **_: SimpleNamespace(trial_id=trial_id, config=spec["config"]),
    )
    experiment = tune.Experiment("sweep", "drawn-only", config=space or sweep.param_space(made), num_samples=made.trials)
    algorithm.add_configurations([experiment])
    found = []
    while (trial := algorithm.next_trial()) is not None:
        found.append(trial.config["values"])
        algorithm.on_trial_complete(trial.trial_id)
    return found


def test_every_sample_is_drawn_once_and_trained_under_each_seed(monkeypatch):
    made = replace(LONG, seeds=(3, 5), trials=3)
    values = drawn(made, monkeypatch)
    assert [value["training.seed"] for value in values] == [3, 5] * 3 and made.size == 6
    rates = [value["optim.lr"] for value in values]
    assert rates[0] == 3e-3 and rates[::2] == rates[1::2] and len(set(rates)) == 3
    assert len(sweep.param_space(replace(made, space={}, points=({"optim.lr": 1.0},)))["values"]["grid_search"]) == 2


def test_a_field_that_depends_on_another_is_drawn_by_it_also_for_the_presets_own_values(monkeypatch):
    depends = tune.sample_from(lambda config: 40 if config["values"]["optim.lr"] > 3e-3 else 5)
    made = replace(LONG, space={"optim.lr": tune.loguniform(1e-3, 1e-2), "optim.warmup_steps": depends}, trials=4)
    check_sweep(made)
    resolvers = create_resolvers_map()  # as Ray Tune does before it draws, and after it
    configs = [{"values": values} for values in drawn(made, monkeypatch, inject_placeholders(sweep.param_space(made), resolvers))]
    for config in configs:
        resolve_placeholders(config, resolvers)
    found = [config["values"] for config in configs]
    assert found[0] == {"optim.lr": 3e-3, "optim.warmup_steps": 5}
    assert all(values["optim.warmup_steps"] == (40 if values["optim.lr"] > 3e-3 else 5) for values in found)
    assert {values["optim.warmup_steps"] for values in found} == {5, 40}
    with pytest.raises(UserError, match="optim.warmup_steps of the sweep's space is one"):
        check_sweep(replace(made, search="optuna"))


def test_a_sweep_with_seeds_ranks_samples_by_their_means_and_not_by_their_best_trial(tmp_path):
    made = replace(LONG, seeds=(0, 1), trials=3)
    reached = {1e-3: (0.99, 0.70), 2e-3: (0.90, 0.92), 3e-3: (0.80, 0.82)}
    trials = [({"optim.lr": lr, "training.seed": seed}, values[seed]) for lr, values in reached.items() for seed in (0, 1)]
    trials.append(({"optim.lr": 4e-3, "training.seed": 0}, 1.0))  # its other seed has not ended
    folder = make_sweep(tmp_path / "s", made, trials)
    found = report.write(folder)
    assert [trial["values"]["optim.lr"] for trial in found] == [2e-3] * 2 + [1e-3] * 2 + [3e-3] * 2 + [4e-3]
    text = "\n".join(report.table(found, json.loads((folder / "sweep.json").read_text())))
    assert re.search(r"1 +0\.9100 +0\.0141 +0\.7829 to 1\.0371 +2 of 2 +0\.002", text) and "1 of 2" in text
    assert "mean val_acc of 0.9100, the preset's own values 0.8100: better (difference +0.1000, 95% interval" in text
    assert text.splitlines()[-1].endswith("--seeds 0,1 --optim.lr 0.002 --name s-winner")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, "name one twice"),
        ({"seeds": (0, 1), "scheduler": "asha"}, "--seeds ranks samples .* use --scheduler fifo"),
        ({"seeds": (0, 1), "space": {"training.seed": tune.choice([1])}}, "leave one out"),
        ({"warm_start": ("x",)}, "use --search optuna, not random"),
        ({"search": "optuna", "against": "flops", "scheduler": "asha"}, "looks at both, .* use --scheduler fifo"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        check_sweep(replace(LONG, **changes))


def test_a_sweep_that_differs_says_what_has_changed_and_resume_begins_none(tmp_path, monkeypatch):
    folder = make_sweep(tmp_path / "s", LONG, [({"optim.lr": 1e-3}, 0.9)])
    with pytest.raises(UserError, match=r"another sweep \(space.optim.lr: .*0.0001, 0.01.* -> .*0.001, 0.01.*--warm-start s "):
        sweep.check_folder(replace(LONG, space={"optim.lr": tune.loguniform(1e-3, 1e-2)}), folder)
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    with pytest.raises(UserError, match="--resume: there is no sweep"):
        sweep.main(["quickstart", "--resume"])
    with pytest.raises(UserError, match="--warm-start is 'none'"):
        sweep.main(["quickstart", "--search", "optuna", "--warm-start", "none"])


def test_a_search_for_two_things_knows_what_earlier_sweeps_found(tmp_path):
    pytest.importorskip("optuna")
    earlier = replace(LONG, space={"optim.lr": tune.loguniform(1e-5, 1.0)}, against="parameters")
    trials = [({"optim.lr": lr}, reached) for lr, reached in ((1e-3, 0.8), (2e-3, 0.9), (0.5, 0.1))]
    folder = make_sweep(tmp_path / "earlier", earlier, trials)
    space = {"optim.lr": tune.loguniform(1e-4, 1e-2), "model.num_latents": tune.choice([8, 16, 32])}
    made = replace(LONG, space=space, search="optuna", against="parameters", warm_start=(str(folder),))
    check_sweep(made)
    algorithm = search(made, 1)
    algorithm.set_search_properties(made.metric, made.mode, sweep.param_space(made))
    study = algorithm.searcher._ot_study
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    known = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert [trial.values for trial in known] == [[0.9, 2000.0], [0.8, 1000.0]]  # the third lies outside of the space
    assert {trial.params["values/model.num_latents"] for trial in known} == {16}
    first = algorithm.suggest("one")["values"]
    assert first == {"optim.lr": 3e-3, "model.num_latents": 16}  # the preset's own
    algorithm.on_trial_complete("one", {"val_acc": 0.95, "parameters": 500.0})
    assert [trial.values for trial in study.best_trials] == [[0.95, 500.0]]
    assert sweep.describe(made)["warm_start"] == (str(folder),) and "warm_start" not in sweep.describe(LONG)
