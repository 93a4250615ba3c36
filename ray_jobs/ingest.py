"""Prepared shards to workers through Ray Data: a worker's reading plan becomes data tasks, their rows come back in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle

from perceiver.config import UserError
from perceiver.data.reader import Reader
from perceiver.training.batches import Loader
from ray_jobs.data_task import FAULT, PIECES, Rest, read_units
from ray_jobs.read_ahead import DATA_CPUS, TASK_BYTES, DataShare, set_limit
from ray_jobs.shipping import Shipped
from ray_jobs.spares import of_tasks

UNITS_PER_EXECUTION = 1024
"""Units of one Ray Data execution: enough that its start (0.2 s) is lost in it, few enough to be listed at once."""


class DataFault(UserError):
    """Data that could not be read: a damaged shard, or a fault in text that is streamed. One worker alone may meet it."""


def read_with_ray(loader: Loader, units: Iterator[Any], share: DataShare | None = None, workers: int = 1) -> Iterator[pa.Table]:
    """The rows of `units`, in their order, read ahead by Ray Data tasks anywhere in the cluster.

    What was begun ends when the iterator is closed.

    Args:
        share: what there is for the data tasks of all `workers` that read so; None: of a cluster that does nothing else.

    Raises:
        DataFault: data that cannot be read.
    """
    share = share or DataShare(cpus_per_worker=0.0)
    reader = loader.reader
    rest = Rest(reader.pieces())
    shipped = Shipped(reader.with_pieces([()] * len(rest.counts)))
    while chunk := list(islice(units, UNITS_PER_EXECUTION)):
        rows = sum(unit.num_rows for unit in chunk)
        num_tasks = min(len(chunk), max(1, -(-rows * loader.row_bytes // TASK_BYTES)))
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        set_limit(context, share.here(workers), -(-rows * loader.row_bytes // num_tasks))
        plan = ray.data.from_items([_item(reader, unit) for unit in chunk], override_num_blocks=num_tasks)
        tables = plan.map_batches(
            read_units,
            fn_kwargs={"shipped": shipped, "rest": rest},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=DATA_CPUS,
            runtime_env={"env_vars": of_tasks()},
        )
        for table in tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            if table.column_names == [FAULT]:
                raise DataFault(table[FAULT][0].as_py())
            yield table


def _item(reader: Reader, unit: Any) -> dict[str, Any]:
    """A unit as plain data, with the parts of the source's files that it is read from, where it is, and no others."""
    item, lists = dataclasses.asdict(unit), reader.pieces()
    if lists:
        number, chosen = reader.pieces_of(unit)
        item[PIECES] = cloudpickle.dumps((number, {i: lists[number][i] for i in chosen}))
    return item
