"""Prepared shards to workers through Ray Data: a worker's reading plan becomes data tasks, their rows come back in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from perceiver.config import UserError
from perceiver.training.batches import Loader
from ray_jobs.shipping import Shipped

DATA_CPUS = 0.5
"""CPUs that a data task asks for."""
UNITS_PER_EXECUTION = 1024
"""Units of one Ray Data execution: enough that its start (0.2 s) is lost in it, few enough to be listed at once."""
TASK_BYTES = 16 << 20
"""Small units are read several by one task, up to about this size: a task costs 30 to 60 ms whatever it does."""


_FAULT = "fault"


class DataFault(UserError):
    """Data that could not be read: a damaged shard, or a fault in text that is streamed. One worker alone may meet it."""


def read_with_ray(loader: Loader, units: Iterator[Any]) -> Iterator[pa.Table]:
    """The rows of `units`, in their order, read ahead by Ray Data tasks anywhere in the cluster.

    Raises:
        DataFault: data that cannot be read.
    """
    while chunk := list(islice(units, UNITS_PER_EXECUTION)):
        rows = sum(unit.num_rows for unit in chunk)
        num_tasks = min(len(chunk), max(1, -(-rows * loader.row_bytes // TASK_BYTES)))
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        plan = ray.data.from_items([dataclasses.asdict(unit) for unit in chunk], override_num_blocks=num_tasks)
        tables = plan.map_batches(
            _read, fn_kwargs={"shipped": Shipped(loader)}, batch_size=None, batch_format="pyarrow", num_cpus=DATA_CPUS
        )
        for table in tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            if table.column_names == [_FAULT]:
                raise DataFault(table[_FAULT][0].as_py())
            yield table


def _read(items: pa.Table, shipped: Shipped[Loader]) -> Iterator[pa.Table]:
    loader = shipped.value
    for item in items.to_pylist():
        try:
            yield loader.read(loader.task_type(**item))
        except UserError as error:  # as data: Ray would wrap the exception in its own
            yield pa.table({_FAULT: [str(error)]})
            return
