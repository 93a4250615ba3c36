"""The order of samples: a pure function of seed and step, the same for every number of workers and every restart."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.data.order import Order, lanes_and_window, plan, rank_rows, uniforms, worker_slots
from perceiver.data.stream import rank_batches

orders = st.builds(
    Order,
    rows=st.integers(1, 700),
    rows_per_block=st.integers(1, 40),
    global_batch_size=st.integers(1, 48),
    window_blocks=st.integers(1, 5),
    max_lanes=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)


def tables(order: Order, rank: int, world: int, start: int, stop: int, cut: int = 7):
    """The rows of a worker's units, cut at places that have nothing to do with the units."""
    rows = [order.rows_at(unit.epoch, 0, order.rows)[unit.kept()] for unit in plan(order, rank, world, start, stop)]
    flat = np.concatenate(rows) if rows else np.empty(0, np.int64)
    for i in range(0, len(flat), cut):
        yield pa.table({"row": flat[i : i + cut]})


def run(order: Order, world: int, start: int, stop: int) -> list[list[int]]:
    """Global batches put together from all workers' parts."""
    streams = [rank_batches(order, r, world, start, stop, tables(order, r, world, start, stop)) for r in range(world)]
    return [[row for part in parts if part is not None for row in part.column("row").to_pylist()] for parts in zip(*streams, strict=True)]


