"""Experiments that live outside the package: how they are found, what they bring, and what is said of their mistakes."""

import importlib
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from perceiver.config import Experiment, ScheduleConfig, UserError, flatten, from_dict, to_dict
from perceiver.experiments import command_words, find_experiment
from perceiver.extensions import Code, code_of, code_of_modules
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.tasks.check import check_task
from perceiver.trust import check_trust, trust
from ray_jobs import data, train
from ray_jobs.cli import parse_experiment
from ray_jobs.shipping import Shipped
from tests.conftest import ROOT
from tests.support.outside import copy_examples, forget


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The example files in a folder that is the working one; whatever a test imports from there is forgotten."""
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    monkeypatch.chdir(copy_examples(tmp_path / "mine"))
    yield tmp_path / "mine"
    forget()


@pytest.mark.parametrize(("name", "lines"), [("weather", 120), ("transformer", 60)])
def test_an_own_experiment_and_an_own_model_stay_as_short_as_they_are_said_to_be(name, lines):
    assert len((ROOT / "docs" / "examples" / f"{name}.py").read_text().splitlines()) <= lines


# ------------------------------------------------------------------------------------------------------------------- doors


def test_an_experiment_is_found_by_preset_file_module_run_and_yaml(folder, monkeypatch):
    assert find_experiment("quickstart") == PRESETS["quickstart"]()
    from_file = find_experiment("weather.py:tiny")
    assert from_file.run_name == "tiny" and type(from_file.task).__name__ == "Forecast"
    assert replace(find_experiment("weather:tiny"), preset="weather.py:tiny") == from_file
    run = folder.parent / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "experiment.json").write_text(json.dumps({"experiment": to_dict(from_file), "data": "x"}))
    saved = find_experiment(str(run))
    assert saved.identity == from_file.identity and (saved.run.name, saved.run.storage) == ("tiny", str(run.parent))
    (folder / "mine.yaml").write_text("preset: weather.py:tiny\noptim:\n  lr: 0.1\n  optimizer: {momentum: 0.5}\ntask: {huber: 2.0}\n")
    mine = find_experiment("mine.yaml")
    assert (mine.optim.lr, mine.optim.optimizer.momentum, mine.task.huber, mine.run_name) == (0.1, 0.5, 2.0, "mine")
    (folder / "mine.json").write_text(json.dumps(to_dict(from_file)))
    assert find_experiment("mine.json").identity == from_file.identity


def test_an_installed_package_registers_experiments(folder, monkeypatch):
    point = types.SimpleNamespace(name="lab-weather", load=lambda: __import__("weather").tiny)
    monkeypatch.setattr("perceiver.experiments.installed_experiments", lambda: {"lab-weather": point})
    sys.path.insert(0, str(folder))
    assert find_experiment("lab-weather").run_name == "lab-weather"
    monkeypatch.setattr(point, "load", lambda: {}["weather"])
    point.value = "weather:tiny"
    with pytest.raises(UserError, match=r"experiment 'lab-weather' of an installed package \(weather:tiny\) fails: .*KeyError"):
        find_experiment("lab-weather")


def test_what_a_source_that_is_code_yields_is_shown(folder, capsys):
    assert data.main(["weather.py:series"]) == 0
    shown = capsys.readouterr().out
    assert 'ArrayRows(past=((72, 7), "float32"), future=((24, 7), "float32"))' in shown and "1 part of training, 1 part" in shown
    (folder / "chance.py").write_text(
        "import numpy as np\ndef one(split):\n    yield {'x': np.random.rand(2)}\ndef two(split):\n    yield 3\n"
    )
    with pytest.raises(UserError, match="yields other examples when it is read again"):
        data.main(["chance.py:one"])
    with pytest.raises(UserError, match="yields a int and must yield mappings"):
        data.main(["chance.py:two"])
    with pytest.raises(UserError, match="is code, of which there is no page"):
        data.main(["weather.py:series", "--html", "page.html"])


def test_a_module_beside_the_command_is_found_and_hides_nothing(folder, monkeypatch):
    """A console script does not look where it is run, as `python -m` does."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(folder))])
    (folder / "json.py").write_text("1 / 0\n")
    assert find_experiment("weather:tiny").run_name == "tiny"
    assert sys.path[-1] == str(folder) and "json" in sys.modules


