"""Mistakes on the command line: one sentence, exit status 2, before Ray starts."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from perceiver.config import DataConfig, RunConfig, TrainingConfig, UserError, to_dict
from perceiver.config.schema import field_documents
from perceiver.runs import Run
from ray_jobs.cli import main_entry, parse_experiment
from ray_jobs.preflight import check_experiment
from tests.conftest import ROOT
from tests.support.trained import write_run


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
    "learning rate that overflows": (["quickstart", "--optim.lr", "1e300"], "optim.lr is 1e+300 and must be at most 1e+30"),
    "weight decay that overflows": (["quickstart", "--optim.weight-decay", "1e7"], "optim.weight-decay is 1e+07 and must be at most"),
    "weight decay that comes to overflow": (["quickstart", "--optim.weight-decay-end", "1e7"], "optim.weight-decay-end is 1e+07 and must"),
    "factor that overflows": (["quickstart", "--optim.groups", "encoder.*:lr=1e300"], "--optim.groups has 'encoder.*:lr=1e300'"),
    "run name with a folder": (["quickstart", "--name", "a/b"], "run.name"),
    "run name that leads out": (["quickstart", "--name", ".."], "--run.name is '..' and must be a plain folder name"),
    "run name that Ray cannot have": (["quickstart", "--name", "ü"], "--run.name is 'ü'"),
    "run name of 300 letters": (["quickstart", "--name", "x" * 300], "--run.name is"),
    "nothing to start from": (["quickstart", "--init-from", ""], "--training.init-from is empty"),
    "no encoder to start from": (["txt-clf-imdb-all", "--init-encoder-from", " "], "--training.init-encoder-from is empty"),
    "no validation source": (["quickstart", "--data.val-source", ""], "--data.val-source is empty"),
    "no name": (["quickstart", "--name", ""], "--run.name is empty"),
    "no storage": (["quickstart", "--run.storage="], "--run.storage is empty"),
    "no folder of data": (["quickstart", "--data.root", " "], "--data.root is empty"),
    "no address": (["quickstart", "--parallel.address", ""], "--parallel.address is empty"),
    "stride that does not divide": (["clm-wikitext", "--task.val-stride", "1000"], "task.val-stride"),
    "elastic with its ends exchanged": (["quickstart", "--workers", "8..2"], "parallel.min-workers is 8 and must be at most"),
    "elastic with replicas": (["quickstart", "--workers", "2..8", "--parallel.replicas", "2"], "has no replicas"),
    "layers that nobody could build": (
        ["quickstart", "--model.encoder.num-self-attention-layers-per-block", "1000000000000"],
        "num-self-attention-layers-per-block is 1000000000000, but must be at most 1000",
    ),
    "channels that no memory holds": (["quickstart", "--model.num-latent-channels", str(2**40)], "must be at most 1048576"),
    "no time to stand": (["quickstart", "--run.stall-minutes", "0"], "run.stall-minutes is 0.0 and must be more than 0"),
    "not UTF-8": (["quickstart", "--data.source", "\udcff.jsonl"], "\\xff.jsonl is not UTF-8"),
    "model of another task": (["quickstart", "--task.class-names", "a", "b"], "class-names"),
}


@pytest.mark.parametrize("argv, part", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_that_names_what_would_be_right(capsys, argv, part):
    assert part in fails_with(capsys, *argv)


def test_help_breaks_the_lines_of_a_fields_text_where_the_terminal_ends_and_not_where_the_source_does(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "3000")
    with pytest.raises(SystemExit):
        parse_experiment(["quickstart", "--help"], "ray_jobs.train")
    shown = capsys.readouterr().out
    for cls in (DataConfig, TrainingConfig, RunConfig):
        for name, text in field_documents(cls).items():
            assert text in shown, name


def test_help_is_shown_on_a_terminal_of_any_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit) as stop:
        parse_experiment(["quickstart", "--help"], "ray_jobs.train")
    assert stop.value.code == 0 and "--optim.lr" in capsys.readouterr().out and os.environ["COLUMNS"] == "1"


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
    """Of a mixture, that is: files of one source are prepared by the training itself."""
    sources = [tmp_path / "book.txt", tmp_path / "letters.txt"]
    for source in sources:
        source.write_text("Once upon a time.\n" * 20)
    words = ["clm-wikitext-small", "--data.mixture", f"{sources[0]}=0.5", f"{sources[1]}=0.5", "--optim.lr", "2e-4"]
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PATH": "", "PERCEIVER_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2
    assert f"run `perceiver preprocess {' '.join(words)}`" in result.stderr


def test_evaluating_what_is_not_a_run_says_so(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.evaluate", "no-such-run"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PATH": "", "PERCEIVER_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no-such-run" in result.stderr


EMPTY = {
    "evaluate": (["", "--checkpoint", "last"], "RUN is empty"),
    "evaluate with an empty checkpoint": (["run", "--checkpoint", ""], "--checkpoint is empty"),
    "export": (["", "--out", "x"], "RUN is empty"),
    "export with an empty folder": (["run", "--out", ""], "--out is empty"),
    "export with an empty upload": (["run", "--out", "x", "--upload", ""], "--upload is empty"),
    "runs": ([""], "FOLDER is empty"),
}


@pytest.mark.parametrize("job", EMPTY)
def test_an_empty_argument_is_not_taken_as_not_given(job, tmp_path, monkeypatch, capsys):
    """Nor an empty path as the current folder."""
    monkeypatch.chdir(tmp_path)
    arguments, message = EMPTY[job]
    with pytest.raises(SystemExit) as stop:
        main_entry(importlib.import_module(f"ray_jobs.{job.split()[0]}").main, arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_does_not_write_over_files_of_someone_else(tmp_path):
    from ray_jobs.train_checks import check_run

    experiment = parse_experiment(["quickstart"], "x")
    (tmp_path / "values.json").write_text("{}")
    assert check_run(experiment, Run(tmp_path)) is None and check_run(experiment, Run(tmp_path / "new")) is None
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match="holds other files .metrics.jsonl.: choose another --run.name"):
        check_run(experiment, Run(tmp_path))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_umlaut_is_printed_on_any_terminal(tmp_path, encoding):
    write_run(tmp_path / "läufe" / "größe", "causal")
    write_run(tmp_path / "läufe" / "masked", "masked")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LANG": "C", "CUDA_VISIBLE_DEVICES": ""}
    for command in (
        ["ray_jobs.runs", str(tmp_path / "läufe")],
        ["perceiver.inference", str(tmp_path / "läufe" / "größe"), "Ü", "--max-new-tokens", "3"],
        ["perceiver.inference", str(tmp_path / "läufe" / "masked")],
    ):
        run = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, input="ü <mask>\n\n".encode(), timeout=120
        )
        assert run.returncode == 0 and b"Traceback" not in run.stderr, run.stderr
        assert run.stdout.strip()


def test_a_run_of_a_version_with_another_order_keeps_it(tmp_path):
    """Where the command names none. Versions before 0.2 had 8 lanes and windows of 16 blocks for all."""
    from ray_jobs.train_checks import check_run, in_its_order

    experiment = parse_experiment(["quickstart"], "x")
    begun = replace(experiment, data=replace(experiment.data, lanes=8, shuffle_window_blocks=16))
    assert in_its_order(experiment, Run(tmp_path / "new")) == experiment
    run = Run(tmp_path / "run")
    run.save({"experiment": to_dict(begun), "data": "0"})
    assert in_its_order(experiment, run) == begun and check_run(begun, run) is None
    fork = replace(experiment, training=replace(experiment.training, fork=str(run.folder)))
    assert in_its_order(fork, Run(tmp_path / "new")).data == begun.data
    afresh = replace(fork, training=replace(fork.training, fork_weights_only=True))
    assert in_its_order(afresh, Run(tmp_path / "new")) == afresh
    other = replace(experiment, data=replace(experiment.data, lanes=4))
    with pytest.raises(UserError, match="data.lanes"):
        check_run(in_its_order(other, run), run)


def test_a_run_is_the_same_however_its_source_is_spelled(tmp_path, monkeypatch):
    from ray_jobs.train_checks import check_run, is_longer

    (tmp_path / "there" / "docs").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "there")

    def on(source):
        return parse_experiment(["clm-wikitext-small", "--data.source", source], "x")

    run = Run(tmp_path / "run")
    run.save({"experiment": to_dict(on("docs")), "data": "0"})
    run.provenance_file.write_text(json.dumps({"folder": str(tmp_path / "there")}))
    for spelling in ("docs/", "./docs", "../there/docs", str(tmp_path / "there" / "docs")):
        assert check_run(on(spelling), run) is None
    monkeypatch.chdir(tmp_path)
    assert check_run(on("there/docs"), run) is None
    longer = on("there/docs/")
    assert is_longer(replace(longer, training=replace(longer.training, max_steps=10**6, max_epochs=None)), run)
    for other in ("./docs", str(tmp_path / "docs"), "wikitext-2-raw"):
        with pytest.raises(UserError, match="is another experiment .data.source: docs -> "):
            check_run(on(other), run)


def test_output_that_nobody_reads_any_more_is_no_error():
    code = "import sys; from ray_jobs.cli import main_entry; main_entry(lambda argv: [print('x' * 999) for _ in range(9999)] and None, [])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141
