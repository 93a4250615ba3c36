"""Experiments as YAML files: written, read, with mistakes named by their lines, and the schema for editors."""

import json
from dataclasses import replace

import jsonschema
import pytest
import yaml

from perceiver.catalog import CATALOG
from perceiver.config import UserError, to_dict
from perceiver.config.schema import experiment_schema, field_documents
from perceiver.config.training import TrainingConfig
from perceiver.experiments import find_experiment
from ray_jobs.cli import main_entry, parse_experiment
from ray_jobs.main import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def schema():
    found = experiment_schema(tuple(CATALOG))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def written(*words):
    with pytest.raises(SystemExit) as stop:
        parse_experiment([*words, "--write-config", "exp.yaml"], "ray_jobs.train")
    assert stop.value.code == 0


LINES = {
    "nothing": ([], {"preset": "quickstart"}),
    "fields": (
        ["--optim.lr", "1e-5", "--model.num-latents=7"],
        {"preset": "quickstart", "model": {"num_latents": 7}, "optim": {"lr": 1e-5}},
    ),
    "another class": (["--optim.schedule", "constant"], {"preset": "quickstart", "optim": {"schedule": {"type": "Constant"}}}),
    "a tuple": (
        ["--optim.optimizer.betas", "0.9", "0.95", "--training.max-steps", "5"],
        {"preset": "quickstart", "optim": {"optimizer": {"betas": [0.9, 0.95]}}, "training": {"max_steps": 5}},
    ),
}


@pytest.mark.parametrize(("words", "content"), LINES.values(), ids=LINES)
def test_a_command_line_becomes_a_file_that_says_only_what_differs_and_is_the_same_experiment(words, content, here, schema):
    written("quickstart", *words)
    found = yaml.safe_load((here / "exp.yaml").read_text())
    assert found == content
    schema.validate(found)
    expected = parse_experiment(["quickstart", *words], "ray_jobs.train")
    again = parse_experiment(["exp.yaml"], "ray_jobs.train")
    name = "exp" if words else ""
    assert again == replace(expected, preset="exp.yaml", run=replace(expected.run, name=name))
    changed = parse_experiment(["exp.yaml", "--optim.lr", "0.5"], "ray_jobs.train")
    assert changed.optim.lr == 0.5, "the command line is asked after the file"


