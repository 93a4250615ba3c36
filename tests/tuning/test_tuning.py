"""Sweeps without a training: what is refused, what fits, exchanges of checkpoints, reports, isoFLOP plans."""

import json
import shlex
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from ray import tune
from ray.tune.schedulers.pbt import _PBTTrialState

from perceiver.checkpoints import list_checkpoints
from perceiver.config import UserError, to_dict
from perceiver.datasets import Dataset
from perceiver.disk import write_json
from perceiver.presets import PRESETS
from ray_jobs import preprocess
from ray_jobs.cli import parse_experiment
from ray_jobs.seeds import parse_seeds
from tests.conftest import ROOT
from tests.data.test_prepare import tiny_sentencepiece_model
from tests.support.preparing import serially, write_jsonl
from tuning import population, report, sweep
from tuning.record import prune
from tuning.scaling_laws import plan, step_flops
from tuning.schedulers import scheduler, slot
from tuning.sweeps import SWEEPS, Sweep, check_sweep, find_sweep, trial_experiment
from tuning.trial import _experiment

GOOD = Sweep(preset="quickstart", space={"optim.lr": tune.loguniform(1e-4, 1e-2)})


@pytest.mark.parametrize("name", SWEEPS)
def test_ready_made_sweeps_are_sound_and_describe_themselves_alike_each_time(name):
    sweep.check_values(find_sweep(name))
    first, second = (json.dumps(sweep.describe(find_sweep(name))) for _ in range(2))
    assert first == second and " object at " not in first


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "quickstrat"}, "did you mean quickstart"),
        ({"space": {"optim.lrr": tune.uniform(0, 1)}}, "optim.lrr of the sweep's space does not exist, did you mean optim.lr"),
        ({"space": {}}, "either a space or points"),
        ({"space": {"run.name": tune.choice(["a"])}}, "run.name cannot be varied"),
        ({"space": {"optim.lr": tune.choice(["fast"])}}, "fast"),
        ({"trials": 0}, "trials is 0"),
        ({"scheduler": "pbt", "space": {"model.num_latents": tune.choice([8])}}, "pbt can change optim"),
        ({"search": "optuna", "scheduler": "pbt"}, "pbt needs search random"),
        ({"scheduler": "best"}, "must be one of fifo, asha, hyperband, pbt"),
        ({"search": "optuna", "space": {"optim.lr": tune.grid_search([1e-3])}}, "draws its own samples"),
    ],
)
def test_a_sweep_that_cannot_be_right_is_refused_with_a_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        sweep.check_values(replace(GOOD, **changes))


def test_every_number_and_choice_of_a_sweep_can_be_given_on_the_command_line():
    written_otherwise = {"preset", "space", "points", "overrides", "constraints", "seeds", "warm_start"}
    assert {field.name for field in fields(Sweep)} - written_otherwise == set(sweep.OPTIONS)


def test_a_sweep_of_a_file_is_found_and_others_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tuning.sweeps import Sweep\nfrom ray import tune\n"
        "def good():\n    return Sweep(preset='quickstart', space={'optim.lr': tune.uniform(0, 1)})\ndef bad():\n    return 3\n"
    )
    assert find_sweep(f"{tmp_path}/mine.py:good").preset == "quickstart"
    for name in (f"{tmp_path}/mine.py:bad", f"{tmp_path}/mine.py:none", f"{tmp_path}/other.py:good", "quickstar"):
        with pytest.raises(UserError, match="sweep "):
            find_sweep(name)


def swept(monkeypatch, tmp_path, *words: str):
    """What a sweep hands on to Ray Tune: the experiment that its trials vary, and its steps."""
    serially(monkeypatch)
    found = []
    monkeypatch.setattr(sweep, "connect", lambda parallel, dashboard: nullcontext())
    monkeypatch.setattr(sweep, "plan_capacity", lambda parallel, concurrent: sweep.Capacity(1, 1.0, 1, "room for one"))
    monkeypatch.setattr(sweep, "fit", lambda _, folder, base, capacity, steps, digest, edit: found.extend((base, steps)))
    monkeypatch.setattr(report, "write", lambda folder: [])
    with pytest.raises(KeyboardInterrupt):  # no trial was run
        sweep.run_sweep(replace(GOOD, preset="clm-c4-small", overrides=words), tmp_path / "sweep")
    return found