def test_a_file_may_start_from_what_lies_beside_it(folder, monkeypatch, tmp_path):
    (folder / "beside.yaml").write_text("preset: weather.py:tiny\ntask: {huber: 3.0}\n")
    (folder / "above.yaml").write_text("preset: beside.yaml\n")
    (folder / "deep").mkdir()
    with pytest.raises(SystemExit):
        parse_experiment(["weather.py:tiny", "--task.huber", "4", "--write-config", "deep/er.yaml"], "ray_jobs.train")
    monkeypatch.chdir(tmp_path)
    assert find_experiment(str(folder / "above.yaml")).task.huber == 3.0
    assert find_experiment(str(folder / "deep" / "er.yaml")).task.huber == 4.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "did you mean quickstart"),
        ("weather.py:tinny", "weather.py has no tinny, did you mean tiny"),
        ("wether.py:tiny", "there is no such file"),
        ("weather.py", "name a function of that file"),
        ("nowhere.module:tiny", "there is no module nowhere"),
        ("weather.py:SENSORS", "is a int and must be an Experiment"),
        ("broken.py:tiny", "broken.py, line 2: SyntaxError"),
        ("failing.py:tiny", "failing.py, line 1: ZeroDivisionError"),
        ("failing2.py:tiny", "failing2.py, line 2: KeyError: 'x'"),
        ("json.py:tiny", "another module json is imported already"),
        ("antigravity.py:tiny", "antigravity is the name of an installed module: give the file another name"),
        ("none.yaml", "cannot be read"),
        ("typo.yaml", "typo.yaml, line 2: field optim.learningrate does not exist"),
        ("list.yaml", "holds no experiment"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(folder, name, message):
    (folder / "broken.py").write_text("x = 1\ndef tiny(:\n")
    (folder / "failing.py").write_text("1 / 0\n")
    (folder / "failing2.py").write_text("def tiny():\n    return {}['x']\n")
    (folder / "json.py").write_text("def tiny(): pass\n")
    (folder / "antigravity.py").write_text("def tiny(): pass\n")
    (folder / "typo.yaml").write_text("preset: quickstart\noptim: {learningrate: 1}\n")
    (folder / "list.yaml").write_text("[1, 2]\n")
    with pytest.raises(UserError) as error:
        find_experiment(name)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["site-packages", "lib/python3/dist-packages"])
def test_what_is_installed_outside_of_the_environment_is_not_the_users_code(tmp_path, monkeypatch, place):
    """An environment may look into the system's packages, or the user's: their files are not sent along, nor kept with a run."""
    installed = tmp_path / place
    installed.mkdir(parents=True)
    (installed / "borrowed_package.py").write_text("VALUE = 1\n")
    (tmp_path / "borrowing.py").write_text("import borrowed_package\nimport borrowed_neighbour\n")
    (tmp_path / "borrowed_neighbour.py").write_text("")
    monkeypatch.syspath_prepend(installed)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("borrowing")
    try:
        assert set(code_of_modules(["borrowing", "borrowed_package"]).files) == {"borrowing.py", "borrowed_neighbour.py"}
    finally:
        for name in ("borrowing", "borrowed_package", "borrowed_neighbour"):
            sys.modules.pop(name, None)


def test_any_section_can_be_given_another_class_by_name(folder):
    find_experiment("weather.py:tiny")
    words = ["quickstart", "--optim.optimizer", "weather:NAdam", "--optim.optimizer.momentum", "0.3", "--optim.schedule=constant"]
    experiment = parse_experiment(words, "x")
    assert experiment.optim.optimizer.momentum == 0.3 and type(experiment.optim.schedule).__name__ == "Constant"
    for wrong, message in (("adaam", "did you mean adam"), ("weather:Forecast", "is no OptimizerConfig")):
        with pytest.raises(UserError, match=message):
            parse_experiment(["quickstart", "--optim.optimizer", wrong], "x")


def test_the_words_of_an_experiment_make_it_again(folder):
    words = ["weather.py:tiny", "--task.huber", "0.5", "--optim.optimizer", "adam", "--optim.optimizer.eps", "1e-6", "--workers", "1"]
    experiment = parse_experiment(words, "x")
    assert parse_experiment(command_words(experiment.preset, to_dict(experiment)), "x") == experiment


