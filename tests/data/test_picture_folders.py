"""Folders of pictures, tables beside them and .tar files: classes, splits, sizes, and what cannot be read."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.data.columns import fixed_array
from perceiver.data.shards import read_block
from perceiver.datasets import Dataset, data_folder
from ray_jobs.cli import parse_experiment
from ray_jobs.preprocess import prepare
from tests.support.preparing import serially

COLOURS = {"red": (250, 10, 10), "blue": (10, 10, 250)}


def picture(path: Path, colour: str, number: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    """A picture of one colour, all of them different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, COLOURS[colour])
    image.putpixel((0, 0), (number % 256, number // 256, 7))
    image.save(path)


def split_folder(folder: Path) -> Path:
    for split, number in (("train", 6), ("val", 3)):
        for colour in COLOURS:
            for i in range(number):
                picture(folder / split / colour / f"{i}.png", colour, i + 100 * (split == "val"))
    return folder


def prepared(tmp_path, source, monkeypatch, *words, preset="img-clf"):
    serially(monkeypatch)
    given = [preset, "--data.source", str(source), "--data.root", str(tmp_path / "data"), *words]
    chosen = parse_experiment(given, "ray_jobs.preprocess")
    return chosen, prepare(chosen)


def rows(chosen, manifest, split):
    """Pictures (n, height, width, channels) and labels (n,) of a split."""
    part = manifest.splits[split]
    blocks = [read_block(data_folder(chosen), part, block) for block in range(part.num_blocks)]
    images = np.concatenate([fixed_array(block, "image").reshape(-1, *manifest.image_shape) for block in blocks])
    return images, np.concatenate([block["label"].to_numpy() for block in blocks])


def test_folders_are_classes_and_splits(tmp_path, monkeypatch):
    chosen, manifest = prepared(tmp_path, split_folder(tmp_path / "in"), monkeypatch)
    assert chosen.task.class_names == ("blue", "red") and chosen.model.output.num_classes == 2
    assert chosen.model.input.image_shape == (8, 8, 3) == manifest.image_shape
    assert manifest.stats["labels"] == {"train": [6, 6], "val": [3, 3]}
    images, labels = rows(chosen, manifest, "val")
    assert [COLOURS["blue"], COLOURS["red"]] == [tuple(images[labels == n][0, 4, 4]) for n in (0, 1)]


def test_a_class_may_be_called_train(tmp_path, monkeypatch):
    for i in range(40):
        picture(tmp_path / "in" / "train" / f"{i}.png", "red", i)
        picture(tmp_path / "in" / "plane" / f"{i}.png", "blue", i)
    chosen, _ = prepared(tmp_path, tmp_path / "in", monkeypatch)
    assert chosen.task.class_names == ("plane", "train")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_beside_the_pictures_says_their_classes(name, tmp_path, monkeypatch):
    table = []
    for i in range(40):
        colour = "red" if i % 2 else "blue"
        picture(tmp_path / "in" / "all" / f"{i}.png", colour, i)
        table.append({"file_name": f"all/{i}.png", "label": i % 2 + 3, "split": "validation" if i < 8 else "train"})
    lines = (
        ["file_name,label,split", *(",".join(map(str, row.values())) for row in table)] if name.endswith("csv") else map(json.dumps, table)
    )
    (tmp_path / "in" / name).write_text("\n".join(lines))
    chosen, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch)
    assert chosen.task.class_names == ("3", "4") and manifest.stats["labels"] == {"train": [16, 16], "val": [4, 4]}
    again, _ = prepared(tmp_path, tmp_path / "in" / name, monkeypatch)
    assert again.task.class_names == ("3", "4")


def test_a_tar_file_holds_pictures_beside_their_classes(tmp_path, monkeypatch):
    for split, number in (("train", 10), ("val", 4)):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as archive:
            for i in range(number):
                content = io.BytesIO()
                Image.new("L", (6, 5), i * 9 + (split == "val")).save(content, "PNG")
                for ending, data in (("png", content.getvalue()), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (tmp_path / "in").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}-0.tar").rename(tmp_path / "in" / f"{split}-0.tar")
    chosen, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch)
    assert chosen.model.input.image_shape == (5, 6, 1) and manifest.stats["labels"] == {"train": [5, 5], "val": [2, 2]}
    images, labels = rows(chosen, manifest, "train")
    assert images[3, 0, 0, 0] == 27 and labels[3] == 1


