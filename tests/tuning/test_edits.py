"""Sweeps whose settings change after they began: what counts, what continues, what is set aside, and what is drawn anew."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune

from perceiver.config import UserError
from perceiver.disk import read_json, write_json
from perceiver.runs import Run
from tests.conftest import ROOT
from tests.support.small import heard
from tests.tuning.test_search import LONG, drawn, make_sweep
from tuning import sweep
from tuning.edits import arrange, plan_edit
from tuning.schedulers import scheduler, search
from tuning.settings import check_folder, settle
from tuning.spaces import described, draw, holds
from tuning.trial import take_waiting
from tuning.trials import SETTINGS, read_trials

WIDE = replace(LONG, space={"optim.lr": tune.loguniform(1e-4, 1e-1)}, trials=4)
HIGH = replace(WIDE, space={"optim.lr": tune.loguniform(2e-3, 1e-1)})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sweep of two trials that ended, the first with the preset's own values, and one that was interrupted at step 10."""
    made = make_sweep(tmp_path / "s", WIDE, [({"optim.lr": lr}, reached) for lr, reached in ((3e-3, 0.8), (5e-4, 0.7), (2e-2, 0.5))])
    events = (made / "events.jsonl").read_text().splitlines(keepends=True)
    (made / "events.jsonl").write_text("".join(line for line in events if '"trial-2"' not in line or '"end"' not in line))
    (made / "trials" / "trial-2" / "result.json").unlink()
    for number in range(3):
        os.rename(made / "trials" / f"trial-{number}", made / "trials" / f"trial-0000{number}")
    (made / "events.jsonl").write_text((made / "events.jsonl").read_text().replace("trial-", "trial-0000"))
    return made


def names(folder: Path, place: str) -> set[str]:
    return {path.parent.name for path in (folder / place).glob("*/values.json")}


def changed(made, folder: Path):
    return settle(made, folder, check_folder(made, folder, resume=True))


def test_trials_that_fit_count_or_continue_others_are_set_aside_and_the_rest_is_drawn_from_the_new_space(folder):
    with heard() as lines:
        edit = changed(HIGH, folder)
    assert names(folder, "trials") == {"trial-00000"} and names(folder, "waiting") == {"trial-00002"}
    assert names(folder, "aside") == {"trial-00001"}
    assert edit.size == 4 and edit.new == 3 and edit.points[0] == {"optim.lr": 2e-2}
    assert all(2e-3 <= point["optim.lr"] <= 1e-1 for point in edit.points) and len({p["optim.lr"] for p in edit.points}) == 3
    text = "\n".join(lines)
    assert "space.optim.lr: Float (0.0001, 0.1) LogUniform -> Float (0.002, 0.1) LogUniform" in text
    assert "set aside: trial-00001 (optim.lr is 0.0005 there, which the space does not have now)" in text
    assert "kept: 1 trial (trial-00000)" in text and "continued: 1 interrupted trial (trial-00002)" in text
    assert "drawn from the space as it is now: 2 trials" in text


def test_a_changed_sweep_continues_by_the_same_command_and_is_another_one_with_the_settings_before(folder):
    first = changed(HIGH, folder)
    assert check_folder(HIGH, folder) == [] and settle(HIGH, folder, []) == first
    with pytest.raises(UserError, match="holds another sweep .*0.002, 0.1.* -> .*0.0001, 0.1.*--resume, where trials that fit"):
        check_folder(WIDE, folder)
    back = changed(WIDE, folder)
    assert back.number == 2 and back.kept.keys() == {"trial-00000", "trial-00001"} and back.waiting.keys() == {"trial-00002"}
    assert not names(folder, "aside")


def test_new_trials_are_named_as_none_before_and_draw_as_listed(folder, monkeypatch):
    edit = changed(HIGH, folder)
    assert edit.first == 3
    assert sweep.param_space(HIGH, edit)["values"]["grid_search"] == edit.points and sweep.number_of_samples(HIGH, edit) == 1
    generator = search(HIGH, 1, edit)
    monkeypatch.setattr("tests.tuning.test_search.search", lambda made, concurrent: generator)
    assert drawn(replace(HIGH, trials=1), monkeypatch, sweep.param_space(HIGH, edit)) == edit.points
    assert next(iter(generator._iterators)).counter == 6  # after three trials, of which the first was the fourth


