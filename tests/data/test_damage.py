"""Damaged prepared data: found when a job begins or when it is read, named, and prepared again; never other content."""

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from perceiver.data import shards
from perceiver.data.manifest import MANIFEST, DamagedData, Manifest, Shard
from perceiver.data.shards import describe_shard, read_block
from ray_jobs import preprocess
from tests.support import preparing
from tests.support.logged import logged
from tests.support.preparing import content, experiment, load_prepared, texts, write_idx, write_jsonl
from tests.support.small import write_images, write_stream

FLIPS = 300


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    preparing.serially(monkeypatch)


def prepared(tmp_path: Path, kind: str):
    """A small data set that was prepared: its experiment, folder and manifest."""
    if kind == "images":
        write_idx(tmp_path / "in", "train", 20)
        write_idx(tmp_path / "in", "t10k", 5, seed=1)
        chosen = experiment("img-clf-mnist", tmp_path / "out", tmp_path / "in")
    else:
        (tmp_path / "in").mkdir()
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts(80))]
        write_jsonl(tmp_path / "in" / "train.jsonl", rows)
        write_jsonl(tmp_path / "in" / "test.jsonl", rows[:20])
        preset = "clm-wikitext" if kind == "tokens" else "txt-clf-imdb-all"
        chosen = experiment(preset, tmp_path / "out", tmp_path / "in", length=20)
    preprocess.prepare(chosen)
    return chosen, *load_prepared(chosen)


def first_blocks(folder: str, manifest: Manifest) -> list:
    shards._metadata.cache_clear()
    split = manifest.splits["train"]
    return [read_block(folder, split, block) for block in range(split.blocks_per_shard)]


