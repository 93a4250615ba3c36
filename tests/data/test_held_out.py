"""Validation that is held out here: the same share of every class, whole groups, whatever the order and the cutting of files."""

import datetime
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import DataConfig, UserError
from perceiver.data.held_out import held_out
from perceiver.data.shards import read_block
from perceiver.datasets import data_folder
from ray_jobs import preprocess
from tests.support.logged import logged
from tests.support.preparing import experiment, serially, write_jsonl

KEYS = np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    serially(monkeypatch)


def prepared(preset, root, source, piece_bytes=1 << 20, **data):
    """Folder and manifest."""
    chosen = experiment(preset, root, source, 64, **{"val_fraction": 0.2, **data})
    return data_folder(chosen), preprocess.prepare(chosen, piece_bytes)


def labels(folder, manifest) -> dict[str, Counter]:
    """How often each label occurs, by split."""
    splits = manifest.splits
    rows = {name: [read_block(folder, split, block)["label"] for block in range(split.num_blocks)] for name, split in splits.items()}
    return {name: Counter(label for part in parts for label in part.to_pylist()) for name, parts in rows.items()}


def texts_of(folder, manifest, split) -> set[str]:
    """The texts of a split, from their bytes."""
    found, split = set(), manifest.splits[split]
    for block in range(split.num_blocks):
        found |= {bytes(i - 6 for i in ids).decode() for ids in read_block(folder, split, block)["tokens"].to_pylist()}
    return found


def reviews(path: Path, counts: dict[int, int]) -> list[dict]:
    rows = [{"text": f"review {label}-{i}", "label": label, "author": f"a{i % 7}"} for label, count in counts.items() for i in range(count)]
    write_jsonl(path, rows)
    return rows


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
def test_each_class_gives_its_share_to_within_half_a_row(fraction):
    classes = np.repeat([0, 1, 2], [1900, 90, 10])
    kept = np.isin(KEYS, held_out(KEYS, classes, fraction, by_class=True))
    for label, size in enumerate([1900, 90, 10]):
        assert kept[classes == label].sum() == max(1, round(fraction * size))


def test_classes_of_few_rows_are_trained_on():
    classes = np.array([0] * 1990 + [1] * 4 + [2] * 3 + [3] * 2 + [4])
    kept = np.isin(KEYS, held_out(KEYS, classes, 0.05, by_class=True))
    assert [int(kept[classes == label].sum()) for label in range(1, 5)] == [1, 0, 0, 0]


def test_what_is_held_out_does_not_depend_on_the_order_of_rows():
    classes = np.arange(2000) % 3
    order = np.random.default_rng(1).permutation(2000)
    assert np.array_equal(held_out(KEYS, classes, 0.1, True), held_out(KEYS[order], classes[order], 0.1, True))


def test_equal_rows_stay_together_and_count():
    keys = np.concatenate([KEYS[:100], np.repeat(KEYS[100:110], 10)])
    chosen = held_out(keys, np.zeros(200, np.int64), 0.3, by_class=True)
    assert np.isin(keys, chosen).sum() == pytest.approx(60, abs=5)


def test_labelled_texts_are_held_out_by_class_whatever_the_cutting(tmp_path):
    counts = {0: 200, 1: 20}
    reviews(tmp_path / "reviews.jsonl", counts)
    with logged() as lines:
        folder, manifest = prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / "reviews.jsonl")
    assert labels(folder, manifest) == {"train": {0: 160, 1: 16}, "val": {0: 40, 1: 4}}
    assert "  held out by class: 20.0% of the rows" in lines and manifest.stats["held_out"] == "by class"
    other, again = prepared("txt-clf-imdb-all", tmp_path / "again", tmp_path / "reviews.jsonl", piece_bytes=500)
    assert again.digest == manifest.digest and texts_of(other, again, "val") == texts_of(folder, manifest, "val")
    _, plain = prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / "reviews.jsonl", stratify=False)
    assert "held_out" not in plain.stats and plain.splits["val"].shards != manifest.splits["val"].shards


def test_texts_that_occur_twice_are_counted_and_of_one_split(tmp_path):
    rows = reviews(tmp_path / "once.jsonl", {0: 50, 1: 50})
    write_jsonl(tmp_path / "twice.jsonl", [*rows, *rows[:30], *({**row, "label": 1} for row in rows[:5])])
    with logged() as lines:
        folder, manifest = prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / "twice.jsonl")
    assert (
        "  repeated: 35 documents have the content of another one; equal ones are of one split (--data.duplicates skip leaves them out)"
        in lines
    )
    assert not texts_of(folder, manifest, "train") & texts_of(folder, manifest, "val")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_rows_of_a_group_are_of_one_split(form, tmp_path):
    rows = reviews(tmp_path / "rows.jsonl", {0: 70, 1: 70})
    if form == "csv":
        (tmp_path / "rows.csv").write_text("text,label,author\n" + "".join("{text},{label},{author}\n".format(**row) for row in rows))
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with logged() as lines:
        folder, manifest = prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / f"rows.{form}", group_column="author")
    authors = {row["text"]: row["author"] for row in rows}
    found = {split: {authors[text] for text in texts_of(folder, manifest, split)} for split in ("train", "val")}
    assert not found["train"] & found["val"] and len(found["val"]) == 1 and len(found["train"]) == 6
    assert "  held out by group of 7: 14.3% of the rows" in lines
    assert manifest.stats["shared_documents"] == 0


