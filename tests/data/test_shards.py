"""The shard format: constant blocks, arithmetic places, manifests that are the same for the same data."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perceiver import presets
from perceiver.config import UserError
from perceiver.data.columns import fixed_array, fixed_column
from perceiver.data.manifest import Manifest, Shard, Split, shard_name, stream_rows
from perceiver.data.rows import rows_of
from perceiver.data.shards import read_block
from perceiver.data.storage import file_hash, list_folder, write_file
from perceiver.data_settings import prepare_settings
from perceiver.datasets import data_folder
from tests.support.preparing import load_prepared


def make_split(folder, rows=23, length=4, rows_per_block=3, blocks_per_shard=2) -> Split:
    """A token split whose stream is 0, 1, 2, ..."""
    stream = np.zeros(((rows + 1), length), np.uint16)
    stream.reshape(-1)[: rows * length] = np.arange(rows * length)
    shards = []
    per_shard = rows_per_block * blocks_per_shard
    for k in range(-(-rows // per_shard)):

        def write(file, k=k):
            with pq.ParquetWriter(file, rows_of("tokens", length).schema) as writer:
                for first in range(k * per_shard, min((k + 1) * per_shard, rows), rows_per_block):
                    block = stream[first : min(first + rows_per_block, rows) + 1]
                    writer.write_table(pa.table({"tokens": fixed_column(block)}, schema=rows_of("tokens", length).schema))

        name = shard_name("train", k)
        write_file(folder, name, write)
        size, sha256 = file_hash(folder, name)
        shards.append(Shard(file=name, rows=min(per_shard, rows - k * per_shard), bytes=size, sha256=sha256))
    return Split(
        name="train", kind="tokens", rows=rows, tokens=rows * length, bytes=0, words=0, documents=1, row_length=length,
        rows_per_block=rows_per_block, blocks_per_shard=blocks_per_shard, lookahead=1, shards=tuple(shards),
    )  # fmt: skip


def test_every_block_is_found_by_arithmetic_and_ends_with_the_next_row(tmp_path):
    split = make_split(tmp_path)
    assert split.num_blocks == 8 and [split.block_rows(b) for b in range(8)] == [3] * 7 + [2]
    for block in range(split.num_blocks):
        values = fixed_array(read_block(tmp_path, split, block), "tokens")
        first = block * 3 * 4
        expected = np.arange(first, first + 4 * (split.block_rows(block) + 1))
        expected[expected >= split.tokens] = 0
        assert values.reshape(-1).tolist() == expected.tolist()


def test_blocks_are_read_through_uris_too(tmp_path):
    split = make_split(tmp_path)
    assert read_block(f"file://{tmp_path}", split, 3).equals(read_block(str(tmp_path), split, 3))


def test_rows_of_a_stream_have_every_id_but_the_first_as_a_target_once():
    for length in (1, 2, 5, 64):
        for tokens in range(2, 300):
            rows = stream_rows(tokens, length)
            targets = [t for row in range(rows) for t in range(row * length + 1, row * length + length + 1) if t < tokens]
            assert targets == list(range(1, tokens))
            assert (rows - 1) * length + 1 < tokens


def test_manifest_survives_saving_and_its_digest_follows_its_content(tmp_path):
    split = make_split(tmp_path)
    manifest = Manifest(kind="tokens", settings={"a": 1}, settings_digest="0", splits={"train": split}, image_shape=(2, 3, 1))
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest and Manifest.load(tmp_path).digest == manifest.digest
    changed = replace(split, shards=(replace(split.shards[0], sha256="0"), *split.shards[1:]))
    assert replace(manifest, splits={"train": changed}).digest != manifest.digest
    assert [name for name in list_folder(tmp_path) if name.endswith(".tmp")] == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_file(tmp_path, "a", lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_file(tmp_path, "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old" and list(list_folder(tmp_path)) == ["a"]


def test_fixed_array_is_a_view_of_the_table():
    values = np.arange(60, dtype=np.uint16).reshape(12, 5)
    table = pa.table({"tokens": fixed_column(values)})
    assert np.shares_memory(fixed_array(table, "tokens"), values)
    assert fixed_array(table.slice(3, 4), "tokens").tolist() == values[3:7].tolist()
    assert fixed_array(table.slice(0, 0), "tokens").shape == (0, 5)


def test_unprepared_data_is_named_with_the_command_that_prepares_it(tmp_path):
    experiment = presets.quickstart()
    experiment = replace(experiment, data=replace(experiment.data, root=str(tmp_path)))
    with pytest.raises(UserError, match=f"run `perceiver preprocess quickstart --data.root {tmp_path}`"):
        load_prepared(experiment)


def test_data_prepared_with_other_settings_says_which(tmp_path):
    experiment = presets.clm_wikitext_small()
    experiment = replace(experiment, data=replace(experiment.data, root=str(tmp_path)))
    Manifest(kind="tokens", settings=prepare_settings(experiment), settings_digest="", splits={}).save(data_folder(experiment))
    assert load_prepared(experiment)[0] == data_folder(experiment)
    other = replace(experiment, model=replace(experiment.model, max_seq_len=512))
    with pytest.raises(UserError, match=r"--model.max-seq-len 512.*row_length: 1024 -> 512"):
        load_prepared(other)


def test_settings_do_not_depend_on_where_the_source_lies(tmp_path):
    experiment = presets.clm_wikitext_small()
    a = replace(experiment, data=replace(experiment.data, source=str(tmp_path / "a" / "corpus")))
    b = replace(experiment, data=replace(experiment.data, source=str(tmp_path / "b" / "corpus") + "/"))
    assert prepare_settings(a) == prepare_settings(b) != prepare_settings(experiment)
    assert str(tmp_path) not in str(prepare_settings(a))


def test_labels_or_images_that_the_model_cannot_take_are_refused(tmp_path):
    experiment = presets.quickstart()
    experiment = replace(experiment, data=replace(experiment.data, root=str(tmp_path)))
    base = Manifest(
        kind="images", settings=prepare_settings(experiment), settings_digest="", splits={}, image_shape=(28, 28, 1),
        num_classes=10,
    )  # fmt: skip
    for manifest, message in (
        (replace(base, num_classes=11), "labels up to 10, but model.output.num-classes is 10"),
        (replace(base, image_shape=(32, 32, 3)), r"\(28, 28, 1\), but the images are \(32, 32, 3\)"),
    ):
        manifest.save(data_folder(experiment))
        with pytest.raises(UserError, match=message):
            load_prepared(experiment)
    base.save(data_folder(experiment))
    assert load_prepared(experiment)[1] == base
