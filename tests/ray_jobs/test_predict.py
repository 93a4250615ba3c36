"""Batch inference: parts, ids, bad rows, and the job on Ray, killed and continued."""

import bz2
import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import perceiver
from perceiver.config import UserError
from perceiver.data.rows import ArrayRows
from perceiver.inference.joined import join
from perceiver.inference.parts import from_plain, list_inputs, plan_parts, read_part, to_plain
from perceiver.inference.predict import MODES, PredictOptions, output_schema, predict_rows
from perceiver.inference.rows import Row
from ray_jobs.predict import check_new_file
from tests.support.trained import write_run

ROOT = Path(__file__).resolve().parent.parent.parent
LINES = ["first", "", "dritte Zeile: ü", "x" * 50, "last one"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return {task: write_run(home / task, task) for task in ("causal", "masked", "sentiment", "images")}


INPUT_FILES = [
    "array.json", "bad.jsonl", "lines.txt", "objects.jsonl", "packed.jsonl.gz", "rows.csv", "rows.tsv.bz2", "table.arrow", "table.parquet",
]  # fmt: skip
"""Those of `write_inputs`, and a bad one."""


def write_inputs(folder: Path) -> None:
    """The same five rows as lines, objects (packed and not) and parquet."""
    folder.mkdir()
    (folder / "lines.txt").write_text("\n".join(LINES))
    objects = "".join(json.dumps({"text": line, "name": f"n{i}"}) + "\n" for i, line in enumerate(LINES))
    (folder / "objects.jsonl").write_text(objects)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(objects.encode()))
    table = pa.table({"text": LINES, "name": [f"n{i}" for i in range(5)]})
    pq.write_table(table, folder / "table.parquet", row_group_size=2)
    pa.feather.write_feather(table, folder / "table.arrow", compression="uncompressed", chunksize=2)
    (folder / "array.json").write_text(json.dumps(table.to_pylist()))
    rows = "".join(f"n{i};{line}\r\n" for i, line in enumerate(LINES))
    (folder / "rows.csv").write_bytes(b"\xef\xbb\xbf" + f"name;text\r\n{rows}\r\n".encode())
    (folder / "rows.tsv.bz2").write_bytes(bz2.compress(f"name\ttext\n{rows.replace(';', chr(9))}".encode()))


@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 5, 100])
def test_any_cutting_gives_the_same_rows_with_the_same_ids(tmp_path, rows_per_part):
    write_inputs(tmp_path / "in")
    parts = plan_parts(list_inputs([str(tmp_path / "in")]), rows_per_part, "text", None)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert all(1 <= part.rows <= (5 if part.names == ("array.json",) else rows_per_part) for part in parts)
    assert from_plain(json.loads(json.dumps(to_plain(parts)))) == parts
    rows = [row for part in parts for row in read_part(part, "text", "text", None)]
    assert [row.id for row in rows] == [f"{name}:{i}" for name in INPUT_FILES if name != "bad.jsonl" for i in range(5)]
    assert [row.value for row in rows] == LINES * 8


def test_rows_of_long_files_are_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("perceiver.inference.line_parts._CHUNK", 7)
    write_inputs(tmp_path / "in")
    for name in ("lines.txt", "objects.jsonl", "packed.jsonl.gz", "rows.csv"):
        parts = plan_parts(list_inputs([str(tmp_path / "in" / name)]), 2, "text", None)
        assert [row.value for part in parts for row in read_part(part, "text", "text", None)] == LINES


def test_ids_are_taken_from_their_column(tmp_path):
    write_inputs(tmp_path / "in")
    for name in ("objects.jsonl", "table.parquet", "table.arrow", "array.json", "rows.csv", "rows.tsv.bz2"):
        (part,) = plan_parts(list_inputs([str(tmp_path / "in" / name)]), 10, "text", "name")
        assert [row.id for row in read_part(part, "text", "text", "name")] == [f"n{i}" for i in range(5)]


