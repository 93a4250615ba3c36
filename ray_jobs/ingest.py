"""Prepared shards to workers through Ray Data: a worker's reading plan becomes data tasks, their rows come back in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, BackpressurePolicy

from perceiver.config import UserError
from perceiver.data.chunks import SomePieces
from perceiver.data.pieces import Piece
from perceiver.data.storage import NoStore
from perceiver.training.batches import Loader
from ray_jobs.read_ahead import DATA_CPUS, TASK_BYTES, DataShare, ReadAhead
from ray_jobs.shipping import Shipped
from ray_jobs.spares import of_tasks

UNITS_PER_EXECUTION = 1024
"""Units of one Ray Data execution: enough that its start (0.2 s) is lost in it, few enough to be listed at once."""


_LIMIT = "perceiver.read_ahead"
"""Under this name the context of an execution holds its limit."""
_FAULT = "fault"
_PIECES = "pieces"


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
    rest = _Rest(loader.pieces())
    shipped = Shipped(loader.with_pieces([()] * len(rest.counts)))
    while chunk := list(islice(units, UNITS_PER_EXECUTION)):
        rows = sum(unit.num_rows for unit in chunk)
        num_tasks = min(len(chunk), max(1, -(-rows * loader.row_bytes // TASK_BYTES)))
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        _set_limit(context, share.here(workers), -(-rows * loader.row_bytes // num_tasks))
        plan = ray.data.from_items([_item(loader, unit) for unit in chunk], override_num_blocks=num_tasks)
        tables = plan.map_batches(
            _read,
            fn_kwargs={"shipped": shipped, "rest": rest},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=DATA_CPUS,
            runtime_env={"env_vars": of_tasks()},
        )
        for table in tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            if table.column_names == [_FAULT]:
                raise DataFault(table[_FAULT][0].as_py())
            yield table


def warm_up() -> None:
    """Loads what a data task needs into the process that this runs in, as a task."""
    import perceiver.tasks  # noqa: F401


class Bounded(BackpressurePolicy):  # type: ignore[misc]  # Ray's types are not followed
    """Starts the tasks of an execution within its limit, which its context holds; the only rule of such an execution."""

    def can_add_input(self, op: Any) -> bool:
        """Whether an operator may start a task."""
        limit, expected = self._data_context.get_config(_LIMIT)
        size = max(expected, op.metrics.average_bytes_outputs_per_task or 0.0)
        return bool(limit.may_start(op.num_active_tasks(), self._resource_manager.get_mem_op_outputs(op), size))


def _set_limit(context: ray.data.DataContext, limit: ReadAhead, task_bytes: int) -> None:
    """Makes the executions that are begun with a context keep a limit; `task_bytes`: of the rows of a task, before one is measured."""
    context.op_resource_reservation_enabled = False
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [Bounded])
    context.set_config(_LIMIT, (limit, task_bytes))


class _Rest:
    """The parts of a source's files that a task was not sent, in the object store: it gets them where it needs one after all."""

    def __init__(self, lists: Sequence[Sequence[Piece]]) -> None:
        self.counts = [len(pieces) for pieces in lists]
        self._stored = ray.put(Shipped(lists)) if any(lists) else None

    def fetch(self, number: int) -> Sequence[Piece]:
        return ray.get(self._stored).value[number]  # type: ignore[no-any-return]


def _item(loader: Loader, unit: Any) -> dict[str, Any]:
    """A unit as plain data, with the parts of the source's files that it is read from, where it is, and no others."""
    item, lists = dataclasses.asdict(unit), loader.pieces()
    if lists:
        number, chosen = loader.pieces_of(unit)
        item[_PIECES] = cloudpickle.dumps((number, {i: lists[number][i] for i in chosen}))
    return item


def _read(items: pa.Table, shipped: Shipped[Loader], rest: _Rest | None = None) -> Iterator[pa.Table]:
    for item in items.to_pylist():
        loader, packed = shipped.value, item.pop(_PIECES, None)
        if packed is not None and rest is not None:
            number, there = cloudpickle.loads(packed)
            counted = enumerate(rest.counts)
            loader = loader.with_pieces([SomePieces(n, there if i == number else {}, partial(rest.fetch, i)) for i, n in counted])
        try:
            yield loader.read(loader.task_type(**item))
        except NoStore:
            raise  # a broken connection: the task is repeated
        except UserError as error:  # as data: Ray would wrap the exception in its own
            yield pa.table({_FAULT: [str(error)]})
            return
