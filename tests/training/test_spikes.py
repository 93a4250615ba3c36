"""Spikes of the loss: the update is left out, or the weights return to a good checkpoint; all workers agree, also after a restart."""

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
from perceiver.runs import Run
from perceiver.training.run import Training
from perceiver.training.spikes import LossSpikes
from tests.support.jobs import losses, weights
from tests.support.small import image_experiment, leave
from tests.training.test_not_finite import all_finite, poison, training_of


def with_spikes(answer: str, **settings) -> Experiment:
    experiment = image_experiment(max_steps=40, on_spike=answer, **settings)
    return replace(experiment, run=replace(experiment.run, val_every=20, checkpoint_every=5, keep_checkpoints=10))


def at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return weights(folder / "checkpoints" / f"step-{step:08d}")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(experiment: Experiment, images: Path, folder: Path, spikes: set[int], what: float = 50.0, stop_at: int | None = None) -> Training:
    training = training_of(experiment, images, folder)
    if stop_at is not None:
        training.stop_step = stop_at
    poison(training, spikes, what=what)
    training.run()
    return training


def test_the_weights_return_to_the_last_good_checkpoint_and_the_rows_since_are_kept(images, tmp_path):
    training = run(with_spikes("rollback"), images, tmp_path, {27})
    assert same(at(tmp_path, 27), at(tmp_path, 15)) and not same(at(tmp_path, 27), at(tmp_path, 25))
    (spike,) = json.loads(Run(tmp_path).spikes_file.read_text())
    assert (spike["step"], spike["back_to"]) == (27, 15) and spike["loss"] > spike["limit"] > spike["usual"]
    order = training.train_feed.order
    assert spike["left_out"] == [{"step": step, "rows": order.batch_rows(step - 1).tolist()} for step in range(16, 28)]
    assert not same(at(tmp_path, 30), at(tmp_path, 27)) and training.state.step == 40


def test_the_update_alone_is_left_out_where_that_is_asked_for(images, tmp_path):
    run(with_spikes("skip"), images, tmp_path, {25})
    run(with_spikes("ignore"), images, tmp_path / "plain", set(), stop_at=24)
    assert same(at(tmp_path, 25), at(tmp_path / "plain", 24))
    assert [len(spike["left_out"]) for spike in json.loads(Run(tmp_path).spikes_file.read_text())] == [1]


@pytest.mark.parametrize(
    "answer, stop",
    [("rollback", 23), ("rollback", 25), ("rollback", 31), ("skip", 25)],
    ids=["before it", "at it", "after it", "at one that is left out"],
)
def test_a_run_that_is_continued_is_the_one_without_an_interruption(stop, answer, images, tmp_path):
    experiment = with_spikes(answer)
    run(experiment, images, tmp_path / "whole", {25})
    run(experiment, images, tmp_path / "parts", {25}, stop_at=stop)
    continued = run(experiment, images, tmp_path / "parts", {25})
    assert [spike["step"] for spike in continued.spikes.found] == [25]
    assert same(at(tmp_path / "whole", 40), at(tmp_path / "parts", 40))
    assert dict(losses(tmp_path / "whole")).items() <= dict(losses(tmp_path / "parts")).items()


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_spike_also_at_the_start(what, images, tmp_path):
    training = run(with_spikes("rollback"), images, tmp_path, {2, 9}, what=what)
    assert [(spike["step"], spike["back_to"]) for spike in training.spikes.found] == [(2, None), (9, 5)] and all_finite(tmp_path)


def test_one_spike_too_many_ends_the_run(images, tmp_path):
    with pytest.raises(LossSpikes, match="step 26 is a spike.*it is number 2, and training.max-spikes is 1"):
        run(with_spikes("skip", max_spikes=1), images, tmp_path, {24, 26})


def test_a_checkpoint_that_is_damaged_is_not_returned_to(images, tmp_path):
    experiment = with_spikes("rollback")
    run(experiment, images, tmp_path, set(), stop_at=26)
    path = next(Run(tmp_path).checkpoints_folder.glob("step-00000015/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    training = run(experiment, images, tmp_path, {27})
    assert training.spikes.found[0]["back_to"] == 10 and (tmp_path / "checkpoints" / "damaged-step-00000015").exists()


def test_the_option_changes_no_bit_of_a_training_without_spikes(images, tmp_path):
    for answer in ("ignore", "rollback"):
        run(with_spikes(answer), images, tmp_path / answer, set())
    assert same(*(at(tmp_path / answer, 40) for answer in ("ignore", "rollback")))
    assert not Run(tmp_path / "rollback").spikes_file.exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"spike_deviations": 0.0}, "--training.spike-deviations is 0.0 and must be above 0"),
        ({"max_spikes": -1}, "--training.max-spikes is -1 and must not be negative"),
        ({"skip_not_finite": 2}, "--training.skip-not-finite is 2 and --training.on-spike is skip"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_tree(with_spikes("skip", **settings))


def worker(rank: int, port: int, config: dict, data: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    training = training_of(from_dict(config), Path(data), Path(folder))
    poison(training, {26}, rank=1, what=100.0)
    training.run()
    if [(spike["step"], spike["back_to"]) for spike in training.spikes.found] != [(26, 15)]:
        os._exit(4)
    leave()


def test_all_workers_return_where_one_of_them_has_met_a_spike(images, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    args = (port, to_dict(with_spikes("rollback")), str(images), str(tmp_path))
    processes = [context.Process(target=worker, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert same(at(tmp_path, 26), at(tmp_path, 15)) and list_checkpoints(tmp_path / "checkpoints")[-1].step == 40
