"""The list of runs."""

import fcntl
import json
import shlex
from dataclasses import replace

import pytest

from perceiver.config import UserError, to_dict
from perceiver.housekeeping import foreign_files
from perceiver.runs import TAIL, Run
from ray_jobs import runs
from ray_jobs.cli import parse_experiment
from tests.tuning.test_tuning import make_run


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
    path = folder / "halted" / "experiment.json"
    path.write_text(json.dumps({"experiment": to_dict(experiment), "data": "x"}))
    made = shlex.split(runs.continue_command(folder / "halted"))
    again = parse_experiment(made[3:], "ray_jobs.train")
    assert again == replace(experiment, run=replace(experiment.run, name="halted", storage=str(folder)))


def test_a_run_that_says_how_long_it_is_shows_it_and_one_of_an_older_version_does_not(folder):
    path = folder / "halted" / "experiment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 750, "version": "0.2.0"}))
    found = {run["name"]: run["of"] for run in runs.list_runs(folder)}
    assert (found["halted"], found["done"]) == (750, None)


DAMAGES = {
    "empty file": ("experiment.json", b""),
    "cut file": ("experiment.json", b'{"experiment": {"task"'),
    "list": ("experiment.json", b"[]"),
    "null": ("experiment.json", b"null"),
    "no sections": ("experiment.json", b'{"experiment": {"preset": "quickstart"}}'),
    "nested deep": ("experiment.json", b"[" * 100_000),
    "not UTF-8": ("experiment.json", b"\xff\xfe\x00"),
    "cut checkpoint": ("checkpoints/step-00000020/checkpoint.json", b'{"step": 2'),
    "checkpoint that is a list": ("checkpoints/step-00000020/checkpoint.json", b"[1]"),
    "metric that is text": ("checkpoints/step-00000020/checkpoint.json", b'{"step": 20, "metrics": {"val_loss": "low"}}'),
    "metrics that are no records": ("metrics.jsonl", b'5\n{"step": "x"}\n\xff\n'),
}


@pytest.mark.parametrize(("file", "content"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_costs_its_own_line_alone(folder, capsys, file, content):
    (folder / "halted" / file).write_bytes(content)
    assert runs.main([str(folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in lines[1:5]] == ["broken", "done", "halted", "held"]
    assert "quickstart" in lines[1] and "quickstart" in lines[4]
    if file == "experiment.json":
        assert lines[3][1] == "damaged" and any(words[:2] == ["damaged", "halted:"] for words in lines)


def test_a_damaged_last_line_of_metrics_costs_itself_alone(folder):
    path = folder / "halted" / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 11, "lo\n{"step": 12, "loss": 1}\n{"step": 13, "lo')
    assert Run(folder / "halted").last_step() == 12


def test_the_last_step_of_a_long_run_is_found_from_the_end(folder):
    path = folder / "halted" / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(10_000)) + '{"step": 10')
    assert path.stat().st_size > 3 * TAIL
    assert Run(folder / "halted").last_step() == 9999


def test_no_runs_and_no_folder_yet_are_no_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "none"))
    assert runs.main([]) == 0
    assert capsys.readouterr().out == f"there are no runs in {tmp_path / 'none' / 'runs'}\n"
    assert runs.main([str(tmp_path)]) == 0
    assert "there are no runs" in capsys.readouterr().out
    assert runs.main(["--json"]) == 0
    assert capsys.readouterr().out == ""


def test_the_table_and_json_are_printed_and_a_missing_folder_is_a_sentence(folder, capsys):
    assert runs.main([str(folder)]) == 0
    assert f"continue halted: python -m ray_jobs.train {folder / 'halted'}" in capsys.readouterr().out
    runs.main([str(folder), "--json"])
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["broken", "done", "halted", "held"]
    with pytest.raises(UserError, match="no folder of runs"):
        runs.main([str(folder / "none")])


def change(run, lr, **metrics):
    """Changes a run's learning rate and the metrics of its checkpoints."""
    content = json.loads((run / "experiment.json").read_text())
    content["experiment"]["optim"]["lr"] = lr
    (run / "experiment.json").write_text(json.dumps(content))
    for path in run.glob("checkpoints/*/checkpoint.json"):
        marker = json.loads(path.read_text())
        path.write_text(json.dumps(marker | {"metrics": metrics}))