def test_an_interrupted_trial_is_continued_by_the_first_of_its_values_alone_with_all_its_events(folder):
    changed(HIGH, folder)
    run = folder / "trials" / "trial-00003"
    take_waiting(run, {"optim.lr": 5e-2})
    assert not run.exists()
    take_waiting(run, {"optim.lr": 2e-2})
    assert Run(run).checkpoints()[-1].step == 10 and not names(folder, "waiting")
    take_waiting(folder / "trials" / "trial-00004", {"optim.lr": 2e-2})
    assert names(folder, "trials") == {"trial-00000", "trial-00003"}
    (trial,) = [trial for trial in read_trials(folder) if trial["trial"] == "trial-00003"]
    assert trial["status"] == "unfinished" and trial["step"] == 10 and trial["seconds"] == 1.0


def test_moves_that_were_interrupted_are_done_by_the_next_start(folder):
    edit = plan_edit(folder, HIGH, 1)
    os.renames(folder / "trials" / "trial-00001", folder / "aside" / "trial-00001")
    for _ in range(2):
        arrange(folder, edit)
        assert (names(folder, "trials"), names(folder, "waiting")) == ({"trial-00000"}, {"trial-00002"})


def test_a_field_that_is_new_or_gone_is_the_presets_own_in_trials_without_it(folder):
    more = replace(WIDE, space={**WIDE.space, "model.num_latents": tune.choice([16, 32])})
    edit = changed(more, folder)
    assert edit.kept["trial-00001"] == {"optim.lr": 5e-4, "model.num_latents": 16}
    assert read_json(folder / "trials" / "trial-00001" / "values.json") == edit.kept["trial-00001"]
    assert changed(replace(more, space={**WIDE.space, "model.num_latents": tune.choice([32, 64])}), folder).kept.keys() == {"trial-00000"}
    gone = changed(replace(WIDE, space={"model.num_latents": tune.choice([16, 32])}), folder)
    assert gone.kept.keys() == {"trial-00000"} and gone.aside["trial-00001"] == "optim.lr is 0.0005 there, and no longer varied"


def test_fewer_trials_than_there_are_draw_none_and_more_draw_the_difference(folder):
    fewer = changed(replace(WIDE, trials=2), folder)
    assert fewer.new == 0 and fewer.size == 2 and fewer.aside.keys() == {"trial-00002"}
    assert changed(replace(WIDE, trials=7), folder).new == 5


def test_a_grid_lacks_only_the_combinations_that_have_not_ended(folder):
    grid = replace(WIDE, trials=1, space={"optim.lr": tune.grid_search([5e-4, 3e-3, 7e-3]), "optim.warmup_steps": tune.choice([50])})
    edit = changed(grid, folder)
    assert edit.points == [{"optim.lr": 7e-3, "optim.warmup_steps": 50}] and edit.kept.keys() == {"trial-00000", "trial-00001"}


def test_a_seed_more_is_trained_for_the_samples_that_are_there(tmp_path):
    made = replace(WIDE, seeds=(0, 1), trials=2)
    trials = [({"optim.lr": lr, "training.seed": seed}, 0.5) for lr in (3e-3, 1e-2) for seed in (0, 1)]
    folder = make_sweep(tmp_path / "s", made, trials)
    edit = changed(replace(made, seeds=(0, 1, 2)), folder)
    assert len(edit.kept) == 4 and edit.points == [{"optim.lr": lr, "training.seed": 2} for lr in (3e-3, 1e-2)]
    assert set(changed(replace(made, seeds=(1, 2)), folder).aside.values()) == {"its seed 0 is none of 1, 2"}


def test_a_conditional_field_fits_where_the_function_says_the_same(tmp_path):
    def warmup(limit):
        return tune.sample_from(lambda config: 40 if config["values"]["optim.lr"] > limit else 5)

    made = replace(WIDE, space={**WIDE.space, "optim.warmup_steps": warmup(2e-3)})
    folder = make_sweep(
        tmp_path / "s", made, [({"optim.lr": lr, "optim.warmup_steps": steps}, 0.5) for lr, steps in ((1e-3, 5), (3e-3, 40))]
    )
    assert check_folder(replace(made, space={**WIDE.space, "optim.warmup_steps": warmup(2e-3)}), folder) == []
    edit = changed(replace(made, space={**WIDE.space, "optim.warmup_steps": warmup(4e-3)}), folder)
    assert edit.kept.keys() == {"trial-0"} and "optim.warmup_steps is 40 there" in edit.aside["trial-1"]
    assert all(point["optim.warmup_steps"] == (40 if point["optim.lr"] > 4e-3 else 5) for point in edit.points)


