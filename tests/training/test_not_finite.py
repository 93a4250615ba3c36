"""Losses, gradients and weights that are not finite on one worker: all workers agree to stop or to skip, and nothing good is lost."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from perceiver.checkpoints import list_checkpoints
from perceiver.config import Experiment, UserError, check_tree, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.not_finite import NotFinite
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from tests.support.jobs import weights
from tests.support.small import Call, image_experiment, leave


def training_of(experiment: Experiment, data: Path, folder: Path, *callbacks: Call) -> Training:
    world = join_world(torch.device("cpu"))
    return Training(experiment, build_task(experiment), str(data), Manifest.load(data), world, folder, read_here, callbacks)


def poison(training: Training, steps: set[int], rank: int = 0, what: float = float("nan")) -> None:
    """Makes the loss of the optimizer steps that lead to `steps` not finite, on one worker."""
    plain = training.task.loss

    def loss(model, batch):
        value, sums = plain(model, batch)
        bad = training.state.step + 1 in steps and training.world.rank == rank and model.training
        return (value * what if bad else value), sums

    training.task.loss = loss


def with_skip(limit: int) -> Experiment:
    experiment = image_experiment()
    return replace(experiment, training=replace(experiment.training, skip_not_finite=limit))


def all_finite(folder: Path) -> bool:
    found = [weights(checkpoint.path) for checkpoint in list_checkpoints(folder / "checkpoints")]
    return bool(found) and all(tensor.isfinite().all() for tensors in found for tensor in tensors.values())


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_the_first_bad_step_is_named_its_rows_are_kept_and_the_checkpoints_stay_good(what, images, tmp_path):
    experiment = image_experiment()
    experiment = replace(experiment, run=replace(experiment.run, log_every=4))
    training = training_of(experiment, images, tmp_path)
    poison(training, {5}, what=what)
    with pytest.raises(NotFinite, match="at step 5"):
        training.run()
    (entry,) = json.loads(Run(tmp_path).not_finite_file.read_text())
    assert entry == {"step": 5, "rows": training.train_feed.order.batch_rows(4).tolist()}
    assert all_finite(tmp_path)


def test_weights_that_are_not_finite_make_no_checkpoint_whatever_the_loss_was(images, tmp_path):
    def spoil(step, result):
        if step == 6:
            with torch.no_grad():
                next(training.state.model.parameters()).mul_(float("nan"))

    experiment = image_experiment()
    experiment = replace(experiment, run=replace(experiment.run, val_every=1000))
    training = training_of(experiment, images, tmp_path, Call(after_step=spoil))
    with pytest.raises(NotFinite, match="weights became NaN or infinite at step 6 and are not saved"):
        training.run()
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [3] and all_finite(tmp_path)


def test_skipped_steps_change_nothing_and_are_counted_also_over_a_restart(images, tmp_path):
    training = training_of(with_skip(2), images, tmp_path)
    poison(training, {2, 7})
    training.run()
    assert training.finiteness.skipped == [2, 7] and all_finite(tmp_path)
    assert [entry["step"] for entry in json.loads(Run(tmp_path).not_finite_file.read_text())] == [2, 7]
    assert all(record["loss"] == record["loss"] for record in Run(tmp_path).metrics() if "loss" in record)
    continued = training_of(with_skip(2), images, tmp_path)
    assert continued.finiteness.skipped == [2, 7]


def test_one_skip_too_many_ends_the_run(images, tmp_path):
    training = training_of(with_skip(1), images, tmp_path)
    poison(training, {2, 7})
    with pytest.raises(NotFinite, match="at 2 steps, the last at step 7, and training.skip-not-finite is 1"):
        training.run()


def test_the_option_to_skip_changes_no_bit_of_a_training_without_such_steps(images, tmp_path):
    training_of(image_experiment(), images, tmp_path / "plain").run()
    training_of(with_skip(3), images, tmp_path / "skipping").run()
    one, other = (weights(list_checkpoints(tmp_path / name / "checkpoints")[-1].path) for name in ("plain", "skipping"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_negative_number_of_skips_is_refused():
    with pytest.raises(UserError, match="training.skip-not-finite is -1"):
        check_tree(with_skip(-1))


def worker(rank: int, port: int, config: dict, data: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    training = training_of(from_dict(config), Path(data), Path(folder))
    poison(training, {5}, rank=1)
    try:
        training.run()
    except NotFinite:
        os._exit(3)
    assert training.finiteness.skipped == [5]
    leave()


@pytest.mark.parametrize("limit, status", [(0, 3), (1, 0)])
def test_all_workers_agree_on_what_one_of_them_has_met(limit, status, images, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    args = (port, to_dict(with_skip(limit)), str(images), str(tmp_path))
    processes = [context.Process(target=worker, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [status, status]
    assert all_finite(tmp_path)
