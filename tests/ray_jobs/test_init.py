"""`perceiver init` writes an experiment that is what its command line would be; `perceiver data RUN` says what a run was trained on."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from perceiver.datasets import data_folder
from perceiver.experiments import find_experiment
from perceiver.runs import Run
from perceiver.training.run import save_experiment
from ray_jobs import data, init
from ray_jobs.cli import parse_experiment
from ray_jobs.preprocess import prepare
from tests.data.test_picture_folders import split_folder
from tests.support.outside import forget
from tests.support.preparing import serially


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.path", [*sys.path])
    yield
    forget()


def write_reviews(path):
    rows = "".join(f'"text {i}, \'so\' ""to"" say",{["good", "bad"][i % 2]}\n' for i in range(40))
    path.write_text(f"review,opinion\n{rows}")
    return path


def source_of(kind, folder):
    """Data of a kind, the words after init's source, and the command line that means the same."""
    folder.mkdir()
    match kind:
        case "pictures":
            return split_folder(folder / "in"), [], ["img-clf"]
        case "reviews":
            words = ["txt-clf", "--data.text-column", "review", "--data.label-column", "opinion"]
            return write_reviews(folder / "reviews.csv"), [], words
        case "texts":
            (folder / "a.txt").write_text("a quiet evening\n" * 9)
            return folder, [], ["clm-wikitext-small"]
    table = pa.table({"size": [float(i) for i in range(40)], "price": [i * 1.5 for i in range(40)]})
    pq.write_table(table, folder / "own.parquet")
    return folder / "own.parquet", ["--targets", "price"], ["tables", "--task.targets", "price"]


@pytest.mark.parametrize("kind", ["pictures", "reviews", "texts", "numbers"])
def test_the_file_is_the_experiment_that_the_command_line_makes(kind, tmp_path, capsys):
    source, more, (preset, *words) = source_of(kind, tmp_path / "data")
    name = f"own_{kind}"  # a module of a name is imported once in a process
    assert init.main([f"own-{kind}", "--data", str(source), *more]) == 0
    shown = capsys.readouterr().out
    assert f"perceiver train {name}.py:{name}" in shown and "preprocess" not in shown
    found = find_experiment(f"{name}.py:{name}")
    expected = parse_experiment([preset, "--data.source", str(source), "--name", f"own-{kind}", *words], "x")
    assert found.identity == expected.identity and found.run_name == f"own-{kind}" and found.run == expected.run
    assert found.task.completed(found) == found  # the data says nothing that the file does not


def test_fields_have_their_help_as_comments(tmp_path):
    init.main(["reviews", "--data", str(write_reviews(tmp_path / "reviews.csv"))])
    text = (tmp_path / "here" / "reviews.py").read_text()
    assert "            # Peak learning rate.\n            lr=" in text and 'class_names=("bad", "good")' in text
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1st"], "must begin with a letter"),
        (["class"], "no word of Python"),
        (["a/b"], "must be a plain folder name"),
        (["there"], "there.py exists"),
        (["torch"], "torch is the name of an installed module: give the file another name"),
        (["my-own", "--targets", "price"], "--targets is price, and .* is no table"),
        (["my-own", "--label-column", "stars"], "--label-column is 'stars'"),
    ],
)
def test_what_cannot_be_written_is_refused(words, message, tmp_path):
    (tmp_path / "here" / "there.py").write_text("")
    with pytest.raises(UserError, match=message):
        init.main([*words, "--data", str(write_reviews(tmp_path / "reviews.csv"))])
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["there.py"]


def test_of_a_table_of_numbers_the_last_column_is_predicted_if_none_is_named(tmp_path):
    source, _, _ = source_of("numbers", tmp_path / "data")
    init.main(["my-own", "--data", str(source)])
    assert find_experiment("my_own.py:my_own").task.targets == ("price",)


def test_of_a_run_it_says_what_it_was_trained_on(tmp_path, monkeypatch, capsys):
    serially(monkeypatch)
    source = write_reviews(tmp_path / "reviews.csv")
    words = ["--data.source", str(source), "--data.text-column", "review", "--data.label-column", "opinion", "--name", "mine"]
    experiment = parse_experiment(["txt-clf", *words], "x")
    manifest = prepare(experiment)
    run = Run(tmp_path / "home" / "runs" / "mine")
    run.folder.mkdir(parents=True)
    save_experiment(run, experiment, manifest, data_folder(experiment))
    assert json.loads((run.folder / "experiment.json").read_text())["data"] == manifest.digest
    capsys.readouterr()
    assert data.main(["mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mine: {source}, prepared in {data_folder(experiment)}"
    assert "  classes: bad (18), good (18)" in lines and "  classes: bad (2), good (2)" in lines and "held out by class" in lines
    assert lines[-1] == f"look at the source: perceiver data {source}"


def test_data_in_the_working_folder_is_meant_where_a_run_elsewhere_has_its_name(tmp_path, monkeypatch, capsys):
    serially(monkeypatch)
    rows = "".join(f"{i},{i * 2.5}\n" for i in range(30))
    (tmp_path / "numbers.csv").write_text(f"a,b\n{rows}")
    experiment = parse_experiment(["tables", "--data.source", str(tmp_path / "numbers.csv"), "--task.targets", "b", "--name", "mine"], "x")
    run = Run(tmp_path / "home" / "runs" / "mine")
    run.folder.mkdir(parents=True)
    save_experiment(run, experiment, prepare(experiment), data_folder(experiment))
    capsys.readouterr()
    assert data.main(["mine"]) == 0
    assert capsys.readouterr().out.startswith(f"mine: {tmp_path / 'numbers.csv'}, prepared in ")
    source_of("texts", tmp_path / "here" / "mine")
    assert data.main(["mine"]) == 0
    assert capsys.readouterr().out.startswith("mine: 1 file, ")
