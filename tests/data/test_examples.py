"""Data of the user's own: functions and classes that yield examples, and files of arrays."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver.config import DataConfig, TaskConfig, UserError, to_dict
from perceiver.data.manifest import Manifest
from perceiver.data.rows import ArrayRows
from perceiver.data.sources import mixture_sources, resolve, source_label
from perceiver.data.tokenizers import ByteTokenizer
from perceiver.datasets import Dataset
from perceiver.experiments import find_experiment
from perceiver.presets import PRESETS
from perceiver.tasks.base import Task
from ray_jobs import passes, preprocess
from tests.support.jobs import Job
from tests.support.logged import logged
from tests.support.outside import copy_examples
from tests.support.preparing import content, experiment, rows_of, serially, stream_of, write_jsonl, write_parquet

SOURCE = """
import numpy as np
from perceiver.data.examples import ExampleSource

def example(number):
    rng = np.random.default_rng(number)
    return {"past": rng.standard_normal((3, 2)), "label": number % 5, "name": f"series {number}"}

class Series(ExampleSource):
    count = 1
    splits = ("train", "val")

    def parts(self, split):
        return self.count

    def examples(self, split, part):
        numbers = {"train": range(100), "val": range(1000, 1021)}[split]
        yield from (example(n) for n in numbers[len(numbers) * part // self.count:len(numbers) * (part + 1) // self.count])

    def fingerprint(self):
        return "series 1"

class InThree(Series):
    count = 3

class TrainOnly(Series):
    splits = ("train",)

def plain(split):
    return Series().examples(split, 0)

def nothing_to_validate(split):
    if split == "train":
        yield from Series().examples(split, 0)

def unseeded(split):
    yield from ({**example(n), "past": np.random.standard_normal((3, 2))} for n in range(9))

def wrong_shape(split):
    yield from ({**example(n), "past": np.zeros((2, 2) if n == 7 else (3, 2))} for n in range(9))

def lacking(split):
    yield from ({"label": 0} for n in range(9))

def too_large(split):
    yield from ({**example(n), "label": 2**40} for n in range(9))

def failing(split):
    yield example(0)
    raise ValueError("the disk is on fire")

def faulty(split):
    bad = {3: {"past": np.zeros((1, 1))}, 5: {"label": 0.5}, 6: {"label": 2**40}, 8: {"name": 7}}
    yield from ({**example(n), **bad.get(n, {})} for n in range(20))

def texts(split):
    yield from ({"text": f"{split} document {n}", "label": n % 2} for n in range(8))

NUMBER = 3
"""


class Windows(TaskConfig):
    """A task that reads arrays."""

    def rows(self, model, data):
        return ArrayRows(past=((3, 2), "float32"), label=((), "int32"), name=((), "string"))

    def build(self, model, data, seed):
        return Task(self, model, data, seed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder outside the project with a file of sources, and preparation in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_series", raising=False)
    monkeypatch.setenv("PERCEIVER_HOME", str(tmp_path / "home"))
    serially(monkeypatch)
    (tmp_path / "own_series.py").write_text(SOURCE)
    yield tmp_path
    sys.modules.pop("own_series", None)


def arrays(folder: Path, source: str, root: str = "out", **data):
    """An experiment that reads arrays from a source of the folder's file."""
    source = source if source.startswith("/") else f"{folder}/own_series.py:{source}"
    settings = {"rows_per_block": 8, "blocks_per_shard": 2, "root": str(folder / root), "source": source} | data
    return replace(PRESETS["quickstart"](), task=Windows(), data=DataConfig(**settings))


def prepared(chosen) -> tuple[str, Manifest]:
    preprocess.prepare(chosen)
    found = Dataset.find(chosen)
    return found.folder, found.manifest


def expected(numbers) -> list[dict]:
    # The module has been imported when the source was found.
    made = [sys.modules["own_series"].example(n) for n in numbers]
    return [{**row, "past": row["past"].astype(np.float32).reshape(-1).tolist()} for row in made]


def test_a_class_outside_the_project_is_prepared_as_the_rows_that_it_yields(folder):
    path, manifest = prepared(arrays(folder, "Series"))
    assert rows_of(path, manifest, "train").to_pylist() == expected(range(100))
    assert rows_of(path, manifest, "val").to_pylist() == expected(range(1000, 1021))
    train = manifest.splits["train"]
    assert (train.rows, train.documents, len(train.shards), train.lookahead) == (100, 100, 7, 0)
    assert manifest.kind == "arrays" and manifest.columns == Windows().rows(None, None).to_json()
    assert train.columns == Windows().rows(None, None) and Manifest.load(path).digest == manifest.digest


@pytest.mark.parametrize("rows_at_once", [1024, 7])
def test_the_number_of_parts_does_not_change_a_byte_nor_does_preparing_again(folder, monkeypatch, rows_at_once):
    monkeypatch.setattr("perceiver.data.preparation._MOST_ROWS", rows_at_once)
    (folder / "own_series.py").write_text(SOURCE.replace("class InThree(Series)", "class Other(Series)"))
    one = content(prepared(arrays(folder, "Series"))[0])
    assert content(prepared(arrays(folder, "Series", "again"))[0]) == one
    sys.modules.pop("own_series")
    (folder / "own_series.py").write_text(SOURCE.replace("count = 1", "count = 3"))
    assert content(prepared(arrays(folder, "Series", "three"))[0]) == one and len(one) > 3


def test_a_stopped_preparation_continues_to_the_same_bytes(folder, monkeypatch):
    whole = content(prepared(arrays(folder, "InThree"))[0])
    real, done = passes.make_piece, []

    def stopping(job, index, piece, selection):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(index)
        return real(job, index, piece, selection)

    monkeypatch.setattr(passes, "make_piece", stopping)
    chosen = arrays(folder, "InThree", "stopped")
    with pytest.raises(KeyboardInterrupt):
        preprocess.prepare(chosen)
    monkeypatch.setattr(passes, "make_piece", lambda job, index, *rest: done.append(index) or real(job, index, *rest))
    assert content(prepared(chosen)[0]) == whole and sorted(done) == list(range(6))


@pytest.mark.parametrize("source", ["TrainOnly", "nothing_to_validate"])
def test_without_a_validation_split_examples_are_held_out_by_their_content(folder, source):
    path, manifest = prepared(arrays(folder, source, val_fraction=0.3))
    train, val = (rows_of(path, manifest, split)["name"].to_pylist() for split in ("train", "val"))
    assert sorted(train + val) == sorted(f"series {n}" for n in range(100)) and 15 <= len(val) <= 45
    again, other = prepared(arrays(folder, "InThree" if source == "TrainOnly" else "TrainOnly", "again", val_fraction=0.3))
    if source == "nothing_to_validate":
        assert rows_of(again, other, "val")["name"].to_pylist() == val
    with pytest.raises(UserError, match="has no examples for validation: give them as data.val-source"):
        preprocess.prepare(arrays(folder, source, val_fraction=0.0))


def test_another_source_can_be_for_validation(folder):
    path, manifest = prepared(arrays(folder, "TrainOnly", val_source=f"{folder}/own_series.py:plain"))
    assert rows_of(path, manifest, "val").to_pylist() == expected(range(1000, 1021))
    assert manifest.splits["train"].rows == 100


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wrong_shape", r"own_series:wrong_shape\('train'\), example 7: past has shape \(2, 2\) and must have \(3, 2\)"),
        ("lacking", r"lacking\('train'\), example 0: it has no name \(it has: label\)"),
        ("too_large", r"example 0: label has values that int32 cannot hold"),
        (
            "unseeded",
            r"unseeded\('train'\) yields other examples when it is read again \(example 0: past differs\): its random choices",
        ),
        ("failing", r"failing\('train'\) fails: own_series.py, line \d+: ValueError: the disk is on fire"),
        ("NUMBER", r"NUMBER is a int and must be a function of the split that yields examples"),
        ("Seris", r"has no Seris, did you mean Series"),
    ],
)
def test_a_mistake_in_a_source_is_one_sentence_with_its_place(folder, source, message):
    with pytest.raises(UserError, match=message):
        preprocess.prepare(arrays(folder, source))
    assert not list((folder / "out").glob("*/manifest.json"))