@given(order=orders, epoch=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_an_epoch_has_every_row_exactly_once(order, epoch):
    first = epoch * order.steps_per_epoch
    batches = [order.batch_rows(step) for step in range(first, first + order.steps_per_epoch)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(order.rows))
    assert all(len(batch) == order.global_batch_size for batch in batches[: order.full_batches])
    assert len(batches) - order.full_batches <= 1


@given(order=orders, world=st.integers(1, 5), start=st.integers(0, 30), length=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_any_number_of_workers_sees_the_same_global_batches_from_any_step(order, world, start, length):
    expected = [order.batch_rows(step).tolist() for step in range(start, start + length)]
    assert run(order, world, start, start + length) == expected


def test_different_epochs_and_seeds_give_different_orders():
    order = Order(rows=1000, rows_per_block=10, global_batch_size=100, window_blocks=8, max_lanes=4, seed=1)
    other = Order(rows=1000, rows_per_block=10, global_batch_size=100, window_blocks=8, max_lanes=4, seed=2)
    assert order.batch_rows(0).tolist() != order.batch_rows(10).tolist()
    assert order.batch_rows(0).tolist() != other.batch_rows(0).tolist()


def test_a_batch_mixes_rows_of_all_lanes():
    order = Order(rows=100_000, rows_per_block=100, global_batch_size=64, window_blocks=4, max_lanes=8, seed=0)
    windows = {row // 100 for row in order.batch_rows(5)}
    assert order.lanes == 8 and len(windows) > 16


def test_a_worker_reads_a_window_of_its_lanes_once_an_epoch():
    order = Order(rows=64_000, rows_per_block=100, global_batch_size=64, window_blocks=4, max_lanes=8, seed=0)
    units = list(plan(order, rank=1, world=4, start_step=0, stop_step=order.steps_per_epoch))
    windows = [unit.window for unit in units]
    assert {unit.lane for unit in units} == {2, 3}
    assert len(windows) - len(set(windows)) <= 1  # the window on the border of its two lanes


def test_finding_a_late_step_does_not_walk_there():
    order = Order(rows=10**9, rows_per_block=1024, global_batch_size=2048, window_blocks=16, max_lanes=8, seed=0)
    first = next(plan(order, 0, 8, 300_000, 300_010))
    assert first.step == 300_000 and len(order.batch_rows(300_000)) == 2048


@pytest.mark.parametrize("world", [1, 2, 3, 7, 48])
def test_workers_share_all_slots(world):
    slots = [worker_slots(48, rank, world) for rank in range(world)]
    assert sorted(s for low, high in slots for s in range(low, high)) == list(range(48))


def test_a_batch_smaller_than_the_workers_leaves_some_without_rows():
    order = Order(rows=3, rows_per_block=2, global_batch_size=8, window_blocks=1, max_lanes=4, seed=0)
    assert [sum(n for _, n in rank_rows(order, 0, rank, 4)) for rank in range(4)] == [2, 1, 0, 0]


def test_uniforms_depend_on_seed_epoch_row_and_stream_alone():
    rows = np.arange(1000)
    all_at_once = uniforms(3, 1, rows, 5)
    assert np.array_equal(all_at_once[400:410], uniforms(3, np.full(10, 1), rows[400:410], 5))
    for other in (uniforms(4, 1, rows, 5), uniforms(3, 2, rows, 5), uniforms(3, 1, rows, 5, stream=1)):
        assert (other == all_at_once).mean() < 0.001
    assert np.array_equal(uniforms(3, 1, rows, 2), all_at_once[:, :2])


def test_uniforms_are_uniform_and_uncorrelated():
    values = uniforms(0, 0, np.arange(20_000), 8).astype(np.float64)
    assert 0 <= values.min() and values.max() < 1
    assert np.abs(values.mean(0) - 0.5).max() < 0.01 and np.abs(values.var(0) - 1 / 12).max() < 0.005
    correlation = np.corrcoef(values.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.03
    neighbours = np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


@pytest.mark.parametrize("world", [1, 8, 64, 512])
def test_any_number_of_workers_reads_little_more_than_it_needs(world):
    """C4 in batches of 2,048 windows of 1,024 pieces: 16 million rows, 1,500 steps; of many workers three."""
    lanes, window_blocks = lanes_and_window(num_blocks=62_500, block_bytes=256 * 2_056, global_batch_size=2_048)
    order = Order(rows=16_000_000, rows_per_block=256, global_batch_size=2_048, window_blocks=window_blocks, max_lanes=lanes, seed=0)
    read = needed = 0
    for rank in {0, world // 2, world - 1}:
        for task in plan(order, rank, world, 0, 1_500):
            read += 256 * len(order.window_blocks_of(task.epoch, task.window))
            needed += task.num_rows
    assert read / needed <= 1.1


@pytest.mark.parametrize(("global_batch_size", "most"), [(16, 1.0), (64, 0.9)])
def test_sorted_rows_are_mixed_from_the_first_batch(global_batch_size, most):
    """25,000 rows of two classes, one after the other: a batch's share of a class is no further from a half than that of a fair draw."""
    lanes, window_blocks = lanes_and_window(98, 256 * 600, global_batch_size)
    order = Order(
        rows=25_000, rows_per_block=256, global_batch_size=global_batch_size, window_blocks=window_blocks, max_lanes=lanes, seed=0
    )
    shares = np.array([(order.batch_rows(step) < 12_500).mean() for step in range(300)])
    assert np.sqrt(((shares - 0.5) ** 2).mean()) < most * np.sqrt(0.25 / global_batch_size)


@pytest.mark.parametrize(
    ("blocks", "block_bytes", "size", "given", "found"),
    [
        (16, 1, 64, (None, None), (1, 16)),  # small: shuffled as a whole
        (17, 1, 64, (None, None), (16, 8)),
        (10_000, 2**20, 64, (None, None), (64, 2)),
        (10_000, 2**20, 2_048, (None, None), (512, 1)),
        (10_000, 40 * 2**20, 2_048, (None, None), (128, 1)),  # 512 such blocks were 20 GiB
        (10_000, 1, 1_021, (None, None), (1, 128)),
        (10_000, 1, 2_048, (8, None), (8, 16)),
        (10_000, 1, 2_048, (None, 16), (8, 16)),
        (10_000, 1, 2_048, (None, 4), (32, 4)),
        (4, 1, 2_048, (8, 16), (8, 16)),
    ],
)
def test_lanes_follow_from_the_batch_and_windows_from_the_lanes(blocks, block_bytes, size, given, found):
    assert lanes_and_window(blocks, block_bytes, size, *given) == found