def test_the_fields_of_ones_own_classes_are_typed_and_have_help(folder, capsys):
    with pytest.raises(UserError, match="task.huber"):
        parse_experiment(["weather.py:tiny", "--task.huber", "much"], "x")
    with pytest.raises(SystemExit):
        parse_experiment(["weather.py:tiny", "--help"], "x")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Decay of the mean of the gradients." in text and "--model.input.num-frequency-bands" in text


# --------------------------------------------------------------------------------------------------------- saved, foreign


def test_classes_of_this_package_are_found_wherever_they_stood_when_they_were_saved():
    tree = json.loads(json.dumps(to_dict(PRESETS["clm-c4"]())))
    experiment = from_dict(tree)
    moved = json.dumps(tree).replace("perceiver.tasks.causal_lm:", "perceiver.config:").replace("perceiver.models.perceiver_ar:", "")
    assert moved != json.dumps(tree) and from_dict(json.loads(moved)) == experiment


def test_experiments_of_version_0_1_are_read():
    old = json.loads((ROOT / "tests/support/files/experiment-0.1.0.json").read_text())
    experiment = from_dict(old)
    assert experiment.optim.schedule.min_lr_fraction == 0.1 and experiment.optim.optimizer.betas == (0.9, 0.95)
    assert type(experiment.optim.optimizer).__name__ == "AdamW" and from_dict(to_dict(experiment)) == experiment


def test_a_foreign_configuration_imports_nothing(folder):
    (folder / "mine.py").write_text("open('ran', 'w').close()\nfrom perceiver.config import TaskConfig\nclass Task(TaskConfig): pass\n")
    sys.path.insert(0, str(folder))
    with pytest.raises(UserError, match="mine:Task.*import mine first if you trust it"):
        from_dict({"type": "mine:Task"}, foreign=True)
    assert not (folder / "ran").exists()
    assert type(from_dict({"type": "mine:Task"})).__name__ == "Task" and (folder / "ran").exists()
    assert type(from_dict({"type": "mine:Task"}, foreign=True)).__name__ == "Task"  # imported by the program itself


@pytest.mark.parametrize("data", [{"type": 3}, {}, {"type": "Experiment", "task": 1}, {"type": "os:system"}, {"type": "Nothing"}])
def test_a_configuration_of_another_shape_is_refused(data):
    with pytest.raises(UserError):
        from_dict({"type": "OptimConfig", "lr": 1, "lrr": data} if not data else data)


# -------------------------------------------------------------------------------------------------------------------- code


def test_code_is_the_file_and_what_it_imports_from_beside_it(folder):
    assert list(code_of(find_experiment("transformer.py:baseline")).files) == ["transformer.py", "weather.py"]
    assert not code_of(PRESETS["quickstart"]())
    code = code_of(find_experiment("weather.py:tiny"))
    assert code.digest != Code({**code.files, "weather.py": code.files["weather.py"] + "\n"}).digest


def test_a_broken_file_beside_an_experiment_is_named_with_its_line(folder):
    (folder / "late.py").write_text(
        "def never_called():\n    import beside\n\n\ndef tiny():\n    import weather\n\n    return weather.tiny()\n"
    )
    (folder / "beside.py").write_text("x = 1\ny = = 2\n")
    with pytest.raises(UserError, match=r"beside.py, line 2: SyntaxError: invalid syntax"):
        code_of(find_experiment("late.py:tiny"), ["late.py:tiny"])


