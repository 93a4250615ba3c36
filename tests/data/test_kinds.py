"""A kind of rows of somebody else's: what a built-in one does, it can do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from perceiver.config import TaskConfig, UserError
from perceiver.data.preparation import Preparation, splits_of
from perceiver.data.row_kind import RowKind
from perceiver.presets import PRESETS
from ray_jobs import preprocess
from tests.support.preparing import load_prepared, rows_of, serially, write_jsonl


class PairRows(RowKind):
    kind = "pairs"
    formats = ("jsonl",)
    expected = ".jsonl with a and b"
    made_from = "pairs"
    bytes_per_row = 8

    @property
    def schema(self):
        return pa.schema([pa.field(name, pa.int32(), nullable=False) for name in ("a", "b")])


class PairPreparation(Preparation):
    kind = PairRows.kind

    def add(self, span, problems, writers):
        found = [json.loads(line) for line in Path(span.file.path).read_text().splitlines()]
        values = np.array([(row["a"], row["b"]) for row in found], np.int32)
        for split, chosen in splits_of(span.file, [pair.tobytes() for pair in values], self.job.val_fraction):
            num = int(np.count_nonzero(chosen))
            writers[split].add(values[chosen].reshape(-1), {"rows": num, "documents": num, "bytes": 8 * num}, None, None, None)

    def block(self, shard, first, num):
        pairs = shard.read("values", np.int32, first, first + num, width=2).reshape(-1, 2)
        return pa.table({"a": pairs[:, 0], "b": pairs[:, 1]})


class UnmadeRows(PairRows):
    kind = "unmade pairs"


class PairsConfig(TaskConfig):
    kind = "pairs"


class UnmadeConfig(TaskConfig):
    kind = "unmade pairs"


def of(task, tmp_path):
    """An experiment on pairs: two files, cut into several shards of several blocks."""
    base = PRESETS["quickstart"]()
    for name, first in (("one", 0), ("two", 30)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"a": n, "b": n * n} for n in range(first, first + 30)])
    settings = {"source": f"{tmp_path}/*.jsonl", "root": str(tmp_path / "data"), "rows_per_block": 4, "blocks_per_shard": 3}
    return replace(base, task=task, data=replace(base.data, val_fraction=0.2, **settings))


def test_rows_of_a_kind_of_somebody_elses_are_prepared_and_read_like_others(tmp_path, monkeypatch):
    serially(monkeypatch)
    experiment = of(PairsConfig(), tmp_path)
    preprocess.prepare(experiment)
    folder, manifest = load_prepared(experiment)
    train, val = (rows_of(folder, manifest, split).to_pylist() for split in ("train", "val"))
    assert len(train) > 12 and val and sorted(row["a"] for row in train + val) == list(range(60))
    assert all(row["b"] == row["a"] ** 2 for row in train + val)
    assert [row["a"] for row in train] == sorted(row["a"] for row in train)


def test_a_kind_of_rows_without_a_preparation_is_refused_by_name(tmp_path, monkeypatch):
    serially(monkeypatch)
    with pytest.raises(UserError, match="'unmade pairs' have no Preparation"):
        preprocess.prepare(of(UnmadeConfig(), tmp_path))


class BinaryPairs(PairRows):
    """The same in files of a format that the package does not read: int32 after an odd number of bytes."""

    kind = "binary pairs"
    formats = ("pairs",)
    endings = {".pairs": "pairs"}
    expected = ".pairs files"


class BinaryPreparation(PairPreparation):
    kind = BinaryPairs.kind

    def add(self, span, problems, writers):
        assert (span.start, span.stop) == (0, span.file.size)  # as a whole, or the numbers could not be found
        values = np.frombuffer(Path(span.file.path).read_bytes()[3:], "<i4").reshape(-1, 2)
        counts = {"rows": len(values), "documents": len(values), "bytes": values.nbytes}
        writers[span.file.split].add(values.reshape(-1), counts, None, None, None)


class BinaryConfig(TaskConfig):
    kind = BinaryPairs.kind


def test_a_kind_brings_files_of_a_format_of_its_own_with_their_splits(tmp_path, monkeypatch):
    serially(monkeypatch)
    base = of(BinaryConfig(), tmp_path)
    values = np.arange(60_000, dtype="<i4").reshape(-1, 2)
    for split, part in (("train", values[:29_000]), ("val", values[29_000:])):
        (tmp_path / f"{split}.pairs").write_bytes(b"abc" + part.tobytes())
    experiment = replace(base, data=replace(base.data, source=str(tmp_path), rows_per_block=4096, blocks_per_shard=64))
    preprocess.prepare(experiment, piece_bytes=1 << 16)
    folder, manifest = load_prepared(experiment)
    assert [len(rows_of(folder, manifest, split)) for split in ("train", "val")] == [29_000, 1_000]
    assert rows_of(folder, manifest, "val")["a"].to_pylist() == values[29_000:, 0].tolist()
