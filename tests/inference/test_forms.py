"""Every form of data that training reads is read for predictions, too: a damaged row costs itself and is named."""

import base64
import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.data.images import decode_image
from perceiver.data.midi import encode, read_midi, write_midi
from perceiver.inference.frames import FRAMES
from perceiver.inference.joined import join
from perceiver.inference.parts import from_plain, list_inputs, plan_parts, read_part, to_plain
from perceiver.inference.predict import PredictOptions, predict_rows
from perceiver.inference.rows import Row, rows_from_table, rows_to_table
from perceiver.inference.trained import TrainedModel
from perceiver.models import build_model
from perceiver.presets import PRESETS
from tests.support.flow_files import chairs, sintel, write_image
from tests.support.preparing import write_idx
from tests.tasks.test_symbolic_audio import performance


def read(*inputs: Path, kind="image", column: str | None = None, rows_per_part: int = 2, encoding: str = "utf-8", arrays=None) -> list[Row]:
    """All rows through the steps that the command takes them."""
    parts = plan_parts(list_inputs([str(each) for each in inputs], kind), rows_per_part, column or kind, None, arrays, kind, encoding)
    parts = from_plain(json.loads(json.dumps(to_plain(parts))))
    assert all(part.rows <= rows_per_part or rows_per_part == 2 for part in parts)
    rows = [row for part in parts for row in read_part(part, kind, column or kind, None, arrays)]
    return rows_from_table(rows_to_table(rows, arrays), kind, arrays)


def png(value: int, size: int = 6) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def values(rows: list[Row]) -> list[int]:
    return [int(decode_image(row.value)[0, 0, 0]) for row in rows]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path) -> Path:
    examples = [(f"{i:03d}", png(10 * i)) for i in range(5)]
    return write_tar(path, [(f"{key}{end}", data) for key, image in examples for end, data in ((".cls", b"1"), (".png", image))])


@pytest.mark.parametrize("rows_per_part", [1, 2, 9])
def test_pictures_of_a_tar_file_are_rows_however_it_is_cut(tmp_path: Path, rows_per_part: int) -> None:
    rows = read(shard(tmp_path / "a.tar"), rows_per_part=rows_per_part)
    assert [row.id for row in rows] == [f"a.tar/{i:03d}.png" for i in range(5)]
    assert values(rows) == [0, 10, 20, 30, 40]


def test_what_follows_a_tar_s_damage_is_one_row_that_says_so(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:3000])  # in the second example
    *good, bad = read(tmp_path / "a.tar")
    assert values(good) == [0] and bad.error is not None and "is no readable .tar file after 000.png" in bad.error
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    assert "is no readable .tar file" in read(tmp_path / "b.tar")[0].error  # type: ignore[operator]
    with pytest.raises(UserError, match=r"c.tar holds no sounds"):
        (tmp_path / "c.tar").write_bytes(whole)
        read(tmp_path / "c.tar", kind="audio")


def test_images_of_an_idx_file_are_rows(tmp_path: Path) -> None:
    write_idx(tmp_path, "t10k", 5, seed=1)
    expected = np.random.default_rng(1).integers(0, 256, (5, 28, 28), np.uint8)
    rows = read(tmp_path)
    np.testing.assert_array_equal(np.stack([decode_image(row.value)[..., 0] for row in rows]), expected)
    assert [row.id for row in rows] == [f"t10k-images-idx3-ubyte:{i}" for i in range(5)], "the labels are no images"