def test_pictures_of_several_sizes_are_scaled_and_their_middle_kept(tmp_path, monkeypatch):
    for i in range(6):
        for split in ("train", "val"):
            for colour in COLOURS:
                picture(tmp_path / "in" / split / colour / f"{i}.png", colour, i + 50 * (split == "val"), size=(20 + i, 16))
    middle = Image.new("RGB", (48, 16), COLOURS["red"])
    middle.paste(COLOURS["blue"], (16, 0, 32, 16))
    middle.save(tmp_path / "in" / "val" / "blue" / "z.png")
    chosen, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch)
    assert chosen.data.image_size == 16 and manifest.image_shape == (16, 16, 3) == chosen.model.input.image_shape
    images, labels = rows(chosen, manifest, "val")
    assert (images[labels == 0][-1][8, 2:14] == COLOURS["blue"]).all()
    smaller, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch, "--data.image-size", "4")
    assert manifest.image_shape == (4, 4, 3) == smaller.model.input.image_shape


def test_pictures_of_every_mode_are_read(tmp_path, monkeypatch):
    folder = split_folder(tmp_path / "in") / "val" / "red"
    for path in folder.iterdir():
        path.unlink()
    red = Image.new("RGB", (8, 8), COLOURS["red"])
    red.convert("CMYK").save(folder / "a.jpg", quality=100)
    red.convert("RGBA").save(folder / "b.png")
    red.quantize(2).save(folder / "c.gif", save_all=True, append_images=[Image.new("P", (8, 8))])
    Image.fromarray(np.full((8, 8), 0xFA00, np.uint16)).save(folder / "d.png")
    red.convert("L").save(folder / "e.png")
    chosen, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch)
    images, labels = rows(chosen, manifest, "val")
    for image in images[labels == 1][:3]:
        assert np.abs(image.astype(int) - COLOURS["red"]).max() <= 12
    assert (images[labels == 1][3] == 0xFA).all() and len(set(images[labels == 1][4][0, 0])) == 1


def test_a_broken_picture_is_named_or_skipped(tmp_path, monkeypatch):
    folder = split_folder(tmp_path / "in")
    (folder / "train" / "red" / "5.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"in/train/red/5\.png: it is no image file"):
        prepared(tmp_path, folder, monkeypatch)
    _, manifest = prepared(tmp_path, folder, monkeypatch, "--data.on-error", "skip")
    assert manifest.stats["skipped"] == {"bad image": 1} and manifest.stats["labels"]["train"] == [6, 5]


def test_pictures_without_classes_are_refused(tmp_path, monkeypatch):
    picture(tmp_path / "in" / "1.png", "red")
    with pytest.raises(UserError, match="pictures without a class, such as 1.png: put those of each class into a folder"):
        prepared(tmp_path, tmp_path / "in", monkeypatch)


def test_class_names_choose_and_order(tmp_path, monkeypatch):
    folder = split_folder(tmp_path / "in")
    picture(folder / "train" / "green" / "1.png", "red", 77)
    first, manifest = prepared(tmp_path, folder, monkeypatch, "--task.class-names", "red", "blue")
    assert first.task.class_names == ("red", "blue") and first.task.leave_out == ("green",)
    assert manifest.stats["skipped"] == {"class left out": 1}, "which is no fault"
    images, labels = rows(first, manifest, "val")
    assert tuple(images[labels == 0][0, 4, 4]) == COLOURS["red"]
    picture(folder / "val" / "pink" / "1.png", "red", 78)
    with pytest.raises(UserError, match=r"in/val/pink/1\.png: label 'pink' must be .*red, blue"):
        prepared(tmp_path / "again", folder, monkeypatch, "--task.class-names", "red", "blue")
    second = replace(first, task=replace(first.task, class_names=("blue", "red")))
    assert data_folder(second) != data_folder(first)
    with pytest.raises(UserError, match="--task.class-names has 'pink', which no training label is .*blue"):
        prepared(tmp_path, folder, monkeypatch, "--task.class-names", "red", "pink")


def test_a_class_that_validation_alone_has_is_named(tmp_path, monkeypatch):
    folder = split_folder(tmp_path / "in")
    picture(folder / "val" / "green" / "1.png", "red", 77)
    with pytest.raises(UserError, match=r"in/val/green/1\.png: label 'green' must be .*blue, red"):
        prepared(tmp_path, folder, monkeypatch)


def test_the_same_picture_in_training_and_validation_is_counted(tmp_path, monkeypatch):
    folder = split_folder(tmp_path / "in")
    (folder / "val" / "red" / "same.png").write_bytes((folder / "train" / "red" / "1.png").read_bytes())
    _, manifest = prepared(tmp_path, folder, monkeypatch)
    assert manifest.stats["shared_documents"] == 1


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a"], ("a", "b")),
        (["5", "1", "10"], ("1", "5", "10")),
        ([3, 1, True], ("1", "3")),
        ([2.0, 0.0], ("0", "2")),
    ],
)
def test_labels_of_tables_become_classes_in_order(labels, names, tmp_path, monkeypatch):
    serially(monkeypatch)
    for split in ("train", "val"):
        lines = [json.dumps({"text": f"{split} {i}", "label": labels[i % len(labels)]}) for i in range(12)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    words = ["txt-clf", "--data.source", str(tmp_path / "train.jsonl"), "--data.val-source", str(tmp_path / "val.jsonl")]
    chosen = parse_experiment([*words, "--data.root", str(tmp_path / "data")], "ray_jobs.preprocess")
    assert chosen.task.class_names == names
    counts = prepare(chosen).stats["labels"]["val"]
    texts = [str(int(label)) if not isinstance(label, str) else label for label in labels]
    assert counts == [sum(texts[i % len(labels)] == name for i in range(12)) for name in names]


def test_quantities_are_no_classes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 3.7}\n{"text": "b", "label": 1}')
    with pytest.raises(UserError, match="label 3.7 in --data.label-column label, and classes are whole numbers or names: for quantities"):
        parse_experiment(["txt-clf", "--data.source", str(tmp_path / "a.jsonl")], "ray_jobs.preprocess")


