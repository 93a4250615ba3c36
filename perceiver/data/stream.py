"""From a reading plan to a worker's batches. Who runs the reads (Ray Data tasks, a thread, this process) is not known here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from perceiver.data.manifest import Split
from perceiver.data.order import Order, ReadTask, plan, rank_rows
from perceiver.data.shards import read_block

Examples = Callable[[pa.Table, Split, int, int, bool], pa.Table]
"""A task's `examples`: (block, split, first row, epoch, train) -> one example a row."""


def read_unit(
    folder: str,
    split: Split,
    order: Order,
    unit: ReadTask,
    examples: Examples,
    train: bool,
    read: Callable[[str, Split, int], pa.Table] = read_block,
) -> pa.Table:
    """Reads a unit: the examples of its kept positions in order, with the columns "row" and "epoch" (int64)."""
    tables, rows = [], []
    for block in map(int, order.window_blocks_of(unit.epoch, unit.window)):
        first_row = block * split.rows_per_block
        table = examples(read(folder, split, block), split, first_row, unit.epoch, train)
        tables.append(table)
        rows.append(np.arange(first_row, first_row + table.num_rows))
    wanted = unit.kept() - order.window_start(unit.epoch, unit.window)
    chosen, epochs = order.choose(unit.epoch, unit.window, wanted)
    result = pa.concat_tables(tables).combine_chunks().take(pa.array(chosen))
    result = result.append_column("row", pa.array(np.concatenate(rows)[chosen]))
    return result.append_column("epoch", pa.array(epochs))


def empty_rows(folder: str, split: Split, examples: Examples, read: Callable[[str, Split, int], pa.Table] = read_block) -> pa.Table:
    """A table without rows, with the columns of `read_unit`."""
    table = examples(read(folder, split, 0), split, 0, 0, False).slice(0, 0)
    none = pa.array([], pa.int64())
    return table.append_column("row", none).append_column("epoch", none)


def rank_batches(
    order: Order, rank: int, world: int, start_step: int, stop_step: int, tables: Iterable[pa.Table]
) -> Iterator[pa.Table | None]:
    """A worker's rows of the steps start_step .. stop_step - 1, in slot order; None where a step has no row for it.

    Args:
        tables: the rows of the worker's units in the order of `plan`, cut into tables anywhere.
    """
    source = Rows(iter(tables))
    units = plan(order, rank, world, start_step, stop_step)
    upcoming = next(units, None)
    queues: dict[int, Rows] = {}
    for step in range(start_step, stop_step):
        while upcoming is not None and upcoming.step <= step:
            queues.setdefault(upcoming.lane, Rows()).put(source.take(upcoming.num_rows))
            upcoming = next(units, None)
        parts = [queues[lane].take(count) for lane, count in rank_rows(order, step, rank, world)]
        yield pa.concat_tables(parts) if parts else None


class Rows:
    """A queue of rows that come as tables and are taken in any portions, without copying."""

    def __init__(self, more: Iterator[pa.Table] | None = None) -> None:
        self._tables: deque[pa.Table] = deque()
        self._more = more or iter(())

    def __len__(self) -> int:
        """Rows that are there, without those still to come."""
        return sum(table.num_rows for table in self._tables)

    def put(self, table: pa.Table) -> None:
        self._tables.append(table)

    def take(self, count: int) -> pa.Table:
        parts = []
        while count:
            if not self._tables:
                self._tables.append(next(self._more))
            table = self._tables.popleft()
            if table.num_rows > count:
                self._tables.appendleft(table.slice(count))
                table = table.slice(0, count)
            parts.append(table)
            count -= table.num_rows
        return pa.concat_tables(parts)
