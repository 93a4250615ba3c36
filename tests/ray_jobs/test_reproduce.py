"""What is on record of how a run was made, and whether it comes out again."""

import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from perceiver import provenance
from perceiver.config import UserError
from perceiver.data.manifest import Manifest
from perceiver.disk import read_json, write_json
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.checkpoint_files import differing_weights
from perceiver.training.parallel import join_world
from perceiver.training.run import Training, save_experiment
from ray_jobs import reproduce
from tests.support.jobs import QUICK, Job
from tests.support.small import image_experiment, write_images
from tests.support.trained import write_run


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run that was begun in a repository with an uncommitted change and a file that git does not know."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.py").write_text("lr = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", "mine.py")
    git(folder, "commit", "-qm", "first")
    (folder / "mine.py").write_text("lr = 2\n")
    (folder / "new.py").write_text("")
    monkeypatch.chdir(folder)
    found = Run(write_run(tmp_path / "run", "images"))
    provenance.record(found, ["perceiver", "train", "my file.py:small", "--optim.lr", "0.1"], "abc", 2, "CPU")
    return found


def test_command_commit_changes_packages_and_machine_are_on_record_and_shown(run, tmp_path, capsys):
    content = read_json(run.provenance_file)
    code = content["code"]["folder"]
    assert code["commit"] == provenance.commit_of(tmp_path / "own") and code["untracked"] == ["new.py"] and code["changed"]
    git(tmp_path / "own", "checkout", "-q", "mine.py")
    git(tmp_path / "own", "apply", str(run.diff_file("folder")))
    assert (tmp_path / "own" / "mine.py").read_text() == "lr = 2\n"
    assert content["packages"]["torch"] == version("torch") and content["workers"] == 2
    assert reproduce.main([str(run.folder)]) == 0
    output = capsys.readouterr().out
    for words in (
        "perceiver train 'my file.py:small' --optim.lr 0.1",
        f"at commit {code['commit']}",
        "1 file that git does not know",
        "torch",
    ):
        assert words in output
    assert "differs" not in output


def test_what_is_another_here_is_named(run, tmp_path, capsys):
    content = read_json(run.provenance_file)
    content["packages"]["torch"] = "1.0"
    content["machine"]["cores"] = 10_000
    write_json(run.provenance_file, content)
    git(tmp_path / "own", "commit", "-qam", "second")
    reproduce.main([str(run.folder)])
    differs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs:")]
    assert [line.split()[1] for line in differs] == ["torch", "cores:", "code"] and f"torch {version('torch')} here, 1.0 there" in differs[
        0
    ]


def test_the_record_is_of_the_first_start_and_runs_without_one_say_so(run, tmp_path, capsys):
    before = run.provenance_file.read_bytes()
    provenance.record(run, ["another"], "abc", 1, "CPU")
    assert run.provenance_file.read_bytes() == before
    old = write_run(tmp_path / "old", "images")
    assert reproduce.main([str(old)]) == 0 and "not on record" in capsys.readouterr().out
    with pytest.raises(UserError, match="no run 'nowhere'"):
        reproduce.main(["nowhere"])
    with pytest.raises(UserError, match="--name is 'x', which names the run that --run makes"):
        reproduce.main([str(old), "--name", "x"])


@pytest.mark.parametrize("content", [{}, {"command": 3}, {"command": ["x"], "folder": "y", "code": []}], ids=["empty", "number", "list"])
def test_a_record_of_another_shape_is_one_sentence(run, content):
    write_json(run.provenance_file, content)
    with pytest.raises(UserError, match="provenance.json is damaged: it does not say how a run was made"):
        reproduce.main([str(run.folder)])


def test_weights_that_are_not_the_same_bits_are_counted_with_their_largest_difference(tmp_path):
    write_images(tmp_path / "data")
    manifest, world = Manifest.load(tmp_path / "data"), join_world(torch.device("cpu"))
    paths = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        made = image_experiment(max_steps=1, seed=seed)
        Training(made, build_task(made), str(tmp_path / "data"), manifest, world, tmp_path / name, read_here).run()
        save_experiment(Run(tmp_path / name), replace(made, run=replace(made.run, name=name)), manifest, str(tmp_path / "data"))
        paths.append(Run(tmp_path / name).checkpoints()[-1].path)
    total, different = differing_weights(paths[0], paths[1])
    assert total > 30 and different == {}
    assert differing_weights(paths[0], paths[2])[1].keys() and all(value > 0 for value in differing_weights(paths[0], paths[2])[1].values())


@pytest.mark.slow
def test_a_run_that_is_made_again_has_the_same_bits_and_one_that_cannot_be_says_so(tmp_path):
    words = ["quickstart", *QUICK, "--training.max-steps", "6", "--name", "base"]
    Job("ray_jobs.train", *words, home=tmp_path).finish()
    output = Job("ray_jobs.reproduce", str(tmp_path / "runs" / "base"), "--run", home=tmp_path).finish()
    assert "command:   python -m ray_jobs.train quickstart" in output and "the same bits: all " in output
    assert Run(tmp_path / "runs" / "base-again").result()["step"] == 6
