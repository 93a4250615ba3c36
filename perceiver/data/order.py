"""Which samples form which batch: a pure function of (seed, step). No state, no clock, no number of workers.

The order of an epoch, from the outside in:

- *blocks* (row groups of the shards, all of `rows_per_block` rows but the last) are permuted by (seed, epoch);
- `window_blocks` neighbours of that permutation form a *window*, whose rows are permuted by (seed, epoch, window). This gives
  every row a *position* 0 .. rows - 1 in the epoch. Reading a window reads whole blocks; finding a position needs no reading;
- the positions are cut into `lanes` equal stretches, and a global batch takes the same number of positions from each, all lanes
  advancing together. So a batch mixes rows of distant windows, and a worker that serves few lanes reads few windows.

A global batch is a list of slots. Batch s of an epoch with R rows and global batch G: for s < R // G it is full; if G does not
divide R, one more batch holds the R % G rows left over, so that an epoch has every row exactly once. Worker r of W takes the
slots [r * m, (r + 1) * m) with m = ceil(G / W); slots beyond the batch's rows are padding without targets. All workers therefore
take the same number of steps with the same shapes, whatever W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Range = tuple[int, int]


VALIDATION_SEED = 20_210_730
"""Seed of the one fixed order of validation: a part of the set is then a fair sample of it, and the same for all runs."""


POOL_BLOCKS = 128
"""Blocks that the rows of a batch are drawn from: lanes times the blocks of a window."""
SMALL_BLOCKS = 16
"""Data of at most this number of blocks is one window: shuffled as a whole."""
MOST_LANES = 512
"""More than `POOL_BLOCKS` only where as many blocks take no more than `POOL_BYTES`."""
POOL_BYTES = 512 * 2**20
MIXTURE_LANES = 64
"""Most lanes of a source of a mixture: where shares do not come out even, workers share more of more lanes."""
STREAM_LANES, STREAM_BLOCKS = 8, 16
"""Lanes of text that is read without preparation, and blocks that a chunk of it is as large as."""


def lanes_and_window(
    num_blocks: int,
    block_bytes: int,
    global_batch_size: int,
    lanes: int | None = None,
    window_blocks: int | None = None,
    most_lanes: int = MOST_LANES,
) -> Range:
    """Lanes of an order and blocks of its windows, where they are not given.

    A worker reads what of a lane other workers take, too, where there are fewer lanes than workers: so there are as many as a batch has
    rows, whatever the number of workers, and windows are the smaller.

    Args:
        block_bytes: of a block in memory.
    """
    if lanes is None and window_blocks is None and num_blocks <= SMALL_BLOCKS:
        return 1, SMALL_BLOCKS
    if lanes is None:
        most = min(most_lanes, max(POOL_BLOCKS, POOL_BYTES // max(1, block_bytes)), num_blocks)
        if window_blocks is not None:
            most = min(most, max(STREAM_LANES, POOL_BLOCKS // window_blocks))
        lanes = next(n for n in range(max(1, most), 0, -1) if global_batch_size % n == 0)
    return lanes, window_blocks if window_blocks is not None else max(1, POOL_BLOCKS // lanes)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of all epochs of a data set of `rows` rows."""

    rows: int
    rows_per_block: int
    global_batch_size: int
    window_blocks: int
    max_lanes: int
    seed: int

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    @property
    def num_windows(self) -> int:
        return -(-self.num_blocks // self.window_blocks)

    @property
    def lanes(self) -> int:
        """The largest divisor of the global batch that is at most max_lanes and at most the number of windows."""
        most = max(1, min(self.max_lanes, self.num_windows))
        return next(n for n in range(most, 0, -1) if self.global_batch_size % n == 0)

    @property
    def full_batches(self) -> int:
        return self.rows // self.global_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.global_batch_size)

    def batch_ranges(self, s: int) -> list[Range]:
        """The slots of batch s of an epoch, in order, as half-open ranges of positions."""
        lane_rows = self.rows // self.lanes
        share = self.global_batch_size // self.lanes
        if s < self.full_batches:
            return [(lane * lane_rows + s * share, lane * lane_rows + (s + 1) * share) for lane in range(self.lanes)]
        ranges = [(lane * lane_rows + s * share, (lane + 1) * lane_rows) for lane in range(self.lanes)]
        ranges.append((self.lanes * lane_rows, self.rows))
        return [(start, stop) for start, stop in ranges if start < stop]

    def batch_rows(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of a step (counted over all epochs), in slot order: int64, (n,), n <= G."""
        epoch, s = divmod(step, self.steps_per_epoch)
        return np.concatenate([self.rows_at(epoch, start, stop) for start, stop in self.batch_ranges(s)])

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where positions of an epoch come when its batches are laid end to end, slot after slot: int64, 0 .. rows - 1."""
        lane_rows, share = self.rows // self.lanes, self.global_batch_size // self.lanes
        lane, offset = np.divmod(positions, max(lane_rows, 1))
        last = self.full_batches * share
        full = self.full_batches * self.global_batch_size
        in_full = offset // share * self.global_batch_size + lane * share + offset % share
        in_last = full + lane * (lane_rows - last) + offset - last
        return np.where(positions >= lane_rows * self.lanes, positions, np.where(offset < last, in_full, in_last))

    def queues(self, places: np.ndarray) -> np.ndarray:
        """The queue (see `ReadTask.lane`) that the row at each place comes through: its lane, or `lanes` in the partial batch."""
        share = self.global_batch_size // self.lanes
        full = self.full_batches * self.global_batch_size
        return np.where(places < full, places % self.global_batch_size // share, self.lanes)

    def through(self, places: np.ndarray, queues: np.ndarray) -> np.ndarray:
        """How many of the places before each come through a queue before each: int64."""
        before = np.minimum(places, self.full_batches * self.global_batch_size)
        whole, rest = np.divmod(before, self.global_batch_size)
        slots = queues * (self.global_batch_size // self.lanes)
        return whole * slots + np.minimum(rest, slots)

    def rows_at(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Row numbers at the positions start .. stop - 1 of an epoch: int64, (stop - start,)."""
        parts = []
        for window, first, last in self.windows(epoch, start, stop):
            offset = self.window_start(epoch, window)
            parts.append(self.window_rows(epoch, window)[first - offset : last - offset])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def windows(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The windows that the positions start .. stop - 1 lie in: (window, first position, last position + 1)."""
        _, starts = _block_permutation(self, epoch)
        window = int(np.searchsorted(starts, start, side="right") - 1) // self.window_blocks
        while start < stop:
            end = min(stop, self.window_start(epoch, window + 1))
            if start < end:
                yield window, start, end
            start = max(start, end)
            window += 1

    def window_blocks_of(self, epoch: int, window: int) -> np.ndarray:
        """Numbers of the blocks in a window, in the order they are read: int64."""
        permutation, _ = _block_permutation(self, epoch)
        return permutation[window * self.window_blocks : (window + 1) * self.window_blocks]

    def window_permutation(self, epoch: int, window: int) -> np.ndarray:
        """Permutation of a window's rows, counted in the order of its blocks."""
        size = int(self.block_sizes(epoch, self.window_blocks_of(epoch, window)).sum())
        return np.random.Generator(np.random.Philox([*_key(self.seed, epoch), window])).permutation(size)

    def window_rows(self, epoch: int, window: int) -> np.ndarray:
        """Row numbers of a window, in the order of positions: int64."""
        return self.block_order_rows(epoch, window)[self.window_permutation(epoch, window)]

    def block_order_rows(self, epoch: int, window: int) -> np.ndarray:
        """Row numbers of a window in the order of its blocks, as `window_permutation` counts them: int64."""
        blocks = self.window_blocks_of(epoch, window)
        return np.concatenate(
            [np.arange(block * self.rows_per_block, block * self.rows_per_block + self.block_rows(block)) for block in map(int, blocks)]
        )

    def choose(self, epoch: int, window: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which rows stand at places of a window, counted in its blocks as they are stored, and the "epoch" that each one's random
        choices depend on: int64 (n,) each.
        """
        return self.window_permutation(epoch, window)[places], np.full(len(places), epoch, np.int64)

    def block_sizes(self, epoch: int, blocks: np.ndarray) -> np.ndarray:
        """How many rows of an epoch come from each of some blocks: int64."""
        return np.where(blocks == self.num_blocks - 1, self.block_rows(self.num_blocks - 1), self.rows_per_block)

    def block_rows(self, block: int) -> int:
        return min(self.rows_per_block, self.rows - block * self.rows_per_block)

    def window_start(self, epoch: int, window: int) -> int:
        """The first position of a window."""
        _, starts = _block_permutation(self, epoch)
        return int(starts[min(window * self.window_blocks, self.num_blocks)])


@lru_cache(maxsize=32)  # a mixture has an order for each source
def _block_permutation(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks in the order of an epoch, and the first position of each (with the number of rows at the end)."""
    permutation = np.random.Generator(np.random.Philox([*_key(order.seed, epoch), 2**63])).permutation(order.num_blocks)
    return permutation, np.concatenate([[0], np.cumsum(order.block_sizes(epoch, permutation))])


def _key(seed: int, epoch: int) -> list[int]:
    return [seed & (2**63 - 1), epoch]


# ------------------------------------------------------------------------------------------------------------- reading plan


@dataclass(frozen=True)
class ReadTask:
    """Part of a window that one worker needs: what one data task reads and sends as one run of rows."""

    epoch: int
    window: int
    start: int
    """First position."""
    stop: int
    """Last position + 1."""
    lane_start: int
    """Positions p with low <= (p - lane_start) % share < high are kept, the others belong to other workers."""
    share: int
    low: int
    high: int
    lane: int
    """Which of the worker's queues the rows go to; `lanes` is that of the last, partial batch."""
    step: int
    """The step (counted over all epochs) that needs its first row."""

    @property
    def num_rows(self) -> int:
        return _kept(self.stop - self.lane_start, self) - _kept(self.start - self.lane_start, self)

    def kept(self) -> np.ndarray:
        """The kept positions, ascending: int64."""
        positions = np.arange(self.start, self.stop)
        phase = (positions - self.lane_start) % self.share
        return positions[(phase >= self.low) & (phase < self.high)]


def _kept(offset: int, unit: ReadTask) -> int:
    """How many of the lane's offsets 0 .. offset - 1 the unit's worker keeps."""
    whole, rest = divmod(offset, unit.share)
    return whole * (unit.high - unit.low) + min(max(rest - unit.low, 0), unit.high - unit.low)


def worker_slots(global_batch_size: int, rank: int, world: int) -> Range:
    """The slots of a global batch that a worker takes: a half-open range of at most ceil(G / W)."""
    share = -(-global_batch_size // world)
    return min(rank * share, global_batch_size), min((rank + 1) * share, global_batch_size)


def plan(order: Order, rank: int, world: int, start_step: int, stop_step: int) -> Iterator[ReadTask]:
    """What worker `rank` of `world` has to read for the steps start_step .. stop_step - 1, in the order it is needed."""
    step = start_step
    while step < stop_step:
        epoch, s = divmod(step, order.steps_per_epoch)
        steps = min(order.steps_per_epoch - s, stop_step - step)
        yield from _epoch_plan(order, epoch, s, s + steps, worker_slots(order.global_batch_size, rank, world))
        step += steps


def _epoch_plan(order: Order, epoch: int, start: int, stop: int, slots: Range) -> list[ReadTask]:
    """The units of one epoch's batches start .. stop - 1 for the slots [slots[0], slots[1]) of each batch."""
    first_step = epoch * order.steps_per_epoch
    share = order.global_batch_size // order.lanes
    lane_rows = order.rows // order.lanes
    units = []
    full_stop = min(stop, order.full_batches)
    for lane in range(order.lanes):
        low, high = (min(max(slot - lane * share, 0), share) for slot in slots)
        if low == high or start >= full_stop:
            continue
        base = lane * lane_rows
        for window, first, last in order.windows(epoch, base + start * share, base + full_stop * share):
            unit = ReadTask(epoch, window, first, last, base, share, low, high, lane, 0)
            if unit.num_rows:
                step = (int(unit.kept()[0]) - base) // share
                units.append(ReadTask(epoch, window, first, last, base, share, low, high, lane, first_step + step))
    units.sort(key=lambda unit: (unit.step, unit.lane))
    if stop > order.full_batches:
        for first, last in _cut(order.batch_ranges(order.full_batches), slots):
            for window, low, high in order.windows(epoch, first, last):
                size = high - low
                units.append(ReadTask(epoch, window, low, high, low, size, 0, size, order.lanes, first_step + order.full_batches))
    return units


def _cut(ranges: list[Range], slots: Range) -> Iterator[Range]:
    """The part of a batch's ranges that lies in the given slots."""
    offset = 0
    for start, stop in ranges:
        low, high = max(slots[0] - offset, 0), min(slots[1] - offset, stop - start)
        if low < high:
            yield start + low, start + high
        offset += stop - start


def rank_rows(order: Order, step: int, rank: int, world: int) -> list[tuple[int, int]]:
    """How many rows worker `rank` takes from which of its queues for a step: (lane, rows), in slot order."""
    s = step % order.steps_per_epoch
    slots = worker_slots(order.global_batch_size, rank, world)
    if s < order.full_batches:
        share = order.global_batch_size // order.lanes
        counts = [(lane, min(slots[1], (lane + 1) * share) - max(slots[0], lane * share)) for lane in range(order.lanes)]
        return [(lane, count) for lane, count in counts if count > 0]
    total = sum(stop - start for start, stop in _cut(order.batch_ranges(s), slots))
    return [(order.lanes, total)] if total else []


# ------------------------------------------------------------------------------------------------------- random per sample


def uniforms(seed: int, epoch: np.ndarray | int, rows: np.ndarray, num: int, stream: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, epoch, row, stream) alone: float32, (len(rows), num).

    A counter-based generator (splitmix64's finaliser, Steele et al., OOPSLA 2014, over a mixed key), so that the random choices of a
    sample are the same in whichever process, batch or order it is made. `stream` separates different choices for one sample.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed & (2**64 - 1)) ^ np.uint64(0x9E3779B97F4A7C15))
        key = _mix(key + _mix(np.asarray(epoch).astype(np.uint64) + np.uint64(stream) * np.uint64(0xD1342543DE82EF95)))
        key = _mix(key + np.asarray(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        key = np.broadcast_to(key, np.shape(rows))[:, None]
        counter = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(key + counter)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
