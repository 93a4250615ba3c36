"""Mistakes in a submission are found before there is a cluster to ask."""

import pytest

from perceiver.config import UserError
from ray_jobs.submit import JOBS, check_job, describe, job_name, main, read_environment


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say which job: preprocess, "),
        (["trian", "quickstart"], "did you mean train?"),
        (["scaling-law"], "did you mean scaling_laws?"),
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "quickstart", "--optim.lr", "-1"], "optim.lr is -1.0 and must be above 0"),
        (["--working-dir", "/nowhere", "train", "quickstart"], "--working-dir /nowhere is no folder"),
        (["--runtime-env", "/nowhere.yaml", "train", "quickstart"], "--runtime-env /nowhere.yaml is no file"),
        (["--address", "127.0.0.1:1", "train", "quickstart"], "must be that of a dashboard"),
        (["--address", "http://127.0.0.1:1", "train", "quickstart"], "no cluster answers at http://127.0.0.1:1"),
    ],
)
def test_mistakes_are_one_sentence(argv, message):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        main(argv)
    assert message in str(error.value)


def test_every_job_is_a_module():
    import importlib.util

    assert all(importlib.util.find_spec(module) for module in JOBS.values())


def test_a_submission_is_named_after_job_and_preset():
    assert job_name("train", ["quickstart", "--name", "x"]).startswith("train-quickstart-2")
    assert job_name("evaluate", ["/runs/good"]).startswith("evaluate-good-2")


@pytest.mark.parametrize(
    ("job", "arguments", "name", "experiment"),
    [
        ("train", ["quickstart"], "quickstart", "quickstart"),
        ("train", ["quickstart", "--optim.lr", "-1", "--name", "x"], "x", "quickstart"),
        ("sweep", ["quickstart", "--run.name=x"], "x", "quickstart"),
        ("evaluate", ["/runs/good"], "good", "good"),
        ("runs", ["--json"], "runs", ""),
    ],
)
def test_the_dashboard_is_told_name_experiment_and_version(job, arguments, name, experiment):
    description = describe(job, arguments, "abc")
    expected = {"job_name": name, "job": job, "experiment": experiment, "git": "abc", "arguments": " ".join(arguments)}
    assert description == expected


def test_a_training_is_checked_and_other_jobs_go_through():
    assert check_job("train", ["quickstart", "--workers", "7"]).parallel.workers == 7
    assert check_job("train", ["quickstart", "--allow-changed-code", "--quiet", "--seeds", "3"]).preset == "quickstart"
    with pytest.raises(UserError, match="--seeds is 'x' and must be a number of seeds"):
        check_job("train", ["quickstart", "--seeds", "x"])
    assert check_job("evaluate", ["run"]) is None


def test_packages_and_folder_are_the_jobs_environment(tmp_path):
    (tmp_path / "env.yaml").write_text("pip: [numpy]")
    assert read_environment(tmp_path / "env.yaml", str(tmp_path)) == {"pip": ["numpy"], "working_dir": str(tmp_path)}
