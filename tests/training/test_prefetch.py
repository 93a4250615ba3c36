"""Batches made ahead: begun before the model is there, ended when they are left."""

import threading
from types import SimpleNamespace

import torch

from perceiver.data.manifest import Manifest
from perceiver.tasks import build_task
from perceiver.training import run as run_module
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.prefetch import HeadStart, Prefetch
from perceiver.training.run import Training
from tests.support.small import image_experiment
from tests.support.weights import full

WORLD = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))


class Loader:
    """Of batches that are the numbers of their steps."""

    def __init__(self):
        self.opened, self.closed = [], []

    def steps(self, read_all, rank, world, start, stop):
        self.opened.append((start, stop))
        try:
            for step in range(start, stop):
                yield [{"step": torch.tensor(step)}]
        finally:
            self.closed.append((start, stop))


def steps_of(batches):
    return [int(batch["step"]) for (batch,) in batches]


def test_what_was_begun_is_what_is_taken():
    loader = Loader()
    head = HeadStart(loader, read_here, WORLD)
    head.begin(3, 6)
    assert steps_of(head.take(3, 6, print)) == [3, 4, 5]
    assert loader.opened == [(3, 6)]


def test_a_head_start_at_another_step_is_ended_and_the_right_steps_come():
    loader = Loader()
    head = HeadStart(loader, read_here, WORLD)
    head.begin(0, 100)
    assert steps_of(head.take(7, 9, print)) == [7, 8]
    assert (0, 100) in loader.closed and loader.opened == [(0, 100), (7, 9)]


def test_an_iteration_that_is_left_ends_its_source():
    loader = Loader()
    batches = Prefetch(loader.steps(read_here, 0, 1, 0, 1000), torch.device("cpu"))
    next(iter(batches))
    batches.close()
    assert loader.closed == [(0, 1000)]


def test_reading_begins_before_the_model_is_built_and_rows_are_the_same(images, tmp_path, monkeypatch):
    reads, built = threading.Event(), []
    whole = run_module.build_state

    def build_state(*args):
        built.append(reads.wait(timeout=20))  # it would wait in vain if nothing were read meanwhile
        return whole(*args)

    def read(loader, units):
        reads.set()
        return read_here(loader, units)

    monkeypatch.setattr(run_module, "build_state", build_state)
    weights = []
    for number, read_all in enumerate((read, read_here)):
        made, data = image_experiment(), Manifest.load(images)
        training = Training(made, build_task(made), str(images), data, join_world(torch.device("cpu")), tmp_path / str(number), read_all)
        training.run()
        weights.append([full(p) for p in training.state.model.parameters()])
    assert built == [True, True]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
