"""Rows with the content of another one: kept, left out, or refused, whatever they are rows of and however the input is cut."""

from pathlib import Path

import numpy as np
import pytest

from perceiver.config import UserError
from perceiver.data.duplicates import _again
from perceiver.datasets import data_folder
from ray_jobs import preprocess
from ray_jobs.cli import parse_experiment
from tests.support import preparing
from tests.support.logged import logged
from tests.support.preparing import content, rows_of, stream_of, write_jsonl


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    preparing.serially(monkeypatch)


def reviews(folder: Path) -> Path:
    """Twelve for training of which three are the second of their kind and one is that of validation, too; validation has one twice."""
    folder.mkdir()
    names = ["a", "b", "a", "c", "", "", "d", "e", "f", "v", "b", "a"]
    write_jsonl(folder / "train.jsonl", [{"text": name and f"text {name}", "label": i % 2} for i, name in enumerate(names)])
    write_jsonl(folder / "val.jsonl", [{"text": f"text {name}", "label": 0} for name in ("v", "w", "w")])
    return folder


def chosen_of(preset: str, out: Path, source: Path, *words: str):
    given = ["--data.source", str(source), "--data.root", str(out), "--data.rows-per-block", "4", "--data.blocks-per-shard", "2"]
    return parse_experiment([preset, *given, *words], "ray_jobs.train")


def texts_of(chosen, manifest, split) -> list[str]:
    rows = rows_of(data_folder(chosen), manifest, split)
    return [bytes(np.array(ids, np.uint8) - 6).decode() for ids in rows["tokens"].to_pylist()]


def test_of_equal_texts_one_stays_and_that_is_the_one_for_validation(tmp_path):
    source, results = reviews(tmp_path / "in"), []
    for piece in (1, 60, 1 << 20):
        chosen = chosen_of("txt-clf", tmp_path / f"out{piece}", source, "--data.duplicates", "skip")
        with logged() as lines:
            manifest = preprocess.prepare(chosen, piece)
        results.append(content(data_folder(chosen)))
    assert all(result == results[0] for result in results), "however the input is cut"
    assert texts_of(chosen, manifest, "train") == ["text a", "text b", "text c", "", "", "text d", "text e", "text f"]
    assert texts_of(chosen, manifest, "val") == ["text v", "text w"]
    assert manifest.stats["duplicates"] == {"train": 4, "val": 1} and manifest.stats["shared_documents"] == 0
    assert any("duplicates: 4 train and 1 val" in line and line.endswith("are left out") for line in lines)


def test_they_are_kept_unless_told_and_the_choice_is_named(tmp_path):
    chosen = chosen_of("txt-clf", tmp_path / "out", reviews(tmp_path / "in"))
    with logged() as lines:
        manifest = preprocess.prepare(chosen)
    assert manifest.splits["train"].rows == 12 and manifest.stats["shared_documents"] == 1 and "duplicates" not in manifest.settings
    assert any("1 of the 3 validation" in line and "(--data.duplicates skip leaves them out)" in line for line in lines)


def test_they_are_refused_with_their_number_and_files(tmp_path):
    chosen = chosen_of("txt-clf", tmp_path / "out", reviews(tmp_path / "in"), "--data.duplicates", "refuse")
    message = r"in has 5 rows with the content of another one, 1 of them for training that of one for validation \(such as two of in/train"
    with pytest.raises(UserError, match=message):
        preprocess.prepare(chosen)
    assert not list((tmp_path / "out").glob("*manifest*")) and not list((tmp_path / "out").glob(".staging*"))
    write_jsonl(tmp_path / "in" / "train.jsonl", [{"text": f"other {i}", "label": i % 2} for i in range(4)])
    write_jsonl(tmp_path / "in" / "val.jsonl", [{"text": "text v", "label": 0}])
    assert preprocess.prepare(chosen).splits["train"].rows == 4


@pytest.mark.parametrize("preset", ["img-clf", "tables", "clm-wikitext-small"])
def test_held_out_rows_of_each_kind_are_without_duplicates(preset, tmp_path):
    from PIL import Image

    source = tmp_path / "in"
    source.mkdir()
    more = []
    if preset == "img-clf":
        for i in range(40):
            (source / "ab"[i % 2]).mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8), i // 4 * 10 + i % 2, np.uint8)).save(source / "ab"[i % 2] / f"{i}.png")
    elif preset == "tables":
        rows = "".join(f"{i // 2},{i // 2 * 1.5}\n" for i in range(40))
        (source / "rows.csv").write_text(f"x,y\n{rows}")
        more = ["--task.targets", "y"]
    else:
        write_jsonl(source / "rows.jsonl", [{"text": f"text {i // 2}"} for i in range(40)])
    chosen = chosen_of(preset, tmp_path / "out", source, "--data.val-fraction", "0.25", "--data.duplicates", "skip", *more)
    manifest = preprocess.prepare(chosen)
    assert sum(manifest.stats["duplicates"].values()) == 20
    if preset == "clm-wikitext-small":
        found = [bytes((stream_of(data_folder(chosen), manifest, name) - 6).astype(np.uint8)) for name in ("train", "val")]
        assert sum(text.count(b"text") for text in found) == sum(split.documents for split in manifest.splits.values()) == 20
    else:
        assert sum(split.rows for split in manifest.splits.values()) == 20


def test_the_first_of_equal_rows_stays():
    hashes = np.array([5, 7, 5, 5, 9, 7, 1, 1], np.uint64)
    marks = np.array([1, 1, 0, 1, 1, 1, 2, 2], np.uint64)
    again, firsts = _again(hashes, marks)
    assert again.tolist() == [0, 3, 5] and firsts.tolist() == [2, 2, 1]
