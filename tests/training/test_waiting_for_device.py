"""A training step asks the device for no number: whoever reads one waits until everything that was queued before is done."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver.config import RunConfig
from perceiver.data.manifest import Manifest
from perceiver.tasks import build_task
from perceiver.training import loop
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from tests.support.small import (
    Call,
    classification_experiment,
    image_experiment,
    masked_experiment,
    text_experiment,
    write_documents,
    write_images,
    write_stream,
)

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2,
    aten.unique_consecutive, aten.bincount, aten.histc,
}  # fmt: skip
"""Operators that on a GPU wait for a number: one that a program reads, or the size of what they return."""


class NoWaiting(TorchDispatchMode):
    """Refuses, on a CPU, what would wait on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or func.overloadpacket in WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def write_text(folder: Path, length: int = 16) -> None:
    train, val = (np.random.default_rng(0).integers(6, 262, size).astype(np.uint16) for size in (4000, 400))
    write_stream(folder, train, val, length)


def train(experiment, write, folder: Path, **hooks) -> int:
    """Trains; nothing may wait in the steps 3 to 8, between which nothing is logged. Returns the last step."""
    write(folder)
    modes, task = ExitStack(), build_task(experiment)

    def after_step(step, result):
        if step == 2:
            modes.enter_context(NoWaiting())
        for hook in hooks.values():
            hook(step, result)
        if step == 8:
            modes.close()

    manifest, world = Manifest.load(str(folder)), join_world(torch.device("cpu"))
    training = Training(experiment, task, str(folder), manifest, world, folder / "run", read_here, [Call(after_step=after_step)])
    with modes:  # also where a step fails: else it would hold in the tests after this one
        training.run()
    return training.state.step


def quiet(experiment):
    """Without validation, checkpoint or line of progress before the last step."""
    return replace(experiment, run=RunConfig(log_every=50, val_every=50, checkpoint_every=50))


@pytest.fixture
def copied(monkeypatch):
    """The one number that is read in a step was copied from a GPU when the step began; on a CPU there is nothing to copy."""
    monkeypatch.setattr(loop.Agreed, "requests", lambda self: frozenset())


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (image_experiment, write_images),
        (text_experiment, write_text),
        (masked_experiment, lambda folder: write_text(folder, 32)),
        (classification_experiment, write_documents),
    ],
)
def test_no_step_waits_for_the_device(make, write, tmp_path, copied):
    assert train(quiet(make()), write, tmp_path) == 12


def test_a_step_that_reads_a_number_is_found(tmp_path, copied):
    with pytest.raises(AssertionError, match="waits for the device"):
        train(quiet(image_experiment()), write_images, tmp_path, read=lambda step, result: result.loss_sum.item())
