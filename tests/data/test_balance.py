"""Class-balanced sampling: shares, multiplicities, and the same order for every number of workers and every start."""

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver.config import UserError
from perceiver.data.balance import COPY, BalancedOrder, Copies, described, read_classes, shares
from perceiver.data.order import Order
from perceiver.tasks import build_task
from perceiver.training.batches import make_train_loader, read_here
from tests.support.small import image_experiment, text_experiment, write_images, write_stream

LABELS = np.random.default_rng(0).choice(4, 997, p=[0.8, 0.15, 0.04, 0.01])


def order_of(labels=LABELS, most=6, **fields):
    usual = dict(rows=len(labels), rows_per_block=32, global_batch_size=24, window_blocks=4, max_lanes=4, seed=3)
    return BalancedOrder(**(usual | fields), copies=Copies(labels, most))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=12), st.integers(2, 20))
def test_shares_fill_an_epoch_and_keep_their_bound(counts, most):
    given_, counts = shares(counts, most), np.array(counts)
    assert given_.sum() == counts.sum() and (given_ <= counts * most).all() and (given_[counts > 0] > 0).all()
    free = given_[(counts > 0) & (given_ < counts * most)]
    assert not len(free) or free.max() - free.min() <= 1, "those without their bound have equal shares"


def test_each_class_has_its_share_in_every_epoch_and_no_row_comes_too_often():
    copies = Copies(LABELS, 6)
    for epoch in range(5):
        times = copies.of(epoch, slice(None))
        assert np.bincount(LABELS, times).tolist() == shares(np.bincount(LABELS), 6).tolist()
        assert times.max() <= 6
        for label in range(4):
            assert np.ptp(times[LABELS == label]) <= 1
    assert np.array_equal(copies.of(3, np.arange(100, 200)), copies.of(3, slice(None))[100:200])


def test_rows_of_a_frequent_class_come_in_turn():
    copies, most_frequent = Copies(LABELS, 6), LABELS == 0
    given_ = int(shares(np.bincount(LABELS), 6)[0])
    epochs = -(-int(most_frequent.sum()) // given_)
    seen = sum(copies.of(epoch, slice(None)) for epoch in range(epochs))
    assert seen[most_frequent].min() >= 1, "all have come before one comes again and again"
    first = np.flatnonzero((copies.of(0, slice(None)) > 0) & most_frequent)
    assert len(first) == given_ and np.ptp(first) > 0.9 * len(LABELS), "they are spread over the data"


@pytest.mark.parametrize("fields", [{}, {"max_lanes": 1, "window_blocks": 100}, {"global_batch_size": 2000}, {"rows_per_block": 5}])
def test_an_epoch_has_each_row_as_often_as_it_should(fields):
    order = order_of(**fields)
    for epoch in (0, 4):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        found = np.concatenate([order.batch_rows(step) for step in steps])
        assert np.array_equal(np.bincount(found, minlength=order.rows), order.copies.of(epoch, slice(None)))
    plain = Order(**{name: value for name, value in vars(order).items() if name != "copies"})
    assert order.steps_per_epoch == plain.steps_per_epoch


def test_orders_of_other_labels_are_others_and_travel():
    order = order_of()
    again = pickle.loads(pickle.dumps(order))
    assert again == order and hash(again) == hash(order) and np.array_equal(again.batch_rows(7), order.batch_rows(7))
    assert order_of(most=7) != order and order_of(labels=LABELS[::-1]) != order


@pytest.fixture
def images(tmp_path):
    manifest = write_images(tmp_path, train=101)
    experiment = image_experiment(global_batch_size=8, max_steps=40)
    balanced = replace(experiment, data=replace(experiment.data, balance=5), task=replace(experiment.task, random_crop=None))
    return balanced, str(tmp_path), manifest


def rows_of_steps(loader, world, start, stop):
    """(row, epoch) of each step's slots, over all workers."""
    found = [[] for _ in range(start, stop)]
    for rank in range(world):
        tables = map(loader.reader.read, loader.plan(rank, world, start, stop))
        for step, rows in enumerate(loader.batches(rank, world, start, stop, tables)):
            if rows is not None:
                found[step] += zip(rows["row"].to_pylist(), rows["epoch"].to_pylist(), rows["label"].to_pylist(), strict=True)
    return found


def test_batches_are_the_same_for_all_workers_and_from_any_start(images):
    experiment, folder, manifest = images
    loader = make_train_loader(experiment, build_task(experiment), folder, manifest)
    assert isinstance(loader.order, BalancedOrder)
    steps = 2 * loader.order.steps_per_epoch
    whole = rows_of_steps(loader, 1, 0, steps)
    assert [[row for row, *_ in step] for step in whole] == [loader.order.batch_rows(step).tolist() for step in range(steps)]
    for world in (2, 3):
        assert rows_of_steps(loader, world, 0, steps) == whole
    assert rows_of_steps(loader, 2, 17, steps) == whole[17:], "a run that continues"
    labels = read_classes(folder, manifest.splits["train"], "label", lambda table: table["label"].to_numpy())
    assert all(labels[row] == label for step in whole for row, _, label in step)
    epoch = whole[: loader.order.steps_per_epoch]
    keys = Counter((row, epoch) for step in epoch for row, epoch, _ in step)
    assert max(keys.values()) == 1, "copies of a row have random choices of their own"
    copies = Counter(row for step in epoch for row, *_ in step)
    assert max(copies.values()) > 1 and {epoch >> COPY for _, epoch in keys} == set(range(max(copies.values())))


def test_collated_batches_do_not_depend_on_the_workers(images):
    experiment, folder, manifest = images
    loader = make_train_loader(experiment, build_task(experiment), folder, manifest)
    alone = [step[0] for step in loader.steps(read_here, 0, 1, 5, 8)]
    halves = [[step[0] for step in loader.steps(read_here, rank, 2, 5, 8)] for rank in (0, 1)]
    for step, whole in enumerate(alone):
        for name, values in whole.items():
            assert np.array_equal(np.concatenate([halves[0][step][name], halves[1][step][name]]), values)


def test_what_cannot_be_balanced_is_said(tmp_path):
    experiment = text_experiment()
    manifest = write_stream(tmp_path, np.arange(400, dtype=np.uint16) % 50, np.arange(100, dtype=np.uint16) % 50)
    chosen = replace(experiment, data=replace(experiment.data, balance=4))
    with pytest.raises(UserError, match="--data.balance is 4, but CausalLM has no one class for each row: leave it out"):
        make_train_loader(chosen, build_task(chosen), str(tmp_path), manifest)
    with pytest.raises(UserError, match="--data.balance is 1 and must be at least 2"):
        replace(experiment.data, balance=1).check("data.")


def test_the_plan_says_what_becomes_of_each_class():
    text = described([90, 0, 10], ("cat", "cow", "dog"), 3)
    assert text == "cat 90.0% -> 70.0% (each row 0.778 times), dog 10.0% -> 30.0% (each row 3 times); no row more than 3 times an epoch"
