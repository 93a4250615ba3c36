"""Loaders of all kinds through Ray Data: the rows that one process reads, in the same order."""

import pyarrow as pa
import pytest

from perceiver.config import ParallelConfig
from perceiver.data.manifest import DamagedData
from perceiver.datasets import data_folder
from perceiver.tasks import build_task
from perceiver.training.batches import make_train_loader, read_here
from ray_jobs.ingest import _FAULT, _read, read_with_ray
from ray_jobs.preprocess import prepare
from ray_jobs.ray_env import connect
from ray_jobs.shipping import Shipped
from tests.data.test_stream_text import streamed
from tests.support.preparing import texts, write_jsonl


def test_data_that_cannot_be_read_leaves_a_data_task_as_a_sentence():
    class Damaged:
        task_type = dict

        def read(self, unit):
            raise DamagedData(f"x/train-0000{unit['number']}.parquet is damaged")

    (table,) = _read(pa.table({"number": [3, 4]}), Shipped(Damaged()))
    assert table.to_pydict() == {_FAULT: ["x/train-00003.parquet is damaged"]}


@pytest.mark.slow
def test_mixtures_and_streams_come_through_ray_data_as_they_are_read_here(tmp_path):
    for i, name in enumerate(("web", "books")):
        write_jsonl(tmp_path / f"{name}.jsonl.gz", [{"text": text} for text in texts(300, seed=i)])
    mixture = (f"{tmp_path / 'web.jsonl.gz'}=3", f"{tmp_path / 'books.jsonl.gz'}=1")
    kinds = {
        "shards mixed": {"mixture": mixture, "prepare": "shards"},
        "text": {"source": str(tmp_path / "web.jsonl.gz")},
        "text mixed": {"mixture": mixture},
    }
    with connect(ParallelConfig()):
        for name, data in kinds.items():
            chosen = streamed(tmp_path / "data", **{"source": "", **data})
            manifest = prepare(chosen)
            loader = make_train_loader(chosen, build_task(chosen), data_folder(chosen), manifest)
            for rank in range(2):
                here, there = (list(loader.steps(read, rank, 2, 3, 20)) for read in (read_here, read_with_ray))
                assert len(here) == len(there) == 17
                for (one,), (other,) in zip(here, there, strict=True):
                    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), name