def test_a_sweep_finds_a_tokenizer_in_its_prepared_data_as_a_training_does(monkeypatch, tmp_path):
    serially(monkeypatch)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one two three"}] * 9)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "four"}])
    model = tmp_path / "my.model"
    model.write_bytes(tiny_sentencepiece_model())
    words = ["--data.source", str(tmp_path / "a.jsonl"), "--data.val-source", str(tmp_path / "b.jsonl"), "--data.root", str(tmp_path),
             "--data.tokenizer", str(model)]  # fmt: skip
    preprocess.prepare(parse_experiment(["clm-c4-small", *words], "ray_jobs.preprocess"))
    model.unlink()

    base, steps = swept(monkeypatch, tmp_path, *words)
    assert Path(base.data.tokenizer).read_bytes() == tiny_sentencepiece_model()
    settings = {"reports": 1, "trials": str(tmp_path), "population": False, "data": Dataset.find(base).manifest.digest}
    own = parse_experiment(["clm-c4-small", *words], "tuning.sweep")
    experiment, trial_steps = _experiment(own, {"optim.lr": 1e-3}, "trial-0", settings)
    assert experiment.data.tokenizer == base.data.tokenizer and trial_steps == steps


def test_a_sweep_prepares_a_source_that_is_streamed_by_itself_as_a_training_does(monkeypatch, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one two three " * 50}] * 400)
    data = ("--data.source", str(tmp_path / "a.jsonl"), "--data.root", str(tmp_path), "--data.prepare", "stream")
    model = ("--data.tokenizer", "bytes", "--model.max-seq-len", "128", "--model.max-latents", "64")
    base, _ = swept(monkeypatch, tmp_path, *data, *model)
    assert Dataset.find(base).manifest.stream


@pytest.mark.parametrize("count", [*range(1, 32), 500])
def test_schedulers_that_pause_trials_run_no_more_than_there_is_room_for(count):
    (share,) = slot(replace(GOOD, scheduler="pbt"), count).values()
    units = int(share * 10_000)  # as Ray counts: ten-thousandths, the rest is cut off
    assert (min(count, 30) + 1) * units > 10_000 and min(count, 30) * (units + 10) <= 10_000


class Member(SimpleNamespace):
    """A trial of a population."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def is_finished(self) -> bool:
        return False


@pytest.mark.parametrize("order", ["good first", "bad first"])
def test_a_loser_finds_something_to_take_over_whoever_reports_first(order):
    pbt = scheduler(replace(GOOD, scheduler="pbt", trials=2, perturb=0.25), 400, Path())
    pbt.set_search_properties("val_loss", "min")
    good, bad = (Member(name=name, status="RUNNING", experiment_tag="", config={"values": {"optim.lr": 1e-3}}) for name in "gb")
    found = []
    pbt._exploit = lambda controller, trial, donor: found.append((trial, donor))
    controller = SimpleNamespace(
        search_alg=None, get_trials=lambda: [good, bad], _schedule_trial_save=lambda trial, result: f"checkpoint of {trial.name}"
    )
    for trial in (good, bad):
        pbt._trial_state[trial] = _PBTTrialState(trial)
    rounds = [(good, 1.0), (bad, 2.0)] if order == "good first" else [(bad, 2.0), (good, 1.0)]
    for examples in (100, 200):
        for trial, value in rounds:
            pbt.on_trial_result(controller, trial, {"examples": examples, "val_loss": value, "last": False})
    assert found[0] == (bad, good) and len(found) == (2 if order == "good first" else 1)


def test_asha_knows_in_a_continued_sweep_what_was_reported_before(tmp_path):
    events = [{"event": "report", "trial": f"trial-0000{i}", "examples": 1000, "value": value} for i, value in enumerate((1.0, 1.1, 1.2))]
    asha = scheduler(replace(GOOD, scheduler="asha", grace=0.1), 10_000, tmp_path)
    asha.set_search_properties("val_loss", "min")
    trials = [SimpleNamespace(trial_id=f"a_0000{i}", has_reported_at_least_once=i < 3) for i in range(5)]
    result = {"examples": 1000, "val_loss": 1.5, "last": False}
    asha.on_trial_add(None, trials[3])
    assert asha.on_trial_result(None, trials[3], {**result, "val_loss": 2.0}) == "CONTINUE"
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for trial in (*trials[:3], trials[4]):
        asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, trials[4], {**result, "last": True}) == "CONTINUE"
    assert asha.on_trial_result(None, trials[4], result) == "STOP"


def test_a_field_of_several_numbers_can_be_varied():
    good = replace(GOOD, space={"optim.optimizer.betas": tune.choice([(0.9, 0.95), (0.9, 0.999)])})
    sweep.check_values(good)
    assert good.default() == {"optim.optimizer.betas": (0.9, 0.999)}
    assert trial_experiment(good.experiment(), {"optim.optimizer.betas": (0.9, 0.95)}).optim.optimizer.betas == (0.9, 0.95)


def test_a_sweep_in_an_object_store_is_refused():
    with pytest.raises(UserError, match="s3://bucket/sweeps and must be a folder"):
        sweep.sweep_folder("s3://bucket/sweeps", "mine")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/tmp/a", "../a", "", "x" * 300, "ü", "a\0b"])
def test_a_sweep_stays_inside_its_storage(tmp_path, name):
    with pytest.raises(UserError, match="--name is .* must be a plain folder name"):
        sweep.sweep_folder(str(tmp_path), name)
    assert sweep.sweep_folder(str(tmp_path), "mine-2.b") == tmp_path / "mine-2.b"


def test_a_sweep_does_not_write_into_a_folder_of_someone_else(tmp_path):
    (tmp_path / "report.html").write_text("all of it")
    with pytest.raises(UserError, match="has no sweep.json but holds other files .report.html.: choose another --name"):
        sweep.check_folder(GOOD, tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / ".lock").touch()  # of a start that was refused
    sweep.check_folder(GOOD, tmp_path)


def test_a_sweep_that_another_version_began_is_refused_in_a_sentence_that_says_so(tmp_path, capsys):
    """One of version 0.1.0: its settings are all the same, and its experiment was described otherwise."""
    old = sweep.describe(find_sweep("quickstart"))
    old["experiment"] = json.loads((ROOT / "tests/support/files/sweep-0.1.0.json").read_text())["experiment"]
    write_json(tmp_path / "old" / "sweep.json", old)
    write_json(tmp_path / "old" / "trials" / "trial-0" / "values.json", {})
    with pytest.raises(UserError, match="holds a sweep that version 0.1.0 began, and in version .* choose another --name"):
        sweep.run_sweep(find_sweep("quickstart"), tmp_path / "old")
    write_json(tmp_path / "old" / "sweep.json", {**old, "trials": 99})
    with pytest.raises(UserError, match="holds another sweep .*trials"):
        sweep.check_folder(find_sweep("quickstart"), tmp_path / "old")
    write_json(tmp_path / "old" / "sweep.json", {**sweep.describe(find_sweep("quickstart")), "version": "0.1.9"})
    sweep.check_folder(find_sweep("quickstart"), tmp_path / "old")


def make_run(folder: Path, steps: list[int], metrics: list[float] | None = None) -> Path:
    """A run folder with checkpoints that hold their own name."""
    folder.mkdir(parents=True)
    write = folder / "checkpoints"
    for step in steps:
        (write / f"step-{step:08d}").mkdir(parents=True)
        (write / f"step-{step:08d}" / "weights").write_text(f"{folder.name} {step}")
        write_json(write / f"step-{step:08d}" / "checkpoint.json", {"step": step, "metrics": {"val_loss": 1 / step}})
    write_json(folder / "experiment.json", {"experiment": to_dict(PRESETS["quickstart"]()), "data": "abc"})
    write_json(folder / "values.json", {"optim.lr": 0.1 * len(steps)})
    lines = [{"step": step, "val_loss": value} for step, value in zip(steps, metrics or [], strict=False)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_takeover_leaves_the_donors_checkpoint_as_the_last_one_and_can_be_done_again(tmp_path):
    donor, run = make_run(tmp_path / "donor", [10, 20, 30]), make_run(tmp_path / "run", [10, 20, 30])
    changed = trial_experiment(PRESETS["quickstart"](), {"optim.lr": 0.5})
    for _ in range(2):
        population.take_over(donor, 20, run, changed, {"optim.lr": 0.5})
        checkpoints = list_checkpoints(run / "checkpoints")
        assert [c.step for c in checkpoints] == [10, 20]
        assert [(c.path / "weights").read_text() for c in checkpoints] == ["run 10", "donor 20"]
    assert json.loads((run / "experiment.json").read_text()) == {"experiment": to_dict(changed), "data": "abc"}
    assert population.exchanges(run)[-1] == {"step": 20, "from": "donor", "values": {"optim.lr": 0.5}}
    assert [c.step for c in list_checkpoints(donor / "checkpoints")] == [10, 20, 30]


def test_a_donor_without_a_complete_checkpoint_is_an_error_and_the_run_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(population, "PATIENCE", 0.1)
    donor, run = make_run(tmp_path / "donor", [10]), make_run(tmp_path / "run", [10, 20])
    (donor / "checkpoints" / "step-00000010" / "checkpoint.json").unlink()
    with pytest.raises(population.DonorLost):
        population.take_over(donor, 10, run, PRESETS["quickstart"](), {})
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [10, 20]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sweep with a winner, a stopped trial, a diverged one and a failed one."""
    runs = {
        "trial-0": ([10, 20, 30], [2.0, 1.5, 1.0]), "trial-1": ([10, 20], [2.1, 1.9]), "trial-2": ([10], [2.2]), "trial-3": ([], []),
    }  # fmt: skip
    losses = {"trial-2": [2.0, 9.0]}
    events, now = [], 0.0
    for name, (steps, values) in runs.items():
        make_run(tmp_path / "trials" / name, steps, values)
        events.append({"time": now, "trial": name, "event": "start"})
        for number, loss in enumerate(losses.get(name, [2.0] * len(steps))):
            event = {"event": "report", "step": 10 * (number + 1), "examples": 320 * (number + 1), "loss": loss}
            events.append({"time": now + number, "trial": name, **event})
        failed = "the loss became nan" if name == "trial-3" else ""
        events.append({"time": now + 5, "trial": name, "event": "end", "failed": failed})
        now += 3
    (tmp_path / "trials" / "trial-0" / "result.json").write_text("{}")
    (tmp_path / "trials" / "trial-1" / "failed.txt").write_text("its workers were taken from it")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"cut of')
    write_json(tmp_path / "sweep.json", {**sweep.describe(GOOD), "default": {"optim.lr": 0.2}})
    return tmp_path


def test_the_report_orders_the_trials_names_what_became_of_them_and_what_was_gained(folder):
    trials = report.write(folder)
    assert [(t["trial"], t["status"]) for t in trials] == [
        ("trial-0", "finished"), ("trial-1", "stopped"), ("trial-2", "diverged"), ("trial-3", "failed"),
    ]  # fmt: skip
    lines = "\n".join(report.table(trials, report.read_settings(folder)))
    assert "trial-3" in lines and "the loss became nan" in lines
    assert "at step 20 the winner (trial-0) has val_loss 1.5000, the preset's own values (trial-1) 1.9000: better" in lines
    assert "python -m ray_jobs.train quickstart --optim.lr 0.3" in lines
    assert {"results.csv", "results.parquet", "report.html", "report.png"} <= {path.name for path in folder.iterdir()}


def test_the_presets_own_values_are_found_where_another_field_depends_on_them_and_where_they_are_several(folder):
    depends, betas = tune.sample_from(lambda config: 5), tune.choice([(0.9, 0.95), (0.9, 0.999)])
    made = replace(GOOD, space={**GOOD.space, "optim.warmup_steps": depends, "optim.optimizer.betas": betas})
    write_json(folder / "sweep.json", sweep.describe(made))
    for number, rate in enumerate((0.1, 3e-3, 0.3)):
        values = {"optim.lr": rate, "optim.warmup_steps": 5, "optim.optimizer.betas": [0.9, 0.999]}
        write_json(folder / "trials" / f"trial-{number}" / "values.json", values)
    for settings in (report.read_settings(folder), sweep.describe(made)):
        assert "the preset's own values (trial-1) 1.9000: better" in report.gain(report.read_trials(folder), settings)[0]


def test_the_result_files_have_one_type_for_each_field_whatever_was_varied(folder):
    varied = [
        {"optim.lr": 1e-3, "optim.optimizer.betas": [0.9, 0.95], "task.n": 1},
        {"optim.lr": 1, "optim.optimizer.betas": [0.9, 0.9], "task.n": "all"},
    ]
    for number, values in enumerate(varied):
        write_json(folder / "trials" / f"trial-{number}" / "values.json", values)
    report.write(folder)
    schema = pq.read_schema(folder / "results.parquet")
    types = {
        name: str(schema.field(name).type) for name in ("trial", "value", "step", "seconds", "optim.lr", "optim.optimizer.betas", "task.n")
    }
    assert types == {
        "trial": "string", "value": "double", "step": "int64", "seconds": "double",
        "optim.lr": "double", "optim.optimizer.betas": "string", "task.n": "string",
    }  # fmt: skip
    assert report.importance(report.read_trials(folder)).keys() == {"optim.lr"}  # of what is no number in all trials there is no rank


def test_the_picture_of_a_sweep_has_a_line_for_each_trial_its_values_and_when_it_ran(folder):
    trials = report.read_trials(folder)
    curves, values, times = report.draw(trials, report.read_settings(folder)).axes
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("optimizer step", "val_loss")
    assert curves.lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.5], [30, 1.0]]
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [
        "trial-0: 1.0000, finished", "trial-1: 1.9000, stopped", "trial-2: 2.2000, diverged", "trial-3: failed",
    ]  # fmt: skip
    assert [label.get_text().split("\n")[:3] for label in values.get_xticklabels()] == [
        ["optim.", "lr", "0 to 0.3"], ["", "val_loss", "1 to 2.2"],
    ]  # fmt: skip
    assert [label.get_text() for label in times.get_yticklabels()] == ["trial-3", "trial-2", "trial-1", "trial-0"]
    assert times.get_xlabel() == "seconds since the first trial started"