def test_bad_examples_are_skipped_and_counted_by_reason_where_told(folder):
    path, manifest = prepared(arrays(folder, "faulty", on_error="skip"))
    assert manifest.splits["train"].rows == manifest.splits["val"].rows == 16
    assert manifest.stats["skipped"] == {"other shape": 2, "wrong type": 2, "wrong value": 4}


def test_a_source_that_has_changed_is_not_taken_for_the_prepared_one(folder):
    chosen = arrays(folder, "plain")
    prepared(chosen)
    (folder / "own_series.py").write_text(SOURCE + "\nMORE = 1\n")
    sys.modules.pop("own_series")
    with logged() as said:
        preprocess.prepare(chosen)
    assert "was prepared from other content: own_series:plain (of code without a method fingerprint()" in said[0]
    assert len(list((folder / "out").glob("*/manifest.json"))) == 2
    named = arrays(folder, "Series", "named")
    prepared(named)
    (folder / "own_series.py").write_text(SOURCE)
    sys.modules.pop("own_series")
    with logged() as said:
        preprocess.prepare(named)
    assert "nothing to do" in said[-1]  # its fingerprint() is the same


def test_a_file_that_somebody_elses_run_names_as_its_source_is_not_run(folder):
    run, chosen = folder / "run", arrays(folder, "plain")
    run.mkdir()
    (run / "experiment.json").write_text(
        json.dumps({"experiment": to_dict(replace(chosen, task=PRESETS["quickstart"]().task)), "data": ""})
    )
    with pytest.raises(UserError, match=r"own_series.py:plain\) brings code of its own \(own_series.py\) that was never run"):
        find_experiment(str(run))
    assert "own_series" not in sys.modules
    prepared(chosen)  # named by the user himself
    assert find_experiment(str(run)).data == chosen.data