def test_a_training_prepares_pictures_in_files_by_itself_and_no_named_data_set(tmp_path, monkeypatch):
    source = split_folder(tmp_path / "in")
    serially(monkeypatch)
    chosen = parse_experiment(["img-clf", "--data.source", str(source), "--data.root", str(tmp_path)], "ray_jobs.train")
    assert Dataset.find_early(chosen) is None
    manifest = prepare(chosen)
    found = Dataset.find_early(chosen)
    assert found is not None and found.manifest == manifest
    named = parse_experiment(["img-clf-mnist", "--data.root", str(tmp_path)], "ray_jobs.train")
    with pytest.raises(UserError, match="is not prepared: run `perceiver preprocess img-clf-mnist"):
        Dataset.find_early(named)


def test_a_training_prepares_a_table_of_texts_by_itself(tmp_path, monkeypatch):
    serially(monkeypatch)
    (tmp_path / "reviews.csv").write_text("review,stars\n" + "".join(f"text {i},{i % 5 + 1}\n" for i in range(60)))
    words = ["--data.source", str(tmp_path / "reviews.csv"), "--data.text-column", "review", "--data.label-column", "stars"]
    chosen = parse_experiment(["txt-clf", *words, "--data.root", str(tmp_path / "data")], "ray_jobs.train")
    assert Dataset.find_early(chosen) is None
    manifest = prepare(chosen)
    found = Dataset.find_early(chosen)
    assert found is not None and found.manifest == manifest and manifest.stats["labels"]["val"] == [1] * 5


@pytest.mark.parametrize("preset", ["img-clf", "txt-clf", "clm-wikitext", "clm-wikitext --data.prepare stream"])
@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.jsonl", "empty"])
def test_a_source_that_is_not_there_is_answered_by_that_before_anything_starts(source, preset, tmp_path):
    (tmp_path / "empty").mkdir()
    words = [*preset.split(), "--data.source", f"{tmp_path}/{source}", "--data.root", str(tmp_path / "out")]
    with pytest.raises(UserError, match="data.source .* (does not exist|matches no file|is a folder without files)"):
        Dataset.find_early(parse_experiment(words, "ray_jobs.train"))


@pytest.mark.parametrize("named", [True, False])
def test_a_task_without_classes_takes_pictures_with_whatever_labels_they_have(named, tmp_path, monkeypatch):
    for label in ("red", "blue") if named else ("3", "11"):
        for i in range(12):
            picture(tmp_path / "in" / label / f"{i}.png", "red", i + 20 * len(label))
    words = ["--task.image-shape", "8", "8", "3", "--model.max-seq-len", "192", "--model.max-latents", "64", "--data.val-fraction", "0.2"]
    _, manifest = prepared(tmp_path, tmp_path / "in", monkeypatch, *words, preset="img-ar-imagenet64")
    assert manifest.image_shape == (8, 8, 3) and manifest.splits["train"].rows + manifest.splits["val"].rows == 24