def test_a_file_is_never_written_over_and_needs_a_name(here):
    (here / "exp.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        parse_experiment(["quickstart", "--write-config", "exp.yaml"], "ray_jobs.train")
    assert (here / "exp.yaml").read_text() == "mine"
    for words, message in ((["--write-config"], "needs the file"), (["--write-config=x.txt"], "must end in .yaml")):
        with pytest.raises(UserError, match=message):
            parse_experiment(["quickstart", *words], "ray_jobs.train")


MISTAKES = {
    "preset: quickstart\noptim:\n  lr: 1\n  warmupsteps: 3\n": "typo.yaml, line 4: field optim.warmupsteps does not.*mean warmup_steps",
    "preset: quickstart\n\nmodle: {num_latents: 3}\n": "typo.yaml, line 3: field modle does not exist, did you mean model",
    "preset: quickstart\noptim:\n  schedule:\n    type: Cosine\n    min_lr_fracton: 0\n": "line 5: field optim.schedule.min_lr_fracton",
    "preset: quickstart\noptim:\n  schedule:\n    type: Constant\n    dekay: 1\n": "line 5: field optim.schedule.dekay does not",
    "preset: quickstart\noptim: {lr: 1}\noptim: {lr: 2}\n": "typo.yaml, line 3: optim is given twice, first in line 2",
    "preset: quickstart\noptim: {lr: high}\n": "typo.yaml, line 2: optim.lr is 'high' and must be float",
    "preset: quickstart\noptim:\n  learning_rate: 1\n": "line 3: field optim.learning_rate does not exist, did you mean lr",
    "preset: quickstart\ntraining:\n  seed: 1\n  max-steps: 1.5\n": "line 4: training.max_steps is 1.5 and must be int or None",
    "preset: quickstart\ntraining:\n  precision: fp64\n": "line 3: training.precision is 'fp64' and must be one of .*, bf16, float8",
    "preset: quickstart\nrun: 3\n": "line 2: run is 3 and must be a mapping of fields",
    "preset: quickstart\ncallbacks:\n- type: EarlyStop\n  patience: many\n": "line 4: callbacks.0.patience is 'many' and must be int",
    "preset: quickstart\ncallbacks: [earlystop]\n": r"line 2: callbacks is \('earlystop',\) and must be a list of mappings.*EarlyStop, Ml",
    "preset: quickstart\noptim:\n  optimizer:\n    type: Adamw\n": "line 4: optim.optimizer.type is 'Adamw'.* did you mean AdamW.*Lion",
    "preset: quickstart\noptim: {optimizer: {type: Lyon}}\n": "line 2: optim.optimizer.type is 'Lyon'.*, did you mean Lion",
    "preset: quickstart\noptim: {optimizer: {type: 'nowhere_at:All'}}\n": "optim.optimizer.type is 'nowhere_at:All': .*cannot be loaded",
    "preset: [quickstart]\n": r"line 1: preset is \('quickstart',\) and must be str",
    "presett: quickstart\n": "line 1: field presett does not exist, did you mean preset",
    "preset: quickstat\n": "typo.yaml, line 1: .*quickstat.* does not exist, did you mean quickstart",
    "- 1\n": "holds no experiment",
    "": "holds no experiment",
    "optim: {lr: 1}\n": "needs a preset to start from",
    "preset: [\n": "typo.yaml, line 2 is no YAML: ",
    "preset: quickstart\n  optim:\n": "typo.yaml, line 2 is no YAML: mapping values are not allowed here",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_with_its_line(text, here):
    (here / "typo.yaml").write_text(text)
    with pytest.raises(UserError, match=MISTAKES[text]) as caught:
        find_experiment("typo.yaml")
    assert "\n" not in str(caught.value)


CHECKED = {
    "a file": ("preset: quickstart\noptim:\n  lr: -1\n", [], "error: exp.yaml, line 3: optim.lr is -1"),
    "another spelling": ("preset: quickstart\noptim:\n  warmup_steps: -1\n", [], "error: exp.yaml, line 3: optim.warmup-steps is -1"),
    "the file below": ("preset: base.yaml\n", [], "error: base.yaml, line 4: model.encoder.dropout is 3"),
    "the command line": ("preset: quickstart\noptim:\n  lr: 1\n", ["--optim.lr", "-1"], "error: optim.lr is -1"),
    "a preset": ("preset: quickstart\noptim:\n  lr: 1\n", ["--training.seed", "-1"], "error: training.seed is -1"),
}


@pytest.mark.parametrize(("text", "words", "message"), CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("command", [["train"], ["sweep", "--space", "optim.warmup_steps=choice(0,1)"]])
def test_a_value_that_a_check_refuses_is_named_with_the_line_that_sets_it(command, text, words, message, here, capsys):
    (here / "exp.yaml").write_text(text)
    (here / "base.yaml").write_text("preset: quickstart\nmodel:\n  encoder:\n    dropout: 3\n")
    with pytest.raises(SystemExit) as stop:
        main_entry(main, [command[0], "exp.yaml", *command[1:], *words])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_numbers_are_read_as_people_write_them_and_keys_in_both_spellings(here):
    (here / "exp.yaml").write_text("preset: quickstart\noptim: {lr: 1e-4, warmup-steps: 7, optimizer: {type: AdamW, betas: [0.9, 0.95]}}\n")
    found = find_experiment("exp.yaml")
    assert (found.optim.lr, found.optim.warmup_steps, found.optim.optimizer.betas) == (1e-4, 7, (0.9, 0.95))


def test_a_file_may_start_from_another_one(here):
    (here / "base.yaml").write_text("preset: quickstart\noptim: {lr: 0.5}\n")
    (here / "more.yaml").write_text("preset: base.yaml\ntraining: {seed: 3}\n")
    found = find_experiment("more.yaml")
    assert (found.optim.lr, found.training.seed) == (0.5, 3)


@pytest.mark.parametrize(
    "preset", ["quickstart", "clm-wikitext-small", "mlm-imdb-small", "txt-clf", "sam-small", "tables", "forecast-seasons"]
)
def test_every_whole_experiment_fits_the_schema(preset, schema):
    schema.validate(json.loads(json.dumps(to_dict(find_experiment(preset)))))


@pytest.mark.parametrize(
    "content",
    [
        {"preset": "quickstart", "optim": {"lrr": 1}},
        {"preset": "quickstart", "training": {"precision": "fp17"}},
        {"preset": "quickstart", "optim": {"schedule": {"type": "Cosine", "decay": 1}}},
        {"preset": "quickstart", "training": {"seed": "one"}},
        {"optim": {"lr": 1}},
    ],
)
def test_the_schema_refuses_what_the_command_would(content, schema):
    assert not schema.is_valid(content)


def test_the_schema_describes_fields_and_knows_classes_of_others(schema):
    assert field_documents(TrainingConfig)["seed"].startswith("Seed of initial weights")
    schema.validate({"preset": "quickstart", "task": {"type": "weather:Forecast", "anything": 1}, "optim": {"warmup-steps": 3}})


def test_the_command_prints_the_schema(capsys, here):
    assert main(["schema", "--out", "s.json"]) == 0
    assert "yaml-language-server: $schema=s.json" in capsys.readouterr().out
    assert json.loads((here / "s.json").read_text())["properties"]["optim"]["$ref"] == "#/$defs/OptimConfig"
