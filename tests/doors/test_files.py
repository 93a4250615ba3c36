"""Files with random damage at the doors that read them: refused as a mistake of the user's, or read; nothing else."""

import json
import os
import random
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import perceiver
from perceiver.config import UserError
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from ray_jobs import preprocess
from tests.support import preparing
from tests.support.preparing import experiment, load_prepared, texts, write_idx, write_jsonl, write_parquet
from tests.support.small import write_images
from tests.support.trained import write_run

FEW = settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
CORPUS = Path(__file__).parent.parent / "support" / "files" / "damaged"
"""Small files, each damaged in its own way."""
ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(texts(20))]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, or puts something foreign into bytes."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(damaged) or 1)
        match rng.randrange(5):
            case 0 if damaged:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                del damaged[at:]
            case 2:
                damaged[at:at] = damaged[: rng.randrange(40)]
            case 3:
                damaged[at:at] = rng.choice([b"\0" * 9, b"\n", b"[" * 200, b"\xff\xfe", b"NaN", b'{"a":', b"9" * 400, b"../../x"])
            case _:
                damaged[at : at + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4])
    return bytes(damaged)


def write(folder: Path, kind: str) -> Path:
    """Good data of a kind; the file of it that is then damaged."""
    folder.mkdir(parents=True)
    if kind == "idx":
        write_idx(folder, "train", 12)
        write_idx(folder, "t10k", 4)
        return folder / "train-images-idx3-ubyte"
    if kind == "pictures":
        for split in ("train", "test"):
            for label in ("0", "1"):
                (folder / split / label).mkdir(parents=True)
                for number in range(3):
                    pixels = np.full((28, 28), number, np.uint8)
                    Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
        return folder / "train" / "0" / "0.png"
    (write_jsonl if kind == "jsonl" else write_parquet)(folder / f"train.{kind}", ROWS)
    (write_jsonl if kind == "jsonl" else write_parquet)(folder / f"test.{kind}", ROWS[:8])
    return folder / f"train.{kind}"


def prepare(source: Path, out: Path, kind: str) -> None:
    """Prepares data and reads it again, or raises UserError."""
    preset = "img-clf-mnist" if kind in ("idx", "pictures") else "txt-clf-imdb-all"
    chosen = experiment(preset, out, source, length=20)
    preprocess.prepare(chosen)
    load_prepared(chosen)


@contextmanager
def without_ray():
    with pytest.MonkeyPatch.context() as patch:
        preparing.serially(patch)
        yield


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "idx", "pictures"])
def test_damaged_data_is_refused_or_read(kind, tmp_path):
    good = write(tmp_path / "good", kind)
    content = good.read_bytes()

    @FEW
    @given(st.integers(0, 2**32))
    def holds(seed):
        for name in ("in", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "in")
        (tmp_path / "in" / good.relative_to(tmp_path / "good")).write_bytes(mutate(content, random.Random(seed)))
        try:
            prepare(tmp_path / "in", tmp_path / "out", kind)
        except UserError as error:
            assert str(error).strip()

    with without_ray():
        holds()


def test_damaged_runs_are_refused_or_their_weights_are_the_same(tmp_path):
    """Every file of a run, damaged: `load` and `runs` refuse it, or what they give is what was saved."""
    good = write_run(tmp_path / "good", "images")
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    expected = {name: tensor.clone() for name, tensor in perceiver.load(good, "last").model.state_dict().items()}

    @settings(FEW, max_examples=40)
    @given(st.sampled_from(files), st.integers(0, 2**32))
    def holds(name, seed):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)
        (run / name).write_bytes(mutate((good / name).read_bytes(), random.Random(seed)))
        try:
            Run(run).load()
            found = perceiver.load(run, "last").model.state_dict()
        except UserError as error:
            assert str(error).strip()
            return
        if found.keys() == expected.keys() and all(found[key].shape == expected[key].shape for key in expected):
            assert all(found[key].equal(expected[key]) for key in expected)

    holds()


def test_the_corpus_of_damaged_files_is_refused_or_read(tmp_path):
    """Files that once ended a preparation with a traceback, or may end the next one."""
    names = sorted(path.name for path in CORPUS.iterdir() if path.name != "README.md")
    assert len(names) >= 10
    with without_ray():
        for name in names:
            kind = {".jsonl": "jsonl", ".gz": "jsonl", ".parquet": "parquet", ".png": "pictures"}.get(Path(name).suffix, "idx")
            target = write(tmp_path / name / "in", kind)
            if name.endswith(".gz"):
                target.unlink()
                target = target.with_name("train.jsonl.gz")
            target.write_bytes((CORPUS / name).read_bytes())
            try:
                prepare(tmp_path / name / "in", tmp_path / name / "out", kind)
            except UserError as error:
                assert str(error).strip()


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "{}", "[" * 5000, '{"experiment": []}', '{"experiment": {"type": 3}}', "", "{"])
def test_a_run_whose_experiment_is_of_another_shape_is_refused(text, tmp_path):
    run = write_run(tmp_path / "run", "images")
    (run / "experiment.json").write_text(text)
    with pytest.raises(UserError):
        perceiver.load(run)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "link.safetensors"])
def test_a_marker_reads_no_file_outside_of_its_checkpoint(name, tmp_path):
    run = write_run(tmp_path / "run", "images")
    (checkpoint,) = (run / "checkpoints").iterdir()
    marker = json.loads((checkpoint / "checkpoint.json").read_text())
    (own,) = marker["files"]
    outside = run / "checkpoints" / "outside.safetensors"
    os.replace(checkpoint / own, outside)
    if name == "link.safetensors":
        os.symlink(outside, checkpoint / name)
        name = "missing.safetensors"
    marker["files"] = {name: marker["files"][own]}
    (checkpoint / "checkpoint.json").write_text(json.dumps(marker))
    with pytest.raises(UserError):
        perceiver.load(run)


@pytest.mark.parametrize("name", ["../outside.parquet", "/etc/passwd", "a/../../outside.parquet", ""])
def test_a_manifest_reads_no_file_outside_of_its_folder(name, tmp_path):
    manifest = write_images(tmp_path / "data")
    split = manifest.splits["train"]
    os.replace(tmp_path / "data" / split.shards[0].file, tmp_path / "outside.parquet")
    shards = (replace(split.shards[0], file=name), *split.shards[1:])
    replace(manifest, splits={**manifest.splits, "train": replace(split, shards=shards)}).save(tmp_path / "data")
    with pytest.raises(UserError, match="the shards of its split train do not have"):
        Manifest.load(tmp_path / "data")
