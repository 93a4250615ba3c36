"""`perceiver data`: what it says of pictures, tables and texts, and that its commands are right."""

import base64
import csv
import gzip
import io
import json
import random
import re
import shlex
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.data.examples_shown import thumbnail
from perceiver.inference.parts import plan_parts
from ray_jobs import data_time
from ray_jobs.cli import parse_experiment
from ray_jobs.data import look, main
from tests.data.test_picture_folders import picture, split_folder
from tests.support.flow_files import sintel
from tests.support.preparing import write_idx


def command(lines, name):
    """The experiment of a command that is offered."""
    words = shlex.split(next(line for line in lines if line.startswith(name)).partition(":")[2])
    assert words[:2] == ["perceiver", "train"]
    return parse_experiment(words[2:], "ray_jobs.train")


def test_of_pictures_it_says_classes_sizes_and_what_is_new_in_validation(tmp_path):
    folder = split_folder(tmp_path / "in")
    picture(folder / "val" / "green" / "1.png", "red", 5, size=(9, 8))
    lines = look(str(folder))
    assert "pictures: 8 x 8 to 8 x 9, 2 sizes; 0 grey, 19 in colour" in lines
    assert "classes in train: blue (6), red (6)" in lines and "  not in train: green" in lines
    assert command(lines, "train").task.class_names == ("blue", "red")


def test_of_a_table_it_says_columns_labels_lengths_and_duplicates(tmp_path):
    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "review", "stars"])
        writer.writerows([i, "a" * 300 if i % 4 else "same", 1 + i % 3] for i in range(12))
    lines = look(str(tmp_path / "in.csv"))
    assert "12 rows, columns:" in lines and "classes in 'stars': 1 (4), 2 (4), 3 (4)" in lines
    assert "longer than 254 bytes (txt-clf's context): 9 of 12; 414 bytes would be cut" in lines
    assert "duplicates: 10 (--data.duplicates skip leaves them out)" in lines
    chosen = command(lines, "train")
    assert chosen.task.class_names == ("1", "2", "3") and chosen.data.text_column == "review"
    with pytest.raises(UserError, match=r"--label-column is 'star', which .* does not have \(it has: id, review, stars\)"):
        look(str(tmp_path / "in.csv"), label="star")


def test_a_table_of_numbers_is_none_of_texts_and_offers_its_last_column(tmp_path):
    rows = [f"r{i},{i / 3:.2f},{'' if i == 3 else i % 5},{['north', 'south'][i % 2]},{i * 1.5 if i % 4 else 'NA'}" for i in range(40)]
    (tmp_path / "in.csv").write_text("\n".join(["id,area,rooms,district,price", *rows]))
    lines = look(str(tmp_path / "in.csv"))
    assert (
        "  rooms     int 39, missing 1; 0 to 4, mean 1.97436; numbers" in lines
        and "not used: 'id' (different in nearly every row)" in lines
    )
    chosen = command(lines, "train")
    assert (chosen.task.targets, chosen.task.loss, chosen.model.input.columns) == (("price",), "mse", ("area", "rooms", "district"))
    assert chosen.model.input.shapes == ("scalar", "scalar", "category")


def test_a_table_of_texts_may_have_numbers_beside_them(tmp_path):
    rows = "".join(f'"a film that {i} people saw",{i / 7:.2f},{["good", "bad"][i % 2]}\n' for i in range(12))
    (tmp_path / "in.csv").write_text(f"review,price,sentiment\n{rows}")
    lines = look(str(tmp_path / "in.csv"))
    assert command(lines, "train").data.label_column == "sentiment"
    assert command(lines, "train on all columns").task.targets == ("sentiment",)


def test_a_table_that_names_pictures_is_one_of_pictures(tmp_path):
    rows = []
    for i in range(6):
        picture(tmp_path / "in" / f"{i}.png", ["red", "blue"][i % 2], i, size=(8, 8))
        rows.append(f"in/{i}.png,{['red', 'blue'][i % 2]}\n")
    (tmp_path / "list.csv").write_text("file_name,label\n" + "".join(rows))
    lines = look(str(tmp_path / "list.csv"))
    assert "pictures: 8 x 8; 0 grey, 6 in colour" in lines
    assert command(lines, "train").task.class_names == ("blue", "red")