@pytest.fixture
def tried(folder):
    for name, lr, metric in [("done", 1e-2, 0.95), ("held", 1e-3, 0.97), ("broken", 1e-1, 0.5)]:
        change(folder / name, lr, val_acc=metric)
    change(folder / "halted", 1e-4)
    return folder


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("optim.lr>1e-3 and val_acc>0.9", ["done"]),
        ("optim.lr > 1e-3 or val_acc > 0.9", ["broken", "done", "held"]),
        ("1e-3 < optim.lr <= 1e-2", ["done"]),
        ("status == 'failed'", ["broken"]),
        ("name in ('held', 'halted')", ["halted", "held"]),
        ("not (name in ['held', 'halted'])", ["broken", "done"]),
        ("val_acc != 0.5", ["done", "held"]),
        ("name < 3", []),
    ],
)
def test_runs_are_chosen_by_fields_metrics_and_columns(tried, capsys, where, names):
    assert runs.main([str(tried), "--json", "--where", where]) == 0
    found = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert found == names


@pytest.mark.parametrize(
    "where", ["__import__('os').system('true')", "optim.lr", "lr >", "a.b().c > 1", "optim.weight-decay > 0", "[x for x in y] == 1", "("]
)
def test_what_is_no_condition_is_refused_and_never_executed(tried, where):
    with pytest.raises(UserError, match="cannot be read: compare fields"):
        runs.main([str(tried), "--where", where])


def test_runs_are_sorted_those_without_a_value_last_and_columns_are_of_choice(tried, capsys):
    runs.main([str(tried), "--sort", "val_acc", "--reverse", "--columns", "name,val_acc,optim.lr"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["name", "val_acc", "optim.lr"]
    assert [words[0] for words in lines[1:5]] == ["held", "done", "broken", "halted"]
    assert lines[1][1:] == ["0.97", "0.001"]
    runs.main([str(tried), "--sort", "val_acc", "--columns", "name"])
    assert capsys.readouterr().out.split()[1:5] == ["broken", "done", "held", "halted"]


@pytest.mark.parametrize("option, value", [("--where", "optim.lrr > 1"), ("--sort", "optim.lrr"), ("--columns", "name,optim.lrr")])
def test_a_name_that_no_run_has_is_a_sentence_with_the_nearest(tried, option, value):
    with pytest.raises(UserError, match=f"{option} optim.lrr: no run has .* did you mean optim.lr?"):
        runs.main([str(tried), option, value])


def test_a_trial_of_a_sweep_is_not_offered_for_continuing(tmp_path, capsys):
    make_run(tmp_path / "sweep" / "trials" / "trial-0", [10], [0.5])
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert runs.main([str(tmp_path / "sweep" / "trials")]) == 0
    text = capsys.readouterr().out
    assert "continue trial-0" not in text and "the command of the sweep continues" in text


def test_a_run_that_ended_in_nan_is_not_offered_for_continuing_to_the_same_end(folder, capsys):
    run = Run(folder / "broken")
    run.save_failure(True, "worker 1:\nthe loss was nan at step 21; a lower optim.lr usually helps")
    assert runs.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "failed broken: the loss was nan at step 21; a lower optim.lr usually helps\n" in text and "continue broken:" in text
    run.not_finite_file.write_text("[]")
    assert runs.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "failed broken: the loss was nan" in text and "continue broken:" not in text


def test_the_files_of_a_trial_are_its_own(tmp_path):
    make_run(tmp_path / "sweep" / "trials" / "trial-0", [10], [0.5])
    run = Run(tmp_path / "sweep" / "trials" / "trial-0")
    for name in ("values.json", "costs.json", "failed.txt", "mine.txt"):
        (run.folder / name).write_text("{}")
    assert [path.name for path in foreign_files(run)] == ["costs.json", "failed.txt", "mine.txt", "values.json"]
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert [path.name for path in foreign_files(run)] == ["mine.txt"]


def test_a_start_that_is_refused_leaves_no_folder_and_takes_none_away(tmp_path):
    run = Run(tmp_path / "run")
    for files in ([], ["log.txt"]):
        with pytest.raises(UserError, match="refused"), run.held():
            for name in files:
                (run.folder / name).touch()
            raise UserError("refused")
        assert run.folder.exists() == bool(files)
    with pytest.raises(UserError), run.held():  # it was there before
        raise UserError("refused")
    (run.folder / "log.txt").unlink()
    with pytest.raises(UserError), run.held():
        raise UserError("refused")
    assert run.folder.exists()
    with run.held(), pytest.raises(UserError, match="is being trained by another process"), Run(run.folder).held():
        pass
    assert run.folder.exists()
