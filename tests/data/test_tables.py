"""Tables of text in the formats that people have: every format gives the same rows, and every fault is named."""

import bz2
import csv
import gzip
import io
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from perceiver.data.manifest import MANIFEST, Manifest
from perceiver.data.spans import Problems
from perceiver.data.tables import BadLabel, Columns, LeftOut, label_of
from ray_jobs import preprocess
from tests.support.preparing import content, experiment, load_prepared, rows_of, serially, texts, write_jsonl

ROWS = [{"text": f'{text}, "{i}"; and\n\ttabs', "label": i % 2} for i, text in enumerate(texts(30))]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    serially(monkeypatch)


def as_csv(rows, delimiter=",", end="\r\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text", "label"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows({"id": i, **row} for i, row in enumerate(rows))
    return out.getvalue().encode()


def write(folder, name, rows=ROWS) -> None:
    path, table = folder / name, pa.Table.from_pylist(rows)
    plain = {
        "csv": as_csv(rows),
        "tsv": as_csv(rows, "\t", "\n"),
        "semicolon.csv": as_csv(rows, ";"),
        "bom.csv": b"\xef\xbb\xbf" + as_csv(rows),
        "array.json": json.dumps(rows, indent=2, ensure_ascii=False).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
        "jsonl": "".join(json.dumps(row) + "\r\n\r\n" for row in rows).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }
    bare = name.partition(".")[2]
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain[bare.removesuffix(".gz")]))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(plain[bare.removesuffix(".bz2")]))
    elif name.endswith(".zst"):
        path.write_bytes(pa.compress(plain[bare.removesuffix(".zst")], codec="zstd", asbytes=True))
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    elif name.endswith(".feather"):
        feather.write_feather(table, path)
    elif name.endswith(".parquet"):
        pq.write_table(table, path)
    else:
        path.write_bytes(plain[bare])


def prepared(tmp_path, source, **data):
    chosen = experiment("txt-clf-imdb-all", tmp_path / "out", source, 200, **({"val_fraction": 0.3} | data))
    preprocess.prepare(chosen)
    folder, manifest = load_prepared(chosen)
    return [(row["tokens"], row["label"]) for split in manifest.splits for row in rows_of(folder, manifest, split).to_pylist()]