def test_constraints_set_trials_aside_and_those_that_one_refused_run_when_it_is_gone(tmp_path):
    made = replace(WIDE, constraints=("parameters<=1500",))
    folder = make_sweep(tmp_path / "s", made, [({"optim.lr": 1e-3}, 0.5), ({"optim.lr": 2e-3}, 0.5)])
    text = (folder / "events.jsonl").read_text().splitlines()
    text[-1] = text[-1].replace('"failed": ""', '"failed": "refused: parameters 2,000"')
    (folder / "events.jsonl").write_text("\n".join(text) + "\n")
    (folder / "trials" / "trial-1" / "result.json").unlink()
    same = plan_edit(folder, replace(made, trials=6), 1)
    assert same.kept.keys() == {"trial-0", "trial-1"}
    free = plan_edit(folder, replace(made, constraints=()), 1)
    assert free.kept.keys() == {"trial-0"} and free.points[0] == {"optim.lr": 2e-3}
    strict = plan_edit(folder, replace(made, constraints=("parameters<=900",)), 1)
    assert strict.kept.keys() == {"trial-1"} and "parameters 1,000, and the sweep's constraint" in strict.aside["trial-0"]


def test_a_search_that_learns_knows_what_ended_and_begins_with_what_was_interrupted(folder):
    pytest.importorskip("optuna")
    made = replace(HIGH, search="optuna")
    edit = changed(made, folder)
    assert edit.points is None and (edit.new, edit.size) == (3, 4) and sweep.number_of_samples(made, edit) == 3
    algorithm = search(replace(made, warm_start=(str(folder),)), 1, edit)
    algorithm.set_search_properties(made.metric, made.mode, sweep.param_space(made, edit))
    known = [trial.params["values/optim.lr"] for trial in algorithm.searcher._ot_study.trials if trial.state.name == "COMPLETE"]
    assert known == [3e-3] and algorithm.suggest("one")["values"] == {"optim.lr": 2e-2}


def test_asha_measures_new_trials_by_those_that_ended_before(folder):
    made = replace(WIDE, scheduler="asha", reduction=2, grace=0.1, seeds=())
    asha = scheduler(made, 6400, folder, ("trial-00000", "trial-00001"))
    asha.set_search_properties("val_acc", "max")
    new = SimpleNamespace(trial_id="a_00003", has_reported_at_least_once=False)
    asha.on_trial_add(None, new)
    assert asha.on_trial_result(None, new, {"examples": 640, "val_acc": 0.72, "last": False}) == "STOP"
    other = SimpleNamespace(trial_id="a_00004", has_reported_at_least_once=False)
    asha.on_trial_add(None, other)
    assert asha.on_trial_result(None, other, {"examples": 640, "val_acc": 0.9, "last": False}) == "CONTINUE"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preset": "img-clf-mnist"},
            "--resume: preset of the sweep was 'quickstart' and is 'img-clf-mnist', so that trials would be of another",
        ),
        ({"overrides": ("--optim.weight-decay", "0.5")}, "--resume: experiment of the sweep"),
        ({"overrides": ("--run.val-batches", "1")}, "--resume: overrides of the sweep was .*trained or measured in another way"),
        ({"reports": 2}, "--resume: reports of the sweep was 9 and is 2, so that trials would be measured at other steps"),
        ({"scheduler": "pbt", "trials": 2}, "pbt change their values .* choose another --name"),
    ],
)
def test_changes_after_which_trials_could_not_be_compared_are_refused_with_what_to_do(folder, changes, message):
    with pytest.raises(UserError, match=message):
        check_folder(replace(HIGH, **changes), folder, resume=True)
    assert names(folder, "trials") == {"trial-00000", "trial-00001", "trial-00002"}


def test_a_field_that_is_new_since_makes_no_other_sweep_and_another_value_is_named(folder):
    settle(WIDE, folder, [])
    saved = json.loads((folder / SETTINGS).read_text())
    del saved["trained"]["data"]["lanes"]
    write_json(folder / SETTINGS, saved | {"experiment": "digest without it"})
    assert check_folder(WIDE, folder) == []

    saved["trained"]["optim"]["weight_decay"] = 0.3
    write_json(folder / SETTINGS, saved | {"experiment": "another"})
    with pytest.raises(UserError, match=r"holds another sweep \(optim.weight_decay: 0.3 -> 0.01\)"):
        check_folder(WIDE, folder)
    message = rf"what the sweep trains has changed \(optim.weight_decay: 0.3 -> 0.01\), .*--warm-start {folder.name} "
    with pytest.raises(UserError, match=message):
        check_folder(WIDE, folder, resume=True)