def test_equal_texts_of_two_groups_are_counted_as_shared(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "the same", "label": i % 2, "author": f"a{i}"} for i in range(10)])
    _, manifest = prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / "rows.jsonl", group_column="author")
    assert manifest.splits["val"].rows == 2 and manifest.stats["shared_documents"] == 2


def test_text_without_labels_is_held_out_by_group_too(tmp_path):
    rows = reviews(tmp_path / "rows.jsonl", {0: 70})
    _, manifest = prepared("clm-wikitext", tmp_path / "out", tmp_path / "rows.jsonl", group_column="author")
    assert manifest.stats["groups"] == 7 and manifest.splits["val"].documents == 10 and len(rows) == 70


def test_pictures_are_held_out_by_the_groups_of_their_table(tmp_path):
    lines = ["file_name,label,patient"]
    for i in range(20):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},p{i % 5}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    data = {"source": str(tmp_path), "root": str(tmp_path.parent / "out"), "group_column": "patient", "val_fraction": 0.2}
    from ray_jobs.cli import parse_experiment

    words = [word for name, value in data.items() for word in (f"--data.{name.replace('_', '-')}", str(value))]
    chosen = parse_experiment(["img-clf", *words], "x")
    manifest = preprocess.prepare(chosen)
    pixels = {
        name: {int(row[0]) for row in read_block(data_folder(chosen), split, 0)["image"].to_pylist()}
        for name, split in manifest.splits.items()
    }
    assert len({i % 5 for i in pixels["val"]}) == 1 and not {i % 5 for i in pixels["val"]} & {i % 5 for i in pixels["train"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a", "label": 0, "author": null}\n' * 9, "no group|'author' is empty"),
        ("rows.jsonl", '{"text": "a", "label": 0}\n' * 9, "has no field 'author'"),
        ("rows.csv", "text,label\na,0\n", "has no column 'author'"),
    ],
)
def test_rows_without_a_group_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / name, group_column="author")


def test_groups_of_what_has_no_columns_are_refused(tmp_path):
    (tmp_path / "book.txt").write_text("some text\n" * 99)
    with pytest.raises(UserError, match=re.escape("--data.group-column is author, and book.txt has no columns: it needs a table")):
        prepared("clm-wikitext", tmp_path / "out", tmp_path / "book.txt", group_column="author")
    with pytest.raises(UserError, match="prepare stream reads no columns"):
        prepared("clm-wikitext", tmp_path / "out", tmp_path / "book.txt", group_column="author", prepare="stream")


TIMES = {
    "dates": [f"2025-{1 + i // 28:02d}-{1 + i % 28:02d}" for i in range(140)],
    "hours": [f"2025-01-{1 + i // 24:02d}T{i % 24:02d}:30:00+01:00" for i in range(140)],
    "numbers": [i * 0.5 - 30 for i in range(140)],
    "timestamps": [datetime.datetime(2025, 1, 1) + datetime.timedelta(minutes=i) for i in range(140)],
}


@pytest.mark.parametrize("form", TIMES)
def test_the_latest_rows_are_held_out_whatever_their_order(form, tmp_path):
    rows = [{"text": f"at {i}", "label": i % 2, "when": when} for i, when in enumerate(TIMES[form])]
    random.Random(0).shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with logged() as lines:
        folder, manifest = prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / "rows.parquet", time_column="when")
    assert texts_of(folder, manifest, "val") == {f"at {i}" for i in range(112, 140)}
    assert texts_of(folder, manifest, "train") == {f"at {i}" for i in range(112)}
    assert "  held out by time, the latest of 140 times: 20.0% of the rows" in lines


def test_what_is_no_time_is_named(tmp_path):
    rows = [{"text": f"at {i}", "label": i % 2, "when": "2025-01-01" if i != 3 else "in March"} for i in range(12)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="rows.jsonl line 4: column 'when' holds 'in March', which is no time: a number, or a date"):
        prepared("txt-clf-imdb-all", tmp_path / "out", tmp_path / "rows.jsonl", time_column="when")
    with pytest.raises(UserError, match="--data.time-column and --data.group-column are both given"):
        DataConfig(time_column="when", group_column="label").check("data.")