def test_the_winners_command_is_a_valid_one_and_as_long_as_the_preset_says():
    shortened = ("--training.max-steps", "60", "--training.max_epochs=None", "--run.val-batches", "2", "--source", "my folder")
    settings = sweep.describe(replace(GOOD, overrides=shortened))
    trial = {"values": {"optim.lr": 0.5, "optim.optimizer.betas": [0.9, 0.95]}}
    whole, same = (shlex.split(report.command(settings, trial, "winner", full_length=full)) for full in (True, False))
    assert whole[:3] == same[:3] == ["python", "-m", "ray_jobs.train"]
    whole, same = (parse_experiment(words[3:], "ray_jobs.train") for words in (whole, same))
    assert whole.training == PRESETS["quickstart"]().training and same.training.max_steps == 60
    assert (whole.optim.lr, whole.optim.optimizer.betas, whole.run.name, whole.data.source) == (0.5, (0.9, 0.95), "winner", "my folder")


@pytest.mark.parametrize(("seeds", "said"), [([0, 1], "0,1"), ([7], "7,")])
def test_the_winners_command_names_seeds_as_they_are_read(seeds, said):
    trial = {"values": {"optim.lr": 0.5, "training.seed": seeds[0]}}
    words = shlex.split(report.command({**sweep.describe(GOOD), "seeds": seeds}, trial, "winner", full_length=True))
    assert words[words.index("--seeds") + 1] == said and parse_seeds(said, 0) == seeds