NAMES = [
    "a.csv", "a.tsv", "a.semicolon.csv", "a.bom.csv", "a.array.json", "a.bom.json", "a.jsonl", "a.bom.jsonl", "a.arrow", "a.feather",
    "a.csv.gz", "a.csv.bz2", "a.csv.zst", "a.jsonl.zst", "a.jsonl.bz2", "a.array.json.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_rows_of_parquet(tmp_path, name):
    write(tmp_path, "a.parquet")
    expected = prepared(tmp_path, tmp_path / "a.parquet")
    write(tmp_path, name)
    assert prepared(tmp_path, tmp_path / name) == expected and len(expected) == len(ROWS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz"])
def test_text_in_another_encoding_is_that_text(tmp_path, name, encoding):
    rows = [{"text": f"café number {i}", "label": i % 2} for i in range(20)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = as_csv(rows).decode() if "csv" in name else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert prepared(tmp_path, tmp_path / name, encoding=encoding) == prepared(tmp_path, tmp_path / "b.jsonl")


def test_folders_of_save_to_disk_are_read_with_their_splits(tmp_path):
    import datasets

    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    chosen = experiment("txt-clf-imdb-all", tmp_path / "out", tmp_path / "saved")
    manifest = preprocess.prepare(chosen)
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 30, "val": 3}


GOOD = b"text,label\n" + b"fine,1\n" * 40
FAULTS = {
    "utf8.csv": (GOOD + b"caf\xe9,0\nfine,0\n", r"utf8.csv line 42: field 'text' is not UTF-8: byte 0xe9 \(--data.encoding latin-1"),
    "utf16.csv": (GOOD.decode().encode("utf-16"), r"utf16.csv is UTF-16 .*give --data.encoding utf-16"),
    "utf16.jsonl": ('{"text": "a", "label": 1}\n'.encode("utf-16"), r"utf16.jsonl is UTF-16 .*give --data.encoding utf-16"),
    "fields.csv": (GOOD + b"one, two,1\n", r"fields.csv line 42: has 3 fields, and the first line names 2"),
    "quotes.csv": (GOOD + b'"never closed,1\n', r"quotes.csv line 42: quotes that cannot be right"),
    "column.csv": (b"body,label\na,1\n", r"column.csv has no column 'text' \(it has: body, label\)"),
    "empty.csv": (b"text,label\n", r"empty.csv has no rows"),
    "real.csv": (GOOD + b"fine,3.7\n", r"real.csv line 42: label 3.7 is no class: .*regression"),
    "list.jsonl": (b'{"text": "a", "label": [0, 1]}\n', r"list.jsonl line 1: label \[0, 1\] is a list, and each row has one class"),
    "cut.csv.gz": (gzip.compress(GOOD)[:-20], r"cut.csv.gz is truncated: its gzip data ends early"),
    "cut.csv.bz2": (bz2.compress(GOOD)[:-20], r"cut.csv.bz2 is truncated: its bzip2 data ends early"),
    "cut.csv.zst": (pa.compress(GOOD, codec="zstd", asbytes=True)[:-5], r"cut.csv.zst is corrupt after byte"),
    "comma.json": (b'[{"text": "a", "label": 1} {"text": "b", "label": 0}]', r"comma.json is no array of JSON: element 1: a comma"),
    "end.json": (b'[{"text": "a", "label": 1}, {"text": "b", ', r"end.json is no array of JSON: element 1: "),
    "element.json": (b'[{"text": "a", "label": 1}, 7]', r"element.json element 1: is no JSON object"),
    "no.arrow": (b"this is not Arrow data", r"no.arrow is no readable Arrow file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_place_or_skipped_and_counted(tmp_path, name):
    source = tmp_path / "in"
    source.mkdir()
    data, message = FAULTS[name]
    (source / name).write_bytes(data)
    write_jsonl(source / "more.jsonl", [{"text": f"good {i}", "label": i % 2} for i in range(60)])
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, source)
    assert not list((tmp_path / "out").rglob(MANIFEST))
    prepared(tmp_path, source, on_error="skip")
    manifest = Manifest.load(next((tmp_path / "out").rglob(MANIFEST)).parent)
    assert sum(manifest.stats["skipped"].values()) == 1
    assert sum(split.rows for split in manifest.splits.values()) >= 60


def test_several_faults_are_named_together(tmp_path):
    (tmp_path / "in").mkdir()
    good = [{"text": f"good {i}", "label": i % 2} for i in range(60)]
    write_jsonl(tmp_path / "in" / "a.jsonl", [*good, {"text": 1, "label": 0}, {"label": 0}, *[{"text": "x", "label": 7}] * 5])
    (tmp_path / "in" / "b.csv").write_text('text,label\n"c",1,2\n')
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, tmp_path / "in")
    text = str(caught.value)
    for part in ("8 faults: ", "a.jsonl line 61", "a.jsonl line 62", "a.jsonl line 65", "b.csv line 2", "2 more of these kinds"):
        assert part in text, text
    assert "line 66" not in text and text.count("--data.on-error skip") == 1


def test_labels_may_be_texts_of_numbers_truth_values_and_whole_floats(tmp_path):
    values = [0, 1, "0", "1", False, True, 0.0, 1.0, "1.0", "negative", "positive"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": value} for i, value in enumerate(values)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "some", "label": 0}])
    labels = [label for _, label in prepared(tmp_path, f"{tmp_path}/*.jsonl")]
    assert labels == [0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0]


def test_an_element_of_a_json_array_may_be_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    from perceiver.data import spans

    rows = [{"text": "x" * int(n), "label": 1} for n in np.random.default_rng(0).integers(1, 900, 40)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = prepared(tmp_path, tmp_path / "b.jsonl")
    monkeypatch.setattr(spans, "SLAB", 37)
    assert prepared(tmp_path, tmp_path / "a.json") == expected


def test_tables_that_cannot_be_cut_are_not_streamed(tmp_path):
    for name in ("a.csv", "a.array.json"):
        write(tmp_path, name)
        with pytest.raises(UserError, match="can only be read from its beginning"):
            preprocess.prepare(experiment("clm-wikitext", tmp_path / "out", tmp_path / name, prepare="stream"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").mkdir()
    for name, mark in (("a/train.txt", b"\xef\xbb\xbf"), ("train.txt", b"")):
        (tmp_path / name).write_bytes(mark + b"some text\n" * 9)
        (tmp_path / name.replace("train", "val")).write_bytes(mark + b"other text\n" * 9)
    found = []
    for place in ("a/*.txt", "*.txt"):
        chosen = experiment("clm-wikitext", tmp_path / f"out{len(found)}", f"{tmp_path}/{place}")
        preprocess.prepare(chosen)
        found.append({name: data for name, data in content(load_prepared(chosen)[0]).items() if name != MANIFEST})
    assert found[0] == found[1] and found[0]


def test_an_encoding_that_does_not_exist_is_refused_before_anything_is_read(tmp_path):
    write(tmp_path, "a.csv")
    for name in ("nonsense", "base64", "utf\0"):
        with pytest.raises(UserError, match=re.escape(f"--data.encoding is {name!r}, which Python does not know")):
            prepared(tmp_path, tmp_path / "a.csv", encoding=name)


def test_a_number_is_no_place_among_classes_that_are_numbers():
    columns = Columns(text="text", label="label", num_classes=2, class_names=("3", "4"))
    assert [label_of(value, columns) for value in (3, "4", 4.0)] == [0, 1, 1]
    with pytest.raises(BadLabel, match="label 1 must be 3, 4"):
        label_of(1, columns)
    assert label_of(1, replace(columns, class_names=("no", "yes"))) == 1


def test_a_class_that_is_left_out_is_counted_and_never_refused():
    columns = Columns(text="text", label="label", num_classes=2, class_names=("no", "yes"), left_out=("maybe",))
    with pytest.raises(LeftOut):
        label_of("maybe", columns)
    problems = Problems(skip=False)
    problems.report(LeftOut.reason, "x")
    problems.end()
    assert problems.counts == {"class left out": 1}