def test_a_source_has_one_name_in_a_file_and_as_a_module(folder):
    assert source_label(f"{folder}/own_series.py:Series") == source_label("own_series:Series") == "code:own_series:Series"
    assert source_label("hub:imdb") == "hub:imdb"
    parts = mixture_sources(DataConfig(mixture=(f"{folder}/own_series.py:Series=3", "own_series:plain=1")))
    assert [(part.name, part.share) for part in parts] == [("own_series:Series", 0.75), ("own_series:plain", 0.25)]


def test_sources_are_mixed(folder):
    mixture = tuple(f"{folder}/own_series.py:{name}" for name in ("Series=3", "faulty=1"))
    chosen = arrays(folder, "Series", mixture=mixture)
    chosen = replace(chosen, data=replace(chosen.data, source=""))
    with pytest.raises(UserError, match="past has shape"):
        preprocess.prepare(chosen)
    chosen = replace(chosen, data=replace(chosen.data, on_error="skip"))
    preprocess.prepare(chosen)
    assert [(part.name, part.manifest.splits["train"].rows) for part in Dataset.find(chosen).parts] == [
        ("own_series:Series", 100), ("own_series:faulty", 16),
    ]  # fmt: skip


def test_text_may_come_from_code_too(folder):
    source = f"{folder}/own_series.py:texts"
    path, manifest = prepared(experiment("txt-clf-imdb-all", folder / "out", source, length=32))
    assert rows_of(path, manifest, "val")["label"].to_pylist() == [0, 1] * 4
    path, manifest = prepared(experiment("clm-c4", folder / "out", source, tokenizer="bytes"))
    ends = "".join(f"train document {n}[EOS]" for n in range(8))
    assert ByteTokenizer().decode(stream_of(path, manifest, "train"), skip_special=False) == ends


