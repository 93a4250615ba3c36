"""Loaders of all kinds through Ray Data: the rows that one process reads, in the same order."""

import subprocess
import sys

import pyarrow as pa
import pytest
import ray
from ray import cloudpickle

from perceiver.config import ParallelConfig
from perceiver.data.manifest import DamagedData
from perceiver.datasets import data_folder
from perceiver.tasks import build_task
from perceiver.training.batches import make_train_loader, own_steps, read_here
from ray_jobs.data_task import FAULT, read_units
from ray_jobs.ingest import _item, read_with_ray
from ray_jobs.preprocess import prepare
from ray_jobs.ray_env import connect
from ray_jobs.read_ahead import ReadAhead, set_limit
from ray_jobs.shipping import Shipped
from tests.data.test_stream_text import streamed
from tests.support.preparing import experiment, serially, texts, write_jsonl


def test_data_that_cannot_be_read_leaves_a_data_task_as_a_sentence():
    class Damaged:
        unit_type = dict

        def read(self, unit):
            raise DamagedData(f"x/train-0000{unit['number']}.parquet is damaged")

    (table,) = read_units(pa.table({"number": [3, 4]}), Shipped(Damaged()))
    assert table.to_pydict() == {FAULT: ["x/train-00003.parquet is damaged"]}


READS = """
import sys
import pyarrow as pa
from ray import cloudpickle
from ray_jobs import data_task, on_workers
items, shipped, context = cloudpickle.loads(sys.stdin.buffer.read())
(table,) = data_task.read_units(items, shipped)
data_task.warm_up(False)
print(table.num_rows, "torch" in sys.modules)
"""


@pytest.mark.parametrize(("preset", "loads_torch"), [("txt-clf-imdb-all", False), ("mlm-imdb", True)])
def test_a_data_task_loads_pytorch_only_where_the_task_has_a_part_in_reading(preset, loads_torch, tmp_path, monkeypatch):
    serially(monkeypatch)
    write_jsonl(tmp_path / "train.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts(40))])
    chosen = experiment(preset, tmp_path / "data", tmp_path)
    manifest = prepare(chosen)
    task = build_task(chosen)
    loader = make_train_loader(chosen, task, data_folder(chosen), manifest)
    unit = next(loader.plan(0, 1, 0, 1))
    context = ray.data.DataContext.get_current().copy()
    set_limit(context, ReadAhead(tasks=1, bytes=1), 1)  # it travels with each task
    sent = cloudpickle.dumps((pa.Table.from_pylist([_item(loader.reader, unit)]), Shipped(loader.reader), context))
    done = subprocess.run([sys.executable, "-c", READS], input=sent, stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout.split() == [str(unit.num_rows).encode(), str(loads_torch).encode()]
    assert bool(own_steps(task)) is loads_torch


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