def test_tables_name_pictures_by_path_or_hold_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(50 * i))
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "who"], *([f"in/{i}.png", "x"] for i in range(3)), ["in/9.png", "y"], ["", "z"]])
    rows = read(tmp_path / "list.csv")
    assert values(rows[:3]) == [0, 50, 100]
    assert "names 'in/9.png', which cannot be read" in rows[3].error  # type: ignore[operator]
    assert "'image' is missing or null, not the bytes of an image or its path" in rows[4].error  # type: ignore[operator]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"image": f"in/{i}.png"}) + "\n" for i in range(3)))
    assert values(read(tmp_path / "list.jsonl")) == [0, 50, 100]
    held = [{"bytes": png(7), "path": None}, {"bytes": None, "path": "in/1.png"}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": held}), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert values(rows[:2]) == [7, 50] and rows[2].error is not None
    pq.write_table(pa.table({"photo": [str(tmp_path / "in" / "2.png")]}), tmp_path / "own.parquet")
    assert values(read(tmp_path / "own.parquet", column="photo")) == [100]
    with pytest.raises(UserError, match="has no column 'image' or 'file_name' or"):
        read(tmp_path / "own.parquet")


def test_a_folder_of_save_to_disk_has_its_rows_alone(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "one")
    assert [row.value for row in read(tmp_path / "one", kind="text")] == ["a", "b", "c"]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["d"]})}).save_to_disk(tmp_path / "dict")
    assert [row.value for row in read(tmp_path / "dict", kind="text")] == ["d"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.csv.gz"])
def test_text_of_other_encodings_is_read_with_its_name(tmp_path: Path, name: str, encoding: str) -> None:
    import gzip

    texts = [f"für {i}" for i in range(5)]
    content = {
        ".txt": "\n".join(texts),
        ".jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
        ".json": json.dumps([{"text": text} for text in texts], ensure_ascii=False),
        ".csv": "text\n" + "\n".join(texts),
    }["." + name.split(".")[1]].encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row.value for row in read(tmp_path / name, kind="text", encoding=encoding)] == texts
    if encoding == "utf-16":
        with pytest.raises(UserError, match=r"is UTF-16 .*give --data.encoding utf-16"):
            read(tmp_path / name, kind="text")
    elif name.endswith((".txt", ".jsonl")):
        assert "not UTF-8: byte 0xfc (--data.encoding names another" in read(tmp_path / name, kind="text")[0].error  # type: ignore[operator]


def test_pairs_of_frames_are_those_of_their_flow(tmp_path: Path) -> None:
    chairs(tmp_path / "chairs", 2)
    assert [row.id for row in read(tmp_path / "chairs", kind="frames", arrays=FRAMES)] == ["00001_img1.ppm", "00002_img1.ppm"]
    sintel(tmp_path / "sintel", frames=3)
    write_image(tmp_path / "sintel/training/occlusions/alley_1/frame_0001.png", np.zeros((4, 4, 3), np.uint8))
    write_image(tmp_path / "sintel/training/occlusions/alley_1/frame_0002.png", np.zeros((4, 4, 3), np.uint8))
    ids = [row.id for row in read(tmp_path / "sintel", kind="frames", arrays=FRAMES)]
    assert ids and not any("occlusions" in identity for identity in ids)
    (tmp_path / "chairs" / "00002_img2.ppm").write_bytes(b"cut")
    assert len(read(tmp_path / "chairs", kind="frames", arrays=FRAMES)) == 2


def test_midi_files_are_continued_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    from dataclasses import replace

    folder = tmp_path / "new"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.mid").write_bytes(write_midi(encode(performance(i))))
    (folder / "2.mid").write_bytes(b"MThd")
    (folder / "list.csv").write_text("midi_filename,split\n0.mid,train\n")
    rows = read(folder, kind="midi")
    assert [row.id for row in rows] == ["0.mid", "1.mid", "2.mid"], "a table beside them is none of rows"
    base = PRESETS["sam-small"]()
    model = replace(base.model, num_channels=16, num_heads=2, num_self_attention_layers=1, max_seq_len=64, max_latents=8)
    trained = TrainedModel(model=build_model(model, 0).eval(), config=model, task=base.task, data=base.data)
    said = predict_rows(trained, rows, PredictOptions(mode="play", max_new_tokens=5, seed=3))
    assert said["error"].to_pylist()[:2] == [None, None] and "the prompt" in said["error"][2].as_py()
    alone = predict_rows(trained, rows[1:2], PredictOptions(mode="play", max_new_tokens=5, seed=3))
    assert alone["midi"][0] == said["midi"][1], "a row's draws do not depend on the others"
    assert len(read_midi(said["midi"][0].as_py())) > 0 and said["notes"][0].as_py() > 0
    pq.write_table(said, tmp_path / "part.parquet")
    join(str(tmp_path), ["part.parquet"], str(tmp_path / "said.jsonl"))
    first = json.loads((tmp_path / "said.jsonl").read_text().splitlines()[0])
    assert base64.b64decode(first["midi"]) == said["midi"][0].as_py()


@pytest.mark.parametrize(("kind", "wrong"), [("image", "a.mid"), ("midi", "a.png"), ("audio", "a.png"), ("text", "a.wav")])
def test_a_file_of_another_kind_is_a_row_that_says_so(tmp_path: Path, kind: str, wrong: str) -> None:
    (tmp_path / wrong).write_bytes(b"x")
    (row,) = read(tmp_path / wrong, kind=kind)
    assert row.error is not None and " is no " in row.error
