"""Order among runs: tags, notes, one run shown, and what is removed, packed and pruned."""

import fcntl
import json
import os
import shutil
import tarfile

import pytest

from perceiver.config import UserError
from perceiver.housekeeping import Labels, read_labels, size_of
from perceiver.runs import Run
from ray_jobs import runs
from ray_jobs.main import main
from tests.tuning.test_tuning import make_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path))
    for name, steps in {"good": [10, 20, 40], "worse": [10, 20], "halted": [10]}.items():
        make_run(tmp_path / "runs" / name, steps, [0.9, 0.5, 0.7])
        (tmp_path / "runs" / name / "values.json").unlink()
    for name in ("good", "worse"):
        (tmp_path / "runs" / name / "result.json").write_text("{}")
    return tmp_path / "runs"


def answer(monkeypatch, text):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: text)


@pytest.fixture
def busy(folder):
    with open(folder / "worse" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_tags_and_notes_are_kept_found_and_taken_away(folder, capsys):
    main(["tag", "good", "paper", "v2"])
    main(["tag", "worse", "v2"])
    main(["note", "good", "the", "one for the paper"])
    assert read_labels(Run(folder / "good")) == Labels(("paper", "v2"), "the one for the paper")
    capsys.readouterr()
    main(["runs", "--tag", "paper", "--json"])
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["name"] == "good" and found["tags"] == ["paper", "v2"] and found["note"] == "the one for the paper"
    main(["runs", "--where", "'v2' in tags", "--columns", "name"])
    assert capsys.readouterr().out.split()[:3] == ["name", "good", "worse"]
    main(["tag", "good", "v2", "--remove"])
    main(["note", "good", ""])
    assert read_labels(Run(folder / "good")) == Labels(("paper",), "")
    with pytest.raises(UserError, match="has no tag 'v2'; it has paper"):
        main(["tag", "good", "v2", "--remove"])
    with pytest.raises(UserError, match="must be a word"):
        main(["tag", "good", "two words"])


def test_a_run_is_shown_with_its_curves_checkpoints_and_the_command_that_continues_it(folder, capsys):
    assert main(["show", "halted"]) == 0
    text = capsys.readouterr().out
    assert "stopped, step 10" in text and "val_loss" in text and "continue: python -m ray_jobs.train" in text
    main(["show", "good", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["curves"]["val_loss"] | {"values": None} == {"values": None, "best": 0.5, "at_step": 20, "last": 0.7}
    assert [each["step"] for each in found["checkpoints"]] == [10, 20, 40] and found["fields"]["training.seed"] == 0
    (folder / "halted" / "experiment.json").write_text("[]")
    assert main(["show", "halted"]) == 0 and "damaged" in capsys.readouterr().out


def test_a_run_is_removed_whole_and_no_other_file(folder, monkeypatch, capsys):
    (folder / "good" / "thesis.txt").write_text("mine")
    answer(monkeypatch, "y")
    assert main(["rm", "good", "worse"]) == 0
    assert names(folder) == ["good", "halted"] and names(folder / "good") == ["thesis.txt"]
    assert "thesis.txt" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["rm", "archive", "prune"])
def test_nothing_goes_without_a_yes(folder, monkeypatch, capsys, command):
    before = sorted(folder.parent.rglob("*"))
    words = [command, "worse", *(["--keep", "0"] if command == "prune" else [])]
    answer(monkeypatch, "")
    assert main(words) == 1
    assert "nothing was removed" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(UserError, match="give --yes"):
        main(words)
    assert {path for path in folder.parent.rglob("*") if path.name != ".lock"} == set(before)


@pytest.mark.parametrize("command", ["rm", "archive", "prune"])
def test_a_run_that_is_trained_is_never_touched_nor_those_beside_it(busy, command):
    before = {path for path in busy.parent.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match="being trained by another process"):
        main([command, "good", "worse", "--yes"])
    assert {path for path in busy.parent.rglob("*") if path.name != ".lock"} == before


def test_a_trial_of_a_sweep_that_runs_is_never_touched(tmp_path):
    make_run(tmp_path / "sweep" / "trials" / "one", [10])
    with open(tmp_path / "sweep" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="trial of a sweep that is running"):
            main(["rm", str(tmp_path / "sweep" / "trials" / "one"), "--yes"])
    assert (tmp_path / "sweep" / "trials" / "one" / "experiment.json").exists()


def test_what_a_link_leads_to_stays(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    shutil.rmtree(folder / "good" / "checkpoints")
    os.symlink(elsewhere, folder / "good" / "checkpoints")
    os.symlink(folder / "halted", folder / "link")
    assert main(["rm", "good", "--yes"]) == 0
    assert (elsewhere / "precious").exists() and not (folder / "good").exists()
    with pytest.raises(UserError, match="is a link"):
        main(["rm", "link", "--yes"])
    assert (folder / "halted" / "experiment.json").exists()


def test_a_folder_that_is_no_run_is_never_removed(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(UserError, match="no run"):
        main(["rm", str(tmp_path / "photos"), "--yes"])
    assert (tmp_path / "photos" / "me.jpg").exists()


def test_an_archive_holds_the_run_and_brings_it_back(folder, capsys):
    before = {path.relative_to(folder): path.read_bytes() for path in (folder / "good").rglob("*") if path.is_file()}
    assert main(["archive", "good", "--yes"]) == 0
    target = folder.parent / "archive" / "good.tar"
    assert not (folder / "good").exists() and f"tar -xf {target} -C {folder}" in capsys.readouterr().out
    with tarfile.open(target) as file:
        file.extractall(folder, filter="data")
    assert {path.relative_to(folder): path.read_bytes() for path in (folder / "good").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="exists already"):
        main(["archive", "good", "--yes"])
    assert (folder / "good").exists()


def test_pruning_keeps_the_best_runs_best_and_last_checkpoints_and_all_records(folder, capsys):
    assert main(["prune", str(folder), "--yes"]) == 0
    assert [c.step for c in Run(folder / "good").checkpoints()] == [40], "its best is its last; val_loss is 1 / step"
    assert Run(folder / "worse").checkpoints() == [] and Run(folder / "worse").metrics()
    assert [c.step for c in Run(folder / "halted").checkpoints()] == [10], "it is to be continued"
    assert "halted is not finished" in capsys.readouterr().out
    assert main(["prune", str(folder), "--yes", "--unfinished", "--keep", "1"]) == 0
    assert Run(folder / "halted").checkpoints() == []
    with pytest.raises(UserError, match="--metric val_acc: no checkpoint has"):
        main(["prune", "good", "--yes", "--metric", "val_acc"])


def test_of_several_runs_the_best_by_the_metric_keep_their_checkpoints(folder):
    marker = folder / "worse" / "checkpoints" / "step-00000010" / "checkpoint.json"
    marker.write_text(json.dumps({"step": 10, "metrics": {"val_loss": 0.001}}))
    assert main(["prune", "good", "worse", "--yes"]) == 0
    assert [c.step for c in Run(folder / "worse").checkpoints()] == [10, 20] and Run(folder / "good").checkpoints() == []


def test_sizes_do_not_count_what_links_lead_to(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    os.symlink(tmp_path / "big", tmp_path / "a" / "link")
    assert 1000 <= size_of([tmp_path / "a"]) < 2000


def test_the_list_is_shown_again_until_it_is_interrupted(folder, monkeypatch, capsys):
    times = []

    def sleep(seconds):
        times.append(seconds)
        if len(times) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.time, "sleep", sleep)
    assert main(["runs", "--watch", "5"]) == 0
    text = capsys.readouterr().out
    assert times == [5, 5] and text.count("halted") == 2 and "▁" in text
    with pytest.raises(UserError, match="--watch"):
        main(["runs", "--watch", "--json"])
    with pytest.raises(UserError, match="--watch is -1"):
        main(["runs", "--watch", "-1"])


def test_a_sparkline_goes_from_the_least_to_the_largest():
    assert runs.sparkline([1.0, 2.0, float("nan"), 1.5]) == "▁█▅"
    assert runs.sparkline([3.0, 3.0]) == "▁▁" and runs.sparkline([]) == ""
    assert len(runs.sparkline(list(range(100)))) == 24 and runs.sparkline(list(range(100)))[-1] == "█"
