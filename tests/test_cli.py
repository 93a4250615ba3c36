"""Mistakes on the command line: one sentence, exit status 2, before Ray starts."""

import subprocess
import sys

import pytest

from ray_jobs.cli import main_entry, parse_experiment
from ray_jobs.preflight import check_experiment
from tests.conftest import ROOT


def fails_with(capsys, *argv: str) -> str:
    """Runs the train job's checks; the one line of error that it ends with."""

    def main(args: list[str]) -> None:
        check_experiment(parse_experiment(args, "ray_jobs.train"))

    with pytest.raises(SystemExit) as stop:
        main_entry(main, list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


MISTAKES = {
    "unknown preset": (["img-clf-mnits"], "did you mean img-clf-mnist?"),
    "unknown field": (["quickstart", "--model.num-latnets", "3"], "did you mean --model.num-latents?"),
    "field of another section": (["quickstart", "--lr", "3"], "did you mean --optim.lr?"),
    "value of the wrong type": (["quickstart", "--training.max-epochs", "many"], "--training.max-epochs"),
    "unknown choice": (["quickstart", "--optim.schedule", "cosin"], "did you mean cosine?"),
    "heads do not divide channels": (["clm-wikitext", "--model.num-heads", "7"], "num-heads"),
    "latents above sequence": (["clm-wikitext", "--model.max-latents", "5000"], "max-latents"),
    "no length": (["quickstart", "--training.max-epochs", "None"], "set one of them"),
    "batch of zero": (["quickstart", "--training.global-batch-size", "0"], "at least 1"),
    "learning rate": (["quickstart", "--optim.lr", "-1"], "optim.lr"),
    "run name with a folder": (["quickstart", "--name", "a/b"], "run.name"),
    "stride that does not divide": (["clm-wikitext", "--task.val-stride", "1000"], "task.val-stride"),
    "elastic with its ends exchanged": (["quickstart", "--workers", "8..2"], "parallel.min-workers is 8 and must be at most"),
    "elastic with replicas": (["quickstart", "--workers", "2..8", "--parallel.replicas", "2"], "has no replicas"),
    "model of another task": (["quickstart", "--task.class-names", "a", "b"], "class-names"),
}


@pytest.mark.parametrize("argv, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_that_names_what_would_be_right(capsys, argv, part):
    assert part in fails_with(capsys, *argv)


def test_overrides_are_typed_and_nested():
    experiment = parse_experiment(
        ["img-clf-mnist", "--model.encoder.dropout=0.3", "--optim.lr", "2e-4", "--workers", "2", "--data.val_fraction", "0.5"], "x"
    )
    assert experiment.model.encoder.dropout == 0.3 and experiment.optim.lr == 2e-4
    assert experiment.parallel.workers == 2 and experiment.data.val_fraction == 0.5


@pytest.mark.parametrize("argv", [["--workers", "2..8"], ["--workers=2..8"], ["--parallel.workers=8", "--parallel.min-workers=2"]])
def test_a_range_of_workers_is_an_elastic_run_of_the_same_identity(argv):
    experiment = parse_experiment(["quickstart", *argv, "--optim.lr=1e-3"], "x")
    assert (experiment.parallel.min_workers, experiment.parallel.workers, experiment.optim.lr) == (2, 8, 1e-3)
    assert experiment.identity == parse_experiment(["quickstart", "--optim.lr=1e-3"], "x").identity


@pytest.mark.parametrize("job", ["train", "preprocess"])
def test_the_jobs_themselves_exit_with_2_and_no_trace(job, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{job}", "img-clf-mnist", "--data.source", str(tmp_path / "nowhere")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PATH": "", "PERCEIVER_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and "nowhere" in result.stderr


def test_unprepared_data_is_an_error_with_the_command_that_prepares_it(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", "clm-wikitext-small", "--data.source", str(ROOT / "docs")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PATH": "", "PERCEIVER_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2
    assert "python -m ray_jobs.preprocess clm-wikitext-small --data.source" in result.stderr


def test_evaluating_what_is_not_a_run_says_so(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.evaluate", "no-such-run"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PATH": "", "PERCEIVER_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no-such-run" in result.stderr