def test_a_trial_is_not_finished_before_ray_tune_says_so(folder):
    """Its process may still be at its last words, for which it needs its checkpoints."""
    events = (folder / "events.jsonl").read_text().splitlines()
    (folder / "events.jsonl").write_text("\n".join(e for e in events if not ('"end"' in e and '"trial-0"' in e)))
    assert {t["trial"]: t["status"] for t in report.read_trials(folder)}["trial-0"] == "unfinished"


def test_checkpoints_of_losing_trials_are_thrown_away(folder):
    prune(folder, report.read_trials(folder), 1)
    left = {run.name: [c.step for c in list_checkpoints(run / "checkpoints")] for run in (folder / "trials").iterdir()}
    assert left == {"trial-0": [30], "trial-1": [], "trial-2": [], "trial-3": []}


def test_all_trainings_of_a_budget_cost_the_same(tmp_path):
    budgets, widths = [3e13, 1e14], [64, 96, 128, 192, 256]
    study, skipped = plan("clm-wikitext-small", ["--model.max-seq-len", "256", "--model.max-latents", "128"], budgets, widths)
    base = study.experiment()
    costs = []
    for point in study.points:
        made = trial_experiment(base, point)
        check_sweep(replace(study, points=(point,)))
        costs.append(made.training.max_steps * step_flops(made))
    per_budget = [[c for c in costs if abs(c / b - 1) < 0.02] for b in budgets]
    assert sum(map(len, per_budget)) == len(costs) == 2 * len(widths) - len(skipped)
    with pytest.raises(UserError, match="pays for 0 of the widths"):
        plan("clm-wikitext-small", [], [1e9, 1e10], widths)
    with pytest.raises(UserError, match="need a causal language model"):
        plan("quickstart", [], budgets, widths)