@pytest.mark.parametrize("rows_per_part", [1, 2, 10])
def test_rows_of_csv_may_have_line_ends_in_quotes_and_faulty_ones_are_rows(tmp_path, rows_per_part):
    content = b'id,text\n\n7,"two\nlines, and ""quotes"""\n8,plain\n9,too,many\n\n10,\xff\n,no id\n11,"last"'
    (tmp_path / "x.csv").write_bytes(content)
    parts = plan_parts(list_inputs([str(tmp_path)]), rows_per_part, "text", "id")
    rows = [row for part in parts for row in read_part(part, "text", "text", "id")]
    assert [(row.id, row.value) for row in rows] == [
        ("7", 'two\nlines, and "quotes"'), ("8", "plain"), ("x.csv:2", None), ("x.csv:3", None), ("", "no id"), ("11", "last"),
    ]  # fmt: skip
    assert rows[2].error == "has 3 fields, and the first line names 2" and rows[3].error == "'text' is not UTF-8"


def test_cells_of_csv_are_numbers_where_rows_of_arrays_are_wanted(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n1.5,"[1, 2]"\n,\nx,"[1, 2]"\n')
    arrays = ArrayRows(a=((), "float32"), b=((2,), "int32"))
    (part,) = plan_parts(list_inputs([str(tmp_path)]), 10, "", None, arrays)
    rows = read_part(part, "arrays", "", None, arrays)
    assert rows[0].value["a"] == 1.5 and rows[0].value["b"].tolist() == [1, 2]
    assert "has none of the columns" in rows[1].error and "cannot be read as float32" in rows[2].error


def test_quotes_that_cannot_be_right_are_named_with_their_line(tmp_path):
    (tmp_path / "x.csv").write_text('text\ngood\n"bad" quote\n')
    with pytest.raises(UserError, match="x.csv line 3: quotes that cannot be right"):
        plan_parts(list_inputs([str(tmp_path)]), 10, "text", None)


def test_tables_beside_pictures_are_no_inputs(tmp_path):
    for name in ("a/1.png", "metadata.csv", "notes.txt", "more.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [name for _, name, _ in list_inputs([str(tmp_path)], "image")] == ["a/1.png", "more.parquet"]
    assert len(list_inputs([str(tmp_path)], "text")) == 4


RESULTS = [
    {"id": "a", "label": "cat", "index": 0, "probability": 0.7, "probabilities": [0.7, 0.3], "error": None},
    {"id": "b", "label": None, "index": None, "probability": None, "probabilities": None, "error": 'no "picture", none'},
    {"id": "c", "label": "dog, say", "index": 1, "probability": 0.9, "probabilities": [0.1, 0.9], "error": None},
]


def write_parts(runs, folder: Path) -> list[str]:
    """What a classifier of two classes has written, in two parts."""
    model = perceiver.load(runs["sentiment"])
    model.task = replace(model.task, class_names=("cat", "dog, say"))
    schema, names = output_schema("classify", model), ["part-00000.parquet", "part-00001.parquet"]
    folder.mkdir()
    for name, rows in zip(names, (RESULTS[:2], RESULTS[2:]), strict=True):
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / name)
    return names


def test_outputs_are_one_file_in_order_with_names_of_classes(runs, tmp_path):
    names = write_parts(runs, tmp_path / "parts")
    for suffix in (".csv", ".jsonl", ".parquet"):
        assert join(str(tmp_path / "parts"), names, str(tmp_path / f"out{suffix}")) == 3
    with open(tmp_path / "out.csv", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert first == {
        "id": "a", "label": "cat", "index": "0", "probability": "0.7", "probability_cat": "0.7", "probability_dog, say": "0.3", "error": "",
    }  # fmt: skip
    assert (second["error"], second["probability_cat"], third["label"]) == ('no "picture", none', "", "dog, say")
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["probabilities"] for row in objects] == [{"cat": 0.7, "dog, say": 0.3}, None, {"cat": 0.1, "dog, say": 0.9}]
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[2]["probabilities"] == {"cat": pytest.approx(0.1), "dog, say": pytest.approx(0.9)} and table[1]["probabilities"] is None
    assert [row["id"] for row in table] == ["a", "b", "c"]


def test_an_output_file_is_not_written_over(tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(UserError, match=r"--output .*out.csv exists"):
        check_new_file(str(tmp_path / "out.csv"))
    check_new_file(str(tmp_path / "other.csv"))


def test_rows_that_cannot_be_read_are_rows_with_an_error(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"no json",
        b'{"text": 3}',
        b'{"other": 1}',
        b'"text"',
        b'{"text": "\xff"}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"text": ' + b"1" * 5_000 + b"}",
        b'{"text": "good too"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (part,) = plan_parts(list_inputs([str(tmp_path)]), 10, "text", None)
    rows = read_part(part, "text", "text", None)
    assert [row.error is None for row in rows] == [True, *[False] * 7, True]
    assert [row.id for row in rows] == [f"x.jsonl:{i}" for i in range(9)]
    for row, message in zip(
        rows[1:8],
        ["not a JSON object", "is int, not text", "missing or null", "not a JSON object", "not UTF-8", "too deep", "too many digits"],
        strict=True,
    ):
        assert message in row.error


def test_inputs_that_cannot_be_planned_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="does not exist"):
        list_inputs([str(tmp_path / "b")])
    with pytest.raises(UserError, match="no file that can be read"):
        list_inputs([str(tmp_path / "a")])
    (tmp_path / "a" / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="no readable parquet"):
        plan_parts(list_inputs([str(tmp_path)]), 10, "text", None)
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "a" / "x.parquet")
    with pytest.raises(UserError, match="no column 'text'.*words"):
        plan_parts(list_inputs([str(tmp_path)]), 10, "text", None)


# -------------------------------------------------------------------------------------------------- rows through a
# model


INPUTS = {
    "classify": ("sentiment", ["good", "bad " * 20, "ü"], "\ud800"),
    "fill-mask": ("masked", ["a <mask>", "<mask><mask> b", "c[MASK]"], "without"),
    "embed": ("causal", ["good", "x" * 40, "y"], ""),
    "score": ("causal", ["good", "x" * 40, "y"], ""),
    "generate": ("causal", ["good", "x" * 16, "y"], "x" * 17),
}


@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_bad_row_has_an_error_and_the_others_are_as_without_it(runs, mode, batch_size):
    task, good, bad = INPUTS[mode]
    model = perceiver.load(runs[task], device="cpu")
    options = PredictOptions(mode=mode, batch_size=batch_size, temperature=0, max_new_tokens=5)
    values = [good[0], bad, *good[1:]]
    rows = [Row(f"r{i}", value) for i, value in enumerate(values)] + [Row("unread", None, "no such row")]
    table = predict_rows(model, rows, options)
    assert table.schema.equals(output_schema(mode, model))
    assert table["id"].to_pylist() == ["r0", "r1", "r2", "r3", "unread"]
    errors = table["error"].to_pylist()
    assert [error is None for error in errors] == [True, False, True, True, False] and errors[-1] == "no such row"
    alone = predict_rows(model, [Row("x", value) for value in good], options)
    kept = table.filter(pa.array([True, False, True, True, False]))
    for name, _ in MODES[mode].columns:
        for one, other in zip(kept[name].to_pylist(), alone[name].to_pylist(), strict=True):
            if isinstance(one, (str, int)) or (one and isinstance(one[0] if isinstance(one, list) else one, str)):
                assert one == other
            else:
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("id_column", [None, "id"])
def test_a_drawn_continuation_depends_on_its_row_and_neither_on_part_nor_batch(runs, tmp_path, id_column):
    """Equal prompts differ, also under equal ids."""
    lines = [{"text": text, "id": "same"} for text in ["abc", "abc", "a", "x" * 17, "abc", "longer text", "abc"]]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = perceiver.load(runs["causal"], device="cpu")
    results = []
    for rows_per_part, batch_size, seed in ((100, 16, 0), (2, 1, 0), (3, 2, 0), (100, 16, 1)):
        options = PredictOptions(mode="generate", batch_size=batch_size, max_new_tokens=12, seed=seed)
        parts = plan_parts(list_inputs([str(tmp_path)]), rows_per_part, "text", id_column)
        tables = [predict_rows(model, read_part(part, "text", "text", id_column), options) for part in parts]
        results.append(pa.concat_tables(tables))
    first, *others, other_seed = results
    assert all(table.equals(first) for table in others) and not other_seed.equals(first)
    texts = [text for text in first["text"].to_pylist() if text is not None]
    assert len(texts) == 6 and len(set(texts)) == 6


def test_lines_that_no_parser_takes_are_rows_with_an_error(tmp_path):
    lines = ['{"text": "good"}', "[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": "good too"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    (part,) = plan_parts(list_inputs([str(tmp_path)]), 10, "text", None)
    rows = read_part(part, "text", "text", None)
    assert [row.error is None for row in rows] == [True, False, False, True]
    assert all("not a JSON object" in row.error for row in rows[1:3])


def test_a_picture_with_a_huge_header_is_a_row_with_an_error(runs):
    import io
    import struct
    import zlib

    from PIL import Image

    good = io.BytesIO()
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(good, "PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    bomb = good.getvalue()[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + good.getvalue()[33:]
    model = perceiver.load(runs["images"], device="cpu")
    table = predict_rows(model, [Row("a", good.getvalue()), Row("b", bomb), Row("c", good.getvalue())], PredictOptions(mode="classify"))
    assert [error is None for error in table["error"].to_pylist()] == [True, False, True]
    assert "exceeds limit" in table["error"].to_pylist()[1]


def test_a_model_of_another_task_is_refused(runs):
    model = perceiver.load(runs["images"], device="cpu")
    with pytest.raises(UserError, match="cannot generate"):
        predict_rows(model, [Row("x", "y")], PredictOptions(mode="generate"))


# ---------------------------------------------------------------------------------------------------------- command
# line


def test_a_command_line_becomes_a_job_with_its_checkpoint_settled(runs, tmp_path):
    from ray_jobs.predict import parse

    job, output, placement, _ = parse([str(runs["sentiment"]), "--input", "in", "--output", str(tmp_path / "out"), "--actors", "2"])
    assert (job.options.mode, job.column, job.checkpoint, placement.actors) == ("classify", "text", "1", 2)
    assert job.inputs == (os.path.abspath("in"),) and output == str(tmp_path / "out")
    job, *_ = parse([str(runs["images"]), "--input", "in", "--output", "out", "--mode", "embed"])
    assert (job.options.mode, job.column, job.kind) == ("embed", "image", "image")
    for task, mode in {"causal": "generate", "masked": "fill-mask", "sentiment": "classify", "images": "classify"}.items():
        for source in (runs[task], perceiver.load(runs[task], device="cpu").export(tmp_path / task)):
            assert parse([str(source), "--input", "in", "--output", "out"])[0].options.mode == mode
    for arguments, message in [
        (["--mode", "generate"], "can only classify, embed"),
        (["--actors", "0"], "--actors is 0"),
        (["--checkpoint", "9"], "steps 1"),
    ]:
        with pytest.raises(UserError, match=message):
            parse([str(runs["sentiment"]), "--input", "in", "--output", "out", *arguments])


@pytest.mark.parametrize(
    "task, arguments, message",
    [
        ("causal", ["--temperature", "-1"], "--temperature is -1.0"),
        ("causal", ["--temperature", "nan"], "--temperature is nan"),
        ("causal", ["--top-p", "nan"], "--top-p is nan"),
        ("causal", ["--top-k", "0"], "--top-k is 0"),
        ("causal", ["--seed", str(2**64)], "--seed is 18446744073709551616"),
        ("causal", ["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ("causal", ["--num-latents", "0"], "--num-latents is 0"),
        ("causal", ["--num-latents", "9"], "--num-latents is 9 and must be at most the model's 8"),
        ("causal", ["--stop", ""], "--stop is empty"),
        ("causal", ["--checkpoint", "²"], "checkpoint '²' does not exist"),
        ("causal", ["--checkpoint", "9" * 5000], "does not exist"),
        ("causal", ["--column", ""], "--column is empty"),
        ("causal", ["--id-column", " "], "--id-column is empty"),
        ("causal", ["--output", ""], "--output is empty"),
        ("causal", ["--input", "a", ""], "--input is empty"),
        ("masked", ["--top-k", "1000000"], "--top-k is 1000000 and must be at least 1 and at most 10,000"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(runs, task, arguments, message):
    from ray_jobs.predict import parse

    with pytest.raises(UserError, match=message):
        parse([str(runs[task]), "--input", "in", "--output", "out", *arguments])


def test_an_empty_name_of_a_run_is_not_the_current_folder(runs, monkeypatch):
    from ray_jobs.predict import parse

    monkeypatch.chdir(runs["causal"])
    for name in ("", " "):
        for call in (lambda: perceiver.load(name), lambda: parse([name, "--input", "in", "--output", "out"])):  # noqa: B023
            with pytest.raises(UserError, match="empty"):
                call()


@pytest.mark.parametrize("content", ["[]", "null", "{", "{}", '{"settings": 1, "parts": []}', '{"settings": {}, "parts": [{"a": 1}]}'])
def test_a_plan_of_someone_else_is_one_sentence(runs, tmp_path, content):
    from ray_jobs.predict import parse
    from ray_jobs.predict_job import plan

    write_inputs(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_plan.json").write_text(content)
    job = parse([str(runs["sentiment"]), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])[0]
    with pytest.raises(UserError, match="_plan.json in --output .*/out is damaged"):
        plan(job, str(tmp_path / "out"))
    assert (tmp_path / "out" / "_plan.json").read_text() == content


@pytest.mark.parametrize("bad, status", [(5, 1), (4, 0)])
def test_a_job_of_which_no_row_succeeds_fails_and_names_its_mode(runs, tmp_path, monkeypatch, capsys, bad, status):
    from ray_jobs import cli, predict

    (tmp_path / "in.txt").write_text("".join("x" * (17 if i < bad else 3) + "\n" for i in range(5)))

    def compute(job, parts, output, placement, model):
        predictor = predict.Predictor(job, output, "cpu", 0)
        for part in parts:
            table = predict._read(pa.table({"part": [json.dumps(to_plain([part])[0])]}), job)
            yield predictor(table).to_pylist()[0]

    monkeypatch.setattr(predict, "_compute", compute)
    arguments = [str(runs["causal"]), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
    for _ in range(2):  # also when it is started again, with nothing left to compute
        with pytest.raises(SystemExit) as stop:
            cli.main_entry(predict.main, arguments)
        assert stop.value.code == status
        streams = capsys.readouterr()
        assert streams.out.startswith("mode generate of ")
        assert ("none of the 5 rows could be computed; the first: the prompt has 17 tokens" in streams.err) == (status == 1)


def test_an_output_folder_belongs_to_one_job(runs, tmp_path):
    from ray_jobs.predict import parse
    from ray_jobs.predict_job import plan

    write_inputs(tmp_path / "in")

    def job(*more):
        return parse([str(runs["sentiment"]), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *more])[0]

    parts = plan(job(), str(tmp_path / "out"))
    assert plan(job(), str(tmp_path / "out")) == parts
    with pytest.raises(UserError, match="another job .*rows_per_part: 1000 -> 7"):
        plan(job("--rows-per-part", "7"), str(tmp_path / "out"))
    (tmp_path / "in" / "lines.txt").write_text("changed")
    with pytest.raises(UserError, match="another job .*files.lines.txt"):
        plan(job(), str(tmp_path / "out"))
    for inside in (tmp_path / "in", tmp_path / "in" / "out"):
        with pytest.raises(UserError, match="lies inside --input"):
            plan(job(), str(inside))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="is not empty"):
        plan(job(), str(tmp_path / "mine"))


@pytest.mark.parametrize("rows_per_part", [3, 100])
def test_parts_go_from_reader_to_actor_to_file_and_every_row_is_there(runs, tmp_path, rows_per_part):
    """What Ray's tasks and actors do, called here one after another."""
    from ray_jobs.predict import Predictor, _read, parse
    from ray_jobs.predict_job import finish, part_name, plan

    write_inputs(tmp_path / "in")
    (tmp_path / "in" / "bad.jsonl").write_text('{"text": "\\ud800"}\nno json\n{"text": "good"}\n')
    out = str(tmp_path / "out")
    job, *_ = parse(
        [
            str(runs["sentiment"]),
            "--input",
            str(tmp_path / "in"),
            "--output",
            out,
            "--rows-per-part",
            str(rows_per_part),
        ]
    )
    parts = plan(job, out)
    actor = Predictor(job, out, "cpu", 0)
    for part in parts:
        (done,) = actor(_read(pa.table({"part": [json.dumps(to_plain([part])[0])]}), job)).to_pylist()
        assert (done["number"], done["rows"]) == (part.number, part.rows)
    summary = finish(parts, out)
    assert (summary["rows"], summary["errors"]) == (43, 2)
    table = pa.concat_tables([pq.read_table(f"{out}/{part_name(part.number)}") for part in parts])
    assert table["id"].to_pylist() == [f"{name}:{i}" for name in INPUT_FILES for i in range(3 if name == "bad.jsonl" else 5)]
    errors = [json.loads(line) for line in (tmp_path / "out" / "_errors.jsonl").read_text().splitlines()]
    assert [e["id"] for e in errors] == ["bad.jsonl:0", "bad.jsonl:1"] and "surrogate" in errors[0]["error"]


# -------------------------------------------------------------------------------------------------------------------
# Ray


def predict_command(run: Path, inputs: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ray_jobs.predict", str(run), "--input", str(inputs), "--output", str(output), *more]


@pytest.mark.slow
def test_a_killed_job_continues_and_every_row_is_there_once(runs, tmp_path):
    """Two actors, three bad rows among 4,000, the driver killed when the first parts are down."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    bad = {17: "no json\n", 1234: '{"id": "r1234"}\n', 3999: '{"id": "r3999", "text": null}\n'}
    for file in range(4):
        lines = []
        for i in range(1000 * file, 1000 * file + 1000):
            text = "".join(map(chr, rng.integers(97, 123, rng.integers(1, 60))))
            lines.append(bad.get(i, json.dumps({"id": f"r{i}", "text": text}) + "\n"))
        (tmp_path / "in" / f"{file}.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    command = predict_command(runs["sentiment"], tmp_path / "in", out, "--id-column", "id", "--actors", "2", "--rows-per-part", "50")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while len(list(out.glob("part-*"))) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 3 <= len(before) < 80
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    assert "done before" in second.stdout and "finished: 4,000 rows" in second.stdout and "3 with errors" in second.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    table = pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])
    expected = {f"r{i}" for i in range(4000)} - {"r17"} | {"0.jsonl:17"}
    assert table.num_rows == 4000 and set(table["id"].to_pylist()) == expected
    wrong = table.filter(table["error"].is_valid())
    assert wrong["id"].to_pylist() == ["0.jsonl:17", "r1234", "r3999"] and wrong["label"].null_count == 3
    assert [json.loads(line)["id"] for line in (out / "_errors.jsonl").read_text().splitlines()] == wrong["id"].to_pylist()
    assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    model = perceiver.load(runs["sentiment"], device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "in" / "2.jsonl").read_text().splitlines()]
    expected = {row["id"]: c.probability for row, c in zip(rows, model.classify([r["text"] for r in rows]), strict=True)}
    found = dict(zip(table["id"].to_pylist(), table["probability"].to_pylist(), strict=True))
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-4)


@pytest.mark.long
def test_images_are_rows_by_file_name(runs, tmp_path):
    from PIL import Image

    (tmp_path / "in" / "more").mkdir(parents=True)
    for i in range(5):
        name = f"more/{i}.png" if i % 2 else f"{i}.png"
        Image.fromarray(np.full((6, 6), 40 * i, np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = predict_command(runs["images"], tmp_path / "in", tmp_path / "out", "--rows-per-part", "4")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out").glob("part-*.parquet"))])
    assert table["id"].to_pylist() == ["0.png", "2.png", "4.png", "broken.png", "more/1.png", "more/3.png"]
    assert table["error"].is_valid().to_pylist() == [False, False, False, True, False, False]
