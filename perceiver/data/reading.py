"""How much workers read for the rows that they need: counted with the reading plan, nothing is read."""

from __future__ import annotations

from collections.abc import Iterator

from perceiver.data.mixture import Mixture, mixture_plan
from perceiver.data.order import Order, ReadTask, plan


def read_ratio(order: Order | Mixture, workers: int, steps: int) -> float:
    """Rows that all workers read for each row that they need in the first steps.

    A worker reads whole windows; where several share a lane they all read its windows. With many workers eight of them stand for all.
    """
    read = needed = 0
    for rank in sorted({rank * (workers - 1) // 7 for rank in range(8)}):
        for of, task, rows in _tasks(order, rank, workers, steps):
            read += sum(of.block_rows(int(block)) for block in of.window_blocks_of(task.epoch, task.window))
            needed += rows
    return read / needed


def _tasks(order: Order | Mixture, rank: int, workers: int, steps: int) -> Iterator[tuple[Order, ReadTask, int]]:
    if isinstance(order, Mixture):
        for part in mixture_plan(order, rank, workers, 0, steps):
            yield order.orders[part.source], part.unit, part.num_rows
    else:
        yield from ((order, task, task.num_rows) for task in plan(order, rank, workers, 0, steps))