def test_a_shipped_object_brings_its_code_to_a_process_without_it(folder, tmp_path):
    import subprocess

    from ray import cloudpickle

    task = find_experiment("weather.py:tiny").task
    (tmp_path / "shipped.bin").write_bytes(cloudpickle.dumps(Shipped(task)))
    script = "import sys, ray.cloudpickle as p; print(p.loads(open(sys.argv[1], 'rb').read()).value.huber)"
    command = [sys.executable, "-c", script, str(tmp_path / "shipped.bin")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"})
    assert done.stdout.strip() == "1.0", done.stderr


def test_a_run_with_changed_code_is_not_continued_by_accident(folder, tmp_path):
    run = tmp_path / "runs" / "tiny"
    experiment = find_experiment("weather.py:tiny")
    code = code_of(experiment)
    Run(run).save_code(code)
    (run / "experiment.json").write_text(json.dumps({"experiment": to_dict(experiment), "data": "x"}))
    Run(run).check_code(code)
    changed = Code({"weather.py": code.files["weather.py"].replace("0.5 * week", "0.4 * week")})
    with pytest.raises(UserError, match="weather.py changed since run tiny began.*--allow-changed-code"):
        Run(run).check_code(changed)
    Run(run).check_code(changed, allow_changed=True)
    Run(run).save_code(changed)
    assert Code.load(run / "code").digest == changed.digest and Code.load(run / "code-before-1").digest == code.digest


def test_the_code_of_somebody_elses_run_is_not_imported_until_the_user_says_so(folder, tmp_path):
    run = tmp_path / "theirs"
    Run(run).save_code(Code({"mine.py": "open('ran', 'w').close()\nfrom perceiver.config import TaskConfig\nclass T(TaskConfig): pass\n"}))
    tree = to_dict(PRESETS["quickstart"]()) | {"task": {"type": "mine:T"}}
    (run / "experiment.json").write_text(json.dumps({"experiment": tree, "data": "x"}))
    with pytest.raises(UserError, match="brings code of its own .mine.py. that was never run.*--trust-code"):
        Run(run).load()
    assert not (folder / "ran").exists()
    assert type(Run(run).load(trust_code=True)[0].task).__name__ == "T" and (folder / "ran").exists()
    check_trust(Code.load(run / "code"), "run", run)  # remembered


def test_what_a_training_has_imported_is_trusted_however_it_was_named(folder, tmp_path, monkeypatch):
    """A class given to a section, say: the run that it makes is this user's own."""
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    (folder / "mine.py").write_text((folder / "weather.py").read_text())
    experiment = parse_experiment(["quickstart", "--optim.optimizer", "mine:NAdam", "--name", "taken"], "ray_jobs.train")
    other = tmp_path / "runs" / "taken"
    other.mkdir(parents=True)
    (other / "experiment.json").write_text(json.dumps({"experiment": to_dict(find_experiment("quickstart")), "data": "x"}))
    with pytest.raises(UserError, match="mine.py changed since run taken began"):
        train.run(experiment)
    check_trust(code_of(experiment), "a run", folder)


def test_naming_a_file_is_trusting_it(folder, tmp_path):
    code = code_of(find_experiment("weather.py:tiny"))
    check_trust(code, "run", tmp_path)
    with pytest.raises(UserError, match="never run"):
        check_trust(Code({"weather.py": "x = 1"}), "run", tmp_path)
    trust(Code({"weather.py": "x = 1"}))
    check_trust(Code({"weather.py": "x = 1"}), "run", tmp_path)


# -------------------------------------------------------------------------------------------------------------- check_task


def test_the_examples_keep_the_contract(folder):
    for name in ("weather.py:tiny", "transformer.py:baseline"):
        check_task(find_experiment(name))
    check_task(PRESETS["quickstart"]())


MISTAKES = {
    "no loss": ("    def loss(self, model, batch):", "    def lost(self, model, batch):", "ForecastTask needs a method loss"),
    "mean": ('return (each * batch["valid"]).sum(), {', 'return each[batch["valid"]].mean(), {', "it is the mean, and must be the sum"),
    "not reduced": (
        'return (each * batch["valid"]).sum(), {',
        'return each * batch["valid"], {',
        "a loss of shape (3,) and must return its sum",
    ),
    "padding counts": ('(each * batch["valid"]).sum(), {', "each.sum(), {", "with an example of padding, which must add nothing"),
    "wrong key": ('batch["past"]).float()', 'batch["pats"]).float()', "ForecastTask.loss fails: weather.py, line"),
    "wrong shape": ("num_outputs=SENSORS", "num_outputs=SENSORS + 1", "ForecastTask.loss fails"),
    "undeclared metric": ('"loss": "min", "mae": "min"', '"loss": "min"', "metric_directions does not say"),
    "not finite": ('float(sums[m].mean() / sums["targets"])', 'float("nan")', "must give finite numbers"),
    "predict of another size": (
        '{"forecast": model(batch["past"])}',
        '{"forecast": model(batch["past"])[:1]}',
        "ForecastTask.predict of 2 examples",
    ),
    "optimizer": ("return torch.optim.NAdam(", "return dict(", "NAdam.build returned a dict and must return a torch.optim.Optimizer"),
    "channels": ("return SENSORS + 2 *", "return SENSORS + 3 *", "fails"),
    "no channels": ("    def adapted_channels(self):", "    def channels(self):", "Sensors needs a method adapted_channels"),
    "unknown dtype": ('"float32"), future', '"float33"), future', "column past has type 'float33'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_ones_own_class_is_named_with_its_method(folder, mistake):
    right, wrong, message = MISTAKES[mistake]
    text = (folder / "weather.py").read_text()
    assert text.count(right) == 1
    (folder / "weather.py").write_text(text.replace(right, wrong))
    with pytest.raises(UserError) as error:
        check_task(find_experiment("weather.py:tiny"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_batch_that_cannot_be_without_rows_is_named(folder):
    text = (folder / "weather.py").read_text()
    collate = (
        "    def collate(self, rows, size, split, train, step):\n"
        "        batch = super().collate(rows, size, split, train, step)\n"
        '        return {**batch, "first": batch["valid"] * (rows["row"].to_pylist()[0] < 0)}\n\n'
    )
    (folder / "weather.py").write_text(text.replace("    def predict(", collate + "    def predict("))
    with pytest.raises(UserError, match="ForecastTask.collate fails: .* for a batch without rows, which a worker may have"):
        check_task(find_experiment("weather.py:tiny"))


def test_a_random_choice_that_is_no_function_of_the_row_is_named(folder):
    text = (folder / "weather.py").read_text()
    collate = (
        "    def collate(self, rows, size, split, train, step):\n"
        "        batch = super().collate(rows, size, split, train, step)\n"
        '        return {**batch, "past": batch["past"] + torch.randn(1)}\n\n'
    )
    (folder / "weather.py").write_text(text.replace("    def predict(", collate + "    def predict("))
    with pytest.raises(UserError, match="ForecastTask.collate gave another 'past' for the same rows"):
        check_task(find_experiment("weather.py:tiny"))


def test_a_model_without_layers_or_with_weights_of_chance_is_named(folder):
    text = (folder / "transformer.py").read_text()
    for right, wrong, message in (
        ("    def layers(self):", "    def parts(self):", "Transformer needs a method layers"),
        ("initialize(self, 0.1, seed)", "[nn.init.normal_(p) for p in self.parameters()]", "must depend on the seed alone"),
        ("return list(self.blocks)", "return [nn.Linear(1, 1)]", "must return some of the model's own modules"),
    ):
        forget()
        (folder / "transformer.py").write_text(text.replace(right, wrong))
        with pytest.raises(UserError, match=message):
            check_task(find_experiment("transformer.py:baseline"))


class Broken(ScheduleConfig):
    """A schedule that divides by nothing."""

    def factor(self, step: int, total_steps: int) -> float:
        return float("nan") if step else 1.0


def test_a_schedule_that_gives_no_number_is_named():
    experiment = PRESETS["quickstart"]()
    with pytest.raises(UserError, match=r"Broken.factor\(1, 100\) returned nan"):
        check_task(replace(experiment, optim=replace(experiment.optim, schedule=Broken())))


def test_what_a_step_of_ones_own_model_takes_is_counted(folder):
    experiment = find_experiment("transformer.py:baseline")
    task = experiment.task.build(experiment.model, experiment.data, 0)
    width, hours, layers = 64, 72, 3
    products = 2 * hours * width * (4 * width + 2 * 2 * width) + 2 * 2 * hours * hours * width
    ends = 2 * hours * 7 * width + 2 * width * 24 * 7
    # Forward, and twice that backward; the input needs no gradient.
    assert task.flops_per_example() == pytest.approx(3 * (layers * products + ends) - 2 * hours * 7 * width, rel=0.01)
    assert isinstance(experiment, Experiment) and flatten(to_dict(experiment))["model.num_layers"] == 3
    with torch.device("meta"):
        assert isinstance(task.build_model(), nn.Module)