def test_a_real_number_is_no_class_and_a_quantity_is_learned_from_the_text(tmp_path):
    rows = "".join(f"a film that {i} people saw,{i / 7:.2f}\n" for i in range(12))
    (tmp_path / "in.csv").write_text(f"text,label\n{rows}")
    found = command(look(str(tmp_path / "in.csv")), "train on all columns")
    assert (found.preset, found.task.targets, found.task.loss, found.model.input.columns) == ("tables", ("label",), "mse", ("text",))
    with pytest.raises(UserError, match=r"has label 0.14 .* the preset tables, --task.targets label"):
        parse_experiment(["txt-clf", "--data.source", str(tmp_path / "in.csv")], "x")


def test_a_damaged_file_among_others_is_named_and_left_out_by_the_command(tmp_path):
    rows = "".join(f'{{"text": "a film that {i} people saw", "label": {i % 2}}}\n' for i in range(12)).encode()
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(rows))
    whole = (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    lines = look(str(tmp_path))
    (named,) = (line for line in lines if "left out" in line)
    assert named.startswith("2 files left out, as they cannot be read: ") and "b.jsonl.gz is truncated" in named and "c.parquet" in named
    assert "12 rows, columns:" in lines and command(lines, "train").data.on_error == "skip"
    table = [f"--data.source={tmp_path}", "--data.on-error=skip", "--task.targets=label", "--model.input.columns=text"]
    assert parse_experiment(["tables", *table], "x").model.input.shapes == ("text:25",), "a damaged file is left out here, too"
    (tmp_path / "a.jsonl.gz").unlink()
    with pytest.raises(UserError, match="is truncated"):
        look(str(tmp_path))


def test_pictures_that_cannot_be_read_are_named_and_left_out_by_the_command(tmp_path):
    folder = split_folder(tmp_path / "in")
    whole = (folder / "train" / "red").glob("*.png").__next__().read_bytes()
    (folder / "train" / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "red" / "none.png").write_bytes(b"no picture")
    lines = look(str(folder))
    (named,) = (line for line in lines if "cannot be read" in line)
    assert named.startswith("2 cannot be read: in/train/red/cut.png (") and "in/train/red/none.png" in named
    assert command(lines, "train").data.on_error == "skip"


def test_examples_of_pictures_are_as_the_preparation_sees_them():
    grey, shown = np.arange(64, dtype=np.uint8).reshape(8, 8), []
    for pixels in (grey, grey.astype(np.uint16) * 257):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        shown.append(np.asarray(Image.open(io.BytesIO(thumbnail(out.getvalue())))))
    np.testing.assert_array_equal(shown[1], shown[0])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text,label\na,b,c\nd,x\nf,y\n", "1 row cannot be read: a.csv line 2: has 3 fields, and the first line names 2"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n{no}\n', "1 row cannot be read: a.jsonl line 3: is no JSON"),
        ("a.csv", "text,label\nsch\u00f6n,x\ngut,y\n".encode("latin-1"), "1 row not in UTF-8: --data.encoding names another encoding"),
        ("a.csv", b"text,label\na b c,0.5\nd e f,1.5\n", "no classes, and 'label' holds real numbers, which are none"),
    ],
)
def test_what_a_training_would_stumble_over_is_said(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    lines = look(str(tmp_path / name))
    assert any(said in line for line in lines), lines
    assert ("--data.on-error skip" in lines[-1]) == ("cannot be read" in said)


def test_another_encoding_is_read_and_offered(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nsch\u00f6n ist es,x\ngut,y\n".encode("utf-16"))
    with pytest.raises(UserError, match="give --data.encoding utf-16"):
        look(str(tmp_path / "a.csv"))
    assert main([str(tmp_path / "a.csv"), "--data.encoding", "utf-16"]) == 0
    assert command(look(str(tmp_path / "a.csv"), encoding="utf-16"), "train").data.encoding == "utf-16"


def test_classes_of_tables_are_counted_by_split_and_new_ones_named(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "a b,x\nc d,y\n" * 5)
    (tmp_path / "val.csv").write_text("text,label\na b,x\ne f,z\n")
    lines = look(str(tmp_path))
    assert "classes in 'label', train: x (5), y (5)" in lines and "  not in train: z" in lines
    assert "texts of validation that occur in training: 1" in lines


def test_of_lists_of_labels_it_offers_any_number_of_classes(tmp_path):
    rows = [{"text": "a quiet evening", "tags": [["cat"], ["cat", "dog"], []][i % 3]} for i in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = look(str(tmp_path / "in.jsonl"))
    assert "labels in 'tags', any number a row: cat (8), dog (4)" in lines
    chosen = command(lines, "train")
    assert chosen.preset == "txt-tags" and chosen.task.class_names == ("cat", "dog")


def test_of_texts_without_classes_it_offers_a_language_model(tmp_path):
    (tmp_path / "a.txt").write_text("a quiet evening")
    assert command(look(str(tmp_path)), "train").preset == "clm-wikitext-small"


def test_nothing_that_is_known_is_named(tmp_path):
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(UserError, match="has no pictures, sounds, texts, tables, MIDI files or frames"):
        look(str(tmp_path))


def test_a_page_shows_classes_lengths_columns_and_examples_and_loads_nothing(tmp_path, capsys):
    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        writer.writerows([f"text <b>{i}</b> " + "a" * 700, 1 + i % 3] for i in range(12))
    assert main([str(tmp_path / "in.csv"), "--html", str(tmp_path / "page.html")]) == 0
    assert f"page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', page)[1].replace("<\\/", "</"))
    assert charts[0]["data"][0]["x"] == ["1", "2", "3"] and charts[0]["data"][0]["y"] == [4, 4, 4]
    assert sum(charts[1]["data"][0]["y"]) == 12
    assert "text &lt;b&gt;0&lt;/b&gt;" in page and "<b>0</b>" not in page.partition('id="charts"')[0]
    assert "row 11" in page, "examples of every class are shown"
    assert not re.search(r'(src|href)="https?:', page.partition("<script>")[0])
    with pytest.raises(UserError, match="--html is .*/none/x.html and must be a new file in a folder that exists"):
        main([str(tmp_path / "in.csv"), "--html", str(tmp_path / "none" / "x.html")])


@pytest.mark.parametrize("kind", ["folders", "idx", "parquet", "tar"])
def test_a_page_of_pictures_has_a_sheet_with_every_class(tmp_path, kind):
    folder = tmp_path / "in"
    if kind == "folders":
        split_folder(folder)
        (folder / "train" / "red" / "broken.png").write_bytes(b"no picture")
        names = {"blue", "red"}
    else:
        names = set("0123456789" if kind == "idx" else "012")
        write_pictures(folder, kind)
    assert main([str(folder), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    captions = re.findall(r"<figcaption>(\w+): [^<]*</figcaption>", page)
    assert set(captions) == names and 2 <= len(captions) <= 36
    for data in re.findall(r"data:image/png;base64,([^\"]+)", page):
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert max(image.size) <= 112


def write_pictures(folder, kind):
    """Pictures of three classes in one file (or two)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (8, 8), np.uint8) for _ in range(12)]
    if kind == "idx":
        write_idx(folder, "train", 100)
        write_idx(folder, "t10k", 20, seed=1)
        return
    files = []
    for image in pictures:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        files.append(out.getvalue())
    if kind == "parquet":
        rows = [{"image": {"bytes": data, "path": None}, "label": i % 3} for i, data in enumerate(files)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        return
    with tarfile.open(folder / "train-000.tar", "w") as archive:
        for i, data in enumerate(files):
            for name, content in ((f"{i:03d}.png", data), (f"{i:03d}.cls", str(i % 3).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def test_of_frames_with_their_flow_it_says_pairs_and_scenes(tmp_path):
    sintel(tmp_path / "sintel", frames=3)
    lines = look(str(tmp_path / "sintel"))
    (pairs,) = (line for line in lines if "of frames with their optical flow" in line)
    assert pairs == "8 pairs of frames with their optical flow, of 32 x 48"
    assert "2 scenes: pairs of a scene are all for training or all for validation" in lines
    assert command(lines, "train").preset == "optical-flow-small"


def test_the_time_to_prepare_is_measured_on_a_part_and_extrapolated(tmp_path, monkeypatch):
    with open(tmp_path / "texts.jsonl", "w") as file:
        file.writelines(f'{{"text": "text {i} of some length", "label": {i % 2}}}\n' for i in range(30_000))
    size = (tmp_path / "texts.jsonl").stat().st_size
    monkeypatch.setattr(data_time, "SAMPLE_BYTES", 1 << 18)
    monkeypatch.setattr(data_time, "SECONDS", 0.0)
    (line,) = [line for line in look(str(tmp_path / "texts.jsonl")) if line.startswith("time to prepare")]
    found = re.fullmatch(
        r"time to prepare for txt-clf: (.*) \((.*) of (.*) bytes took (.*) s here on one CPU; Ray's start comes to it\)", line
    )
    measured, total = (int(number.replace(",", "")) for number in found.groups()[1:3])
    assert 0 < measured < total == size and float(found[4]) > 0
    (tmp_path / "rows.csv").write_text("text,label\n" + "a text,1\nanother,2\n" * 20)
    monkeypatch.setattr(data_time, "MOST_BYTES", 10)
    (line,) = [line for line in look(str(tmp_path / "rows.csv")) if line.startswith("time to prepare")]
    assert line == "time to prepare: not measured, rows.csv is read from its beginning to its end"


def test_a_file_that_calls_two_columns_the_same_is_refused(tmp_path):
    """Else the last one would be read, and nobody would know."""
    table = pa.Table.from_arrays([pa.array([1, 2] * 10), pa.array([3, 4] * 10), pa.array([0, 1] * 10)], names=["a", "a", "y"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pa.OSFile(str(tmp_path / "twice.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "twice.csv").write_text("a,a,y\n1,3,0\n2,4,1\n")
    for ending in ("parquet", "arrow", "csv"):
        with pytest.raises(UserError, match=f"twice.{ending} has several columns 'a': give each a name of its own"):
            look(str(tmp_path / f"twice.{ending}"))
        with pytest.raises(UserError, match=f"twice.{ending} has several columns 'a'"):
            plan_parts([(str(tmp_path / f"twice.{ending}"), f"twice.{ending}", 0)], 10, "y", None)
    (tmp_path / "blank.csv").write_text("a,,,y\n1,,,0\n2,,,1\n3,,,1\n")  # as a spreadsheet writes what is empty
    look(str(tmp_path / "blank.csv"))


def test_what_is_the_same_in_every_row_is_neither_called_different_nor_offered_as_a_target(tmp_path):
    (tmp_path / "in.csv").write_text("x,y,unit\n" + "".join(f"{i},{i % 2},3\n" for i in range(30)))
    assert "--task.targets y" in look(str(tmp_path / "in.csv"))[-1]
    (tmp_path / "words.csv").write_text("x,y,unit\n" + "".join(f"{i},{i % 2},m\n" for i in range(30)))
    assert any("unit" in line and "the same in every row: left out" in line for line in look(str(tmp_path / "words.csv")))


def test_one_class_alone_is_said_to_be_nothing_to_learn(tmp_path):
    folder = split_folder(tmp_path / "in")
    for split in ("train", "val"):
        for path in (folder / split / "blue").iterdir():
            path.unlink()
        (folder / split / "blue").rmdir()
    assert "there is only one class to train on, 'red', so there is nothing to tell apart" in look(str(folder))


NOISE = random.Random(0).randbytes(5000)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.mid", "a.png", "a.wav", "a.parquet", "a.xlsx", "a.arrow"]
)
@pytest.mark.parametrize(
    "content", [NOISE, NOISE.replace(b"\r", b"").replace(b'"', b""), b""], ids=["noise", "noise without quotes", "nothing"]
)
def test_bytes_of_any_name_are_offered_no_command(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        look(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_foreign_files_among_others_are_named(tmp_path):
    (tmp_path / "a.mid").write_bytes(b"MThd" + bytes(20))
    (tmp_path / "b.mid").write_bytes(NOISE)
    lines = look(str(tmp_path))
    assert any(line.startswith("1 file left out, as no MIDI file begins so: ") and "b.mid" in line for line in lines)
    assert command(lines, "train").data.on_error == "skip"
    for name, content in (("a.txt", b"a text"), ("b.txt", NOISE)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    assert any(line.startswith("not in UTF-8: ") and "b.txt" in line for line in look(str(tmp_path / "texts")))
