"""Which source gives which row of which global batch of a mixture: arithmetic of the row's number. No state, no clock.

All rows of a training are numbered: global batch s has those from s * G to s * G + G - 1. A *round* of 10,000 rows has as many rows
of each source as its share says, spread evenly over the round, so that every batch has about its share of each. Rounds are
alike: so how many rows a source has given before any number, and which number takes a source's n-th row, is arithmetic.

The rows of a source come in its own `Order`, epoch after epoch: its n-th row is the n-th slot of its batches laid end to
end. A small source goes round more often than a large one, each time shuffled anew.

A batch's rows stand in its slots by their lanes, of all sources together: so a worker, which takes neighbouring slots, needs few
lanes of each source, the same ones in every batch (but for a row or two, where shares do not come out even).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from perceiver.data.order import Order, ReadTask, plan, worker_slots
from perceiver.data.stream import Rows

ROUND = 10_000
"""Rows after which the order of sources repeats; shares are exact to one part in this number."""


@lru_cache(maxsize=16)
def round_of(shares: tuple[float, ...]) -> np.ndarray:
    """The source of each row of a round: int64 (ROUND,). Shares are rounded by largest remainder."""
    exact = np.array(shares) / sum(shares) * ROUND
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: ROUND - int(counts.sum())]:
        counts[i] += 1
    places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


@lru_cache(maxsize=16)
def given_of(shares: tuple[float, ...]) -> np.ndarray:
    """How many rows of each source come before each row of a round, and in all of it: int64 (sources, ROUND + 1)."""
    of_source = round_of(shares) == np.arange(len(shares))[:, None]
    return np.cumsum(np.pad(of_source, ((0, 0), (1, 0))), axis=1)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The order of a mixture's rows."""

    orders: tuple[Order, ...]
    """The order of each source. Its own global batch only says how its rows are spread over its epoch: one row a lane is best."""
    shares: tuple[float, ...]
    global_batch_size: int

    @property
    def rows(self) -> int:
        """Rows of all sources together."""
        return sum(order.rows for order in self.orders)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take as many rows as all sources have together (each source has its own epochs)."""
        return -(-self.rows // self.global_batch_size)

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """The source of each row, by the row's number over all batches."""
        return round_of(self.shares)[numbers % ROUND]

    def given(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """How many rows a source gives before the row of each number: int64."""
        counts = given_of(self.shares)[source]
        whole, rest = np.divmod(numbers, ROUND)
        return whole * counts[ROUND] + counts[rest]

    def numbers(self, source: int, counts: np.ndarray) -> np.ndarray:
        """The number of the row that is a source's n-th, for each n of `counts` (from 0 on, over all its epochs)."""
        places = np.flatnonzero(round_of(self.shares) == source)
        return counts // len(places) * ROUND + places[counts % len(places)]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of a global batch's slots, and which of its source's rows each has (over its epochs): int64 (G,) each."""
        first = step * self.global_batch_size
        sources = self.sources(np.arange(first, first + self.global_batch_size))
        counts, lanes = np.zeros(len(sources), np.int64), np.zeros(len(sources))
        for source, order in enumerate(self.orders):
            of_source = sources == source
            counts[of_source] = self.given(source, np.int64(first)) + np.arange(np.count_nonzero(of_source))
            lanes[of_source] = order.queues(counts[of_source] % order.rows) / order.lanes
        slots = np.lexsort([counts, sources, lanes])
        return sources[slots], counts[slots]

    def slots(self, source: int, counts: np.ndarray) -> np.ndarray:
        """The slot of its batch that a source's n-th row is in, for each n of `counts`: `batch` the other way round, without it."""
        order, first = self.orders[source], self.numbers(source, counts) // self.global_batch_size * self.global_batch_size
        lanes = order.queues(counts % order.rows)
        # Of its own lane those of the batch before it, and all of lanes before it.
        slots = self._through(source, counts, lanes + 1) - self._through(source, counts, lanes)
        slots -= self._through(source, self.given(source, first), lanes + 1) - self._through(source, self.given(source, first), lanes)
        for other, others in enumerate(self.orders):
            before = -(-lanes * others.lanes // order.lanes)
            if other < source:  # equal lanes stand by their sources
                before += lanes * others.lanes % order.lanes == 0
            ends = (self.given(other, first + self.global_batch_size), self.given(other, first))
            slots += self._through(other, ends[0], before) - self._through(other, ends[1], before)
        return slots

    def _through(self, source: int, counts: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """How many of a source's rows before each n of `counts` come through a lane before each of `lanes`."""
        order = self.orders[source]
        epochs, places = np.divmod(counts, order.rows)
        found = epochs * order.through(np.int64(order.rows), lanes) + order.through(places, lanes)
        return np.where(lanes > order.lanes, counts, found)

    def batch_rows(self, step: int) -> list[tuple[int, int, int]]:
        """(source, epoch, row) of a global batch, in slot order, without any plan: what the workers' batches must be."""
        found = []
        for source, count in zip(*(values.tolist() for values in self.batch(step)), strict=True):
            order = self.orders[source]
            epoch, place = divmod(count, order.rows)
            batch, slot = divmod(place, order.global_batch_size)
            found.append((source, epoch, int(order.batch_rows(epoch * order.steps_per_epoch + batch)[slot])))
        return found


@dataclass(frozen=True)
class MixtureReadTask:
    """What one worker keeps of a part of a source's window: what one data task reads and sends as one run of rows."""

    source: int
    unit: ReadTask
    """The part of the window, all of its rows."""
    start: int
    """First row kept, by its number over all batches."""
    stop: int
    """Last + 1."""
    low: int
    """Slots of a batch from here ..."""
    high: int
    """... to before here are the worker's."""
    num_rows: int
    """Rows kept."""

    def __post_init__(self) -> None:
        if isinstance(self.unit, dict):  # as plain data, which is how plans travel to tasks
            object.__setattr__(self, "unit", ReadTask(**self.unit))

    def kept(self, mixture: Mixture) -> np.ndarray:
        """Which of the unit's positions are kept: bool."""
        order = mixture.orders[self.source]
        counts = self.unit.epoch * order.rows + order.places(self.unit.kept())
        numbers = mixture.numbers(self.source, counts)
        slots = mixture.slots(self.source, counts)
        return (numbers >= self.start) & (numbers < self.stop) & (slots >= self.low) & (slots < self.high)


def mixture_plan(mixture: Mixture, rank: int, world: int, start_step: int, stop_step: int) -> Iterator[MixtureReadTask]:
    """What worker `rank` of `world` has to read for the steps start_step .. stop_step - 1, in the order it is needed."""
    units = (_source_plan(mixture, source, rank, world, start_step, stop_step) for source in range(len(mixture.orders)))
    return (unit for _, unit in heapq.merge(*units, key=lambda found: found[0]))


def _source_plan(
    mixture: Mixture, source: int, rank: int, world: int, start_step: int, stop_step: int
) -> Iterator[tuple[int, MixtureReadTask]]:
    """The units of one source, each with a step before which nothing of it is needed; the steps ascend."""
    order, size = mixture.orders[source], mixture.global_batch_size
    start, stop = start_step * size, stop_step * size
    first, last = mixture.given(source, np.array([start, stop])).tolist()
    if first == last:
        return
    batches = []
    for count in (first, last - 1):
        epoch, place = divmod(count, order.rows)
        batches.append(epoch * order.steps_per_epoch + place // order.global_batch_size)
    low, high = worker_slots(size, rank, world)
    for unit in plan(order, 0, 1, batches[0], batches[1] + 1):
        whole = MixtureReadTask(source, unit, start, stop, low, high, 0)
        num_rows = int(np.count_nonzero(whole.kept(mixture)))
        if num_rows:
            epoch, batch = divmod(unit.step, order.steps_per_epoch)
            number = mixture.numbers(source, np.array([epoch * order.rows + batch * order.global_batch_size]))[0]
            yield int(number) // size, MixtureReadTask(source, unit, start, stop, low, high, num_rows)


def mixture_batches(
    mixture: Mixture, rank: int, world: int, start_step: int, stop_step: int, tables: Iterable[pa.Table]
) -> Iterator[pa.Table | None]:
    """A worker's rows of the steps start_step .. stop_step - 1, in slot order; None where a step has no row for it.

    Args:
        tables: the rows of the worker's units in the order of `mixture_plan`, cut into tables anywhere.
    """
    incoming = Rows(iter(tables))
    units = mixture_plan(mixture, rank, world, start_step, stop_step)
    queues: dict[tuple[int, int], Rows] = {}
    low, high = worker_slots(mixture.global_batch_size, rank, world)
    for step in range(start_step, stop_step):
        sources, counts = (values[low:high] for values in mixture.batch(step))
        if not len(sources):
            yield None
            continue
        keys = np.stack([sources, np.zeros_like(sources)])
        for source in np.unique(sources).tolist():
            order, of_source = mixture.orders[source], sources == source
            keys[1, of_source] = order.queues(counts[of_source] % order.rows)
        grouped = np.lexsort(keys[::-1])
        found, sizes = np.unique(keys, axis=1, return_counts=True)
        parts = []
        for (source, lane), size in zip(found.T.tolist(), sizes.tolist(), strict=True):
            queue = queues.setdefault((source, lane), Rows())
            while len(queue) < size:
                unit = next(units)
                queues.setdefault((unit.source, unit.unit.lane), Rows()).put(incoming.take(unit.num_rows))
            parts.append(queue.take(size))
        yield pa.concat_tables(parts).combine_chunks().take(pa.array(np.argsort(grouped)))