def test_other_workers_are_no_other_sweep_for_resume(folder):
    assert check_folder(replace(WIDE, overrides=("--workers", "2")), folder, resume=True) == ["overrides:  -> --workers 2"]


def test_a_space_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr(sweep, "connect", never)
    wrong = tune.sample_from(lambda config: config["values"]["optim.learning_rate"])
    with pytest.raises(
        UserError, match="the function of optim.warmup_steps in the sweep's space fails with KeyError: 'optim.learning_rate'"
    ):
        sweep.run_sweep(replace(WIDE, space={**WIDE.space, "optim.warmup_steps": wrong}), tmp_path / "s")
    with pytest.raises(UserError, match="warmup-steps.*soon"):
        sweep.run_sweep(replace(WIDE, space={**WIDE.space, "optim.warmup_steps": tune.sample_from(lambda config: "soon")}), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_sweep_that_fails_before_its_first_trial_leaves_no_settings(tmp_path):
    write_json(tmp_path / "sweep.json", {})
    (tmp_path / "tune").mkdir()
    sweep.forget_unbegun(tmp_path)
    assert not (tmp_path / "sweep.json").exists() and not (tmp_path / "tune").exists()
    write_json(tmp_path / "sweep.json", {})
    write_json(tmp_path / "trials" / "trial-0" / "values.json", {})
    sweep.forget_unbegun(tmp_path)
    assert (tmp_path / "sweep.json").exists()


SPACE = """
from functools import partial
from ray import tune
from tuning.spaces import described
class Twice:
    def __init__(self, factor): self.factor = factor
    def __call__(self, config): return self.factor * config["values"]["optim.lr"]
def times(config, factor): return factor
def around(factor): return tune.sample_from(lambda config: factor)
if __name__ == "__main__":
    for factor in (2, 3):
        called = Twice(factor), partial(times, factor=factor), Twice(object())
        print([described(tune.sample_from(function)) for function in called], described(around(factor)))
"""


def test_what_is_called_is_known_by_source_and_values_the_same_in_every_process(tmp_path):
    (tmp_path / "mine.py").write_text(SPACE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run([sys.executable, tmp_path / "mine.py"], env=env, capture_output=True, text=True, check=True) for _ in range(2)
    ]
    assert outputs[0].stdout == outputs[1].stdout and "0x" not in outputs[0].stdout
    first, second = outputs[0].stdout.splitlines()
    one, two = (line.replace("]", "").split() for line in (first, second))
    assert [a == b for a, b in zip(one[1::2], two[1::2], strict=True)] == [False, False, True, False]
    assert described(tune.randn(0, 1)) != described(tune.randn(0, 2))


def test_a_value_is_in_a_domain_from_which_it_can_be_drawn():
    assert holds(tune.uniform(0, 1), 0.5, {}) and not holds(tune.uniform(0, 1), 1.5, {}) and not holds(tune.uniform(0, 1), "a", {})
    assert holds(tune.randint(1, 4), 3, {}) and not holds(tune.randint(1, 4), 4, {}) and not holds(tune.randint(1, 4), 2.5, {})
    assert holds(tune.qrandint(1, 4), 4, {})
    assert holds(tune.quniform(0, 1, 0.1), 0.3, {}) and not holds(tune.quniform(0, 1, 0.1), 0.35, {})
    assert holds(tune.choice([(0.9, 0.95)]), [0.9, 0.95], {}) and not holds(tune.choice([True]), 2, {})
    assert holds(tune.grid_search(["a"]), "a", {}) and not holds(tune.grid_search(["a"]), "b", {})
    assert holds(tune.randn(0, 1), -7.0, {}) and not holds(tune.randn(0, 1), True, {})


def test_a_sample_that_is_drawn_here_lies_in_its_space():
    import numpy as np

    space = {"optim.lr": tune.qloguniform(1e-4, 1e-1, 1e-4), "optim.optimizer.betas": tune.choice([(0.9, 0.95), (0.9, 0.99)]),
             "optim.warmup_steps": tune.sample_from(lambda config: int(1e4 * config["values"]["optim.lr"]))}  # fmt: skip
    values = [draw(space, np.random.RandomState(seed), {}) for seed in range(9)]
    assert all(holds(space[name], value[name], value) for value in values for name in space)
    assert len({value["optim.lr"] for value in values}) > 5 and json.dumps(values)