def test_what_reads_files_alone_refuses_code(folder):
    source = f"{folder}/own_series.py:texts"
    with pytest.raises(UserError, match="texts is code, but images are made from idx files"):
        preprocess.prepare(experiment("quickstart", folder / "out", source))
    with pytest.raises(UserError, match="data.prepare is stream, which reads files alone"):
        preprocess.prepare(experiment("clm-c4", folder / "out", source, tokenizer="bytes", prepare="stream"))


# ------------------------------------------------------------------------------------------------------------------- files


def examples(num: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"past": rng.standard_normal((3, 2)).tolist(), "label": n, "name": f"é {n}", "more": [n]} for n in range(num)]


def flat(rows: list[dict]) -> list[dict]:
    return [{"past": np.float32(row["past"]).reshape(-1).tolist(), "label": row["label"], "name": row["name"]} for row in rows]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "flat.parquet", "fixed.parquet"])
def test_files_of_arrays_are_prepared_in_their_order(folder, form):
    (folder / "in").mkdir()
    rows, path = examples(50), folder / "in" / f"train.{form}"
    if form == "fixed.parquet":
        kind = pa.list_(pa.float64(), 6)
        column = pa.array([np.ravel(row["past"]).tolist() for row in rows], kind)
        pq.write_table(pa.table({"past": column, "label": [r["label"] for r in rows], "name": [r["name"] for r in rows]}), path)
    elif "parquet" in form:
        write_parquet(path, [{**row, "past": np.ravel(row["past"]).tolist()} for row in rows] if "flat" in form else rows)
    else:
        write_jsonl(path, rows)
    write_jsonl(folder / "in" / "val.jsonl", examples(9))
    place, manifest = prepared(arrays(folder, str(folder / "in")))
    assert rows_of(place, manifest, "train").to_pylist() == flat(rows)
    assert rows_of(place, manifest, "val").to_pylist() == flat(rows[:9]) and manifest.stats["shared_documents"] == 9


@pytest.mark.parametrize(
    ("form", "bad", "message"),
    [
        ("jsonl", {"past": [1.0, 2.0]}, r"train.jsonl line 4: past has shape \(2,\) and must have \(3, 2\)"),
        ("parquet", {"past": [[1.0], [2.0, 3.0]]}, r"train.parquet row 3: past cannot be read as float32"),
        ("parquet", {"past": None}, r"train.parquet row 3: it has no past"),
        ("jsonl", {"label": None}, r"train.jsonl line 4: it has no label"),
    ],
)
def test_a_bad_row_of_a_file_is_named(folder, form, bad, message):
    (folder / "in").mkdir()
    rows = examples(6)
    rows[3] |= bad
    (write_jsonl if form == "jsonl" else write_parquet)(folder / "in" / f"train.{form}", rows)
    chosen = arrays(folder, str(folder / "in"), val_fraction=0.4)
    with pytest.raises(UserError, match=message):
        preprocess.prepare(chosen)
    chosen = replace(chosen, data=replace(chosen.data, on_error="skip"))
    _, manifest = prepared(chosen)
    assert sum(split.rows for split in manifest.splits.values()) == 5 and sum(manifest.stats["skipped"].values()) == 1


def test_files_of_other_formats_are_refused(folder):
    (folder / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"holds nothing that arrays are made from: .parquet, .arrow, .jsonl"):
        resolve(DataConfig(source=str(folder / "a.txt")), "arrays")


# ----------------------------------------------------------------------------------------------------------------- with Ray


@pytest.mark.long
def test_the_example_prepares_its_own_series_on_ray_workers_that_cannot_import_its_file(tmp_path):
    mine = copy_examples(tmp_path / "mine")
    said = Job("ray_jobs.preprocess", f"{mine}/weather.py:tiny", home=tmp_path / "home").finish()
    (folder,) = (tmp_path / "home" / "data").glob("weather-series-arrays-*")
    manifest = Manifest.load(folder)
    assert manifest.splits["train"].rows == 2048 and manifest.splits["val"].rows == 256
    assert "columns: future (24, 7) float32, past (72, 7) float32" in said and str(folder) in said
    assert json.loads((folder / "manifest.json").read_text())["source"]["examples"][0]["name"] == "weather:series"