@pytest.mark.parametrize("kind", ["images", "tokens", "documents"])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_when_it_is_read(tmp_path, kind):
    _, folder, manifest = prepared(tmp_path, kind)
    expected = first_blocks(folder, manifest)
    shard = Path(folder) / "train-00000.parquet"
    whole, rng = shard.read_bytes(), np.random.default_rng(0)
    outcomes = {"same": 0, "named": 0, "other": 0}
    # Random bits, and those at the seams: row groups' edges, page headers, the footer's begin and end.
    places = [*rng.integers(0, 8 * len(whole), FLIPS), *range(0, 8 * 64), *range(8 * (len(whole) - 32), 8 * len(whole))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        shard.write_bytes(damaged)
        try:
            outcomes["same" if first_blocks(folder, manifest) == expected else "other"] += 1
        except DamagedData as error:
            assert str(shard) in str(error)
            outcomes["named"] += 1
    # Parquet's mark in the first four bytes tells nothing.
    assert outcomes["other"] == 0 and outcomes["same"] <= 40 and outcomes["named"] > 0.9 * len(places), outcomes


def test_damage_is_found_when_a_job_begins_and_is_repaired_by_preparing_again(tmp_path):
    chosen, folder, _ = prepared(tmp_path, "tokens")
    expected = content(folder)
    shard = Path(folder) / "val-00000.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"val-00000.parquet is missing or damaged: run `perceiver preprocess"):
        load_prepared(chosen)
    preprocess.prepare(chosen)
    assert content(folder) == expected


def test_of_large_data_only_sizes_are_looked_at_first(tmp_path, monkeypatch):
    chosen, folder, manifest = prepared(tmp_path, "tokens")
    monkeypatch.setattr(shards, "CHECKED_BYTES", 1)
    shard = Path(folder) / "train-00000.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    load_prepared(chosen)
    with pytest.raises(DamagedData, match="train-00000.parquet is damaged"):
        first_blocks(folder, manifest)
    shard.write_bytes(damaged[:-1])
    with pytest.raises(UserError, match="train-00000.parquet is missing or damaged"):
        load_prepared(chosen)


def test_missing_and_exchanged_shards_are_named(tmp_path):
    _, folder, manifest = prepared(tmp_path, "tokens")
    first, second = Path(folder) / "train-00000.parquet", Path(folder) / "train-00001.parquet"
    first.write_bytes(second.read_bytes())
    with pytest.raises(DamagedData, match="train-00000.parquet is damaged"):
        first_blocks(folder, manifest)
    first.unlink()
    with pytest.raises(DamagedData, match="train-00000.parquet is missing"):
        first_blocks(folder, manifest)


def edited(text: str, change) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


MANIFESTS = {
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "nested": lambda text: "[" * 100_000,
    "rows": lambda text: edited(text, lambda data: data["splits"]["train"].update(rows=5)),
    "rows of a block": lambda text: edited(text, lambda data: data["splits"]["train"].update(rows_per_block=8)),
    "version": lambda text: text.replace('"format_version": 1', '"format_version": 3'),
    "a hash": lambda text: edited(text, lambda data: data["splits"]["val"]["shards"][0].update(sha256="0" * 64)),
    "no digest, rows": lambda text: edited(text, lambda data: (data.pop("digest"), data["splits"]["train"].update(rows=5))),
    "no digest, blocks": lambda text: edited(text, lambda data: (data.pop("digest"), data["splits"]["train"].update(rows_per_block=8))),
    "no digest, a path": lambda text: edited(
        text, lambda data: (data.pop("digest"), data["splits"]["train"]["shards"][0].update(file="../x.parquet"))
    ),
    "no digest, types": lambda text: edited(text, lambda data: (data.pop("digest"), data["splits"]["train"].update(rows="many"))),
    "no digest, keys": lambda text: edited(text, lambda data: (data.pop("digest"), data["splits"]["train"].pop("rows"))),
    "no digest, splits": lambda text: edited(text, lambda data: (data.pop("digest"), data.update(splits=[1]))),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest_stops_training_with_the_command_that_repairs_it(tmp_path, name):
    chosen, folder, _ = prepared(tmp_path, "tokens")
    expected = content(folder)
    path = Path(folder) / MANIFEST
    path.write_text(MANIFESTS[name](path.read_text()))
    with pytest.raises(UserError, match=rf"{MANIFEST} is damaged.*: run `perceiver preprocess clm-wikitext"):
        load_prepared(chosen)
    with logged() as lines:
        preprocess.prepare(chosen)
    assert "preparing again" in lines[0] and content(folder) == expected


def without_checksums(folder: Path, manifest: Manifest) -> Manifest:
    """The same data as older versions wrote it."""

    def rewritten(shard: Shard) -> Shard:
        old = pq.ParquetFile(folder / shard.file)
        groups = [old.read_row_group(i) for i in range(old.num_row_groups)]
        with pq.ParquetWriter(folder / shard.file, groups[0].schema.remove_metadata()) as writer:
            for group in groups:
                writer.write_table(group.replace_schema_metadata(None), row_group_size=len(group))
        content = (folder / shard.file).read_bytes()
        return Shard(file=shard.file, rows=shard.rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    splits = {name: replace(split, shards=tuple(map(rewritten, split.shards))) for name, split in manifest.splits.items()}
    old = replace(manifest, splits=splits)
    old.save(folder)
    return old


def test_data_of_older_versions_without_checksums_is_read_and_keeps_its_digest(tmp_path):
    """They have neither hashes of footers nor a digest in the manifest."""
    for manifest in (
        write_images(tmp_path / "images"),
        write_stream(tmp_path / "tokens", np.arange(999, dtype=np.uint16), np.arange(99, dtype=np.uint16)),
    ):
        folder = tmp_path / manifest.kind
        manifest = without_checksums(folder, manifest)
        stored = json.loads((folder / MANIFEST).read_text())
        assert stored.pop("digest") == manifest.digest and "footer" not in json.dumps(stored)
        (folder / MANIFEST).write_text(json.dumps(stored))
        assert Manifest.load(folder) == manifest and Manifest.load(folder).digest == manifest.digest
        assert read_block(folder, manifest.splits["train"], 0).num_rows
        name = manifest.splits["train"].shards[0].file
        assert describe_shard(folder, name, 1).footer


def test_the_command_in_messages_can_be_pasted(tmp_path):
    chosen, folder, _ = prepared(tmp_path / "with blanks", "tokens") if (tmp_path / "with blanks").mkdir() is None else None
    (Path(folder) / MANIFEST).write_text("{")
    with pytest.raises(UserError) as error:
        load_prepared(chosen)
    words = shlex.split(str(error.value).partition("`")[2].rstrip("`"))
    assert str(tmp_path / "with blanks" / "in") in words
