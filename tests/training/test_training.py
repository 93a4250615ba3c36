"""The training loop without Ray: one process, or several processes with gloo, through the same code that the workers run."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from perceiver.checkpoints import choose_checkpoint, list_checkpoints
from perceiver.config import Experiment, ParallelConfig, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.data.shards import read_block
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.not_finite import NotFinite
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from tests.support.small import Call, image_experiment, leave, loader_of, text_experiment, write_images, write_stream
from tests.support.weights import full


def train_here(rank: int, world: int, port: int, config: dict, data: str, run: str, stop_at: int | None, pipe) -> None:
    """One worker: trains, optionally dies right after a step, and sends its losses and final weights."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    experiment: Experiment = from_dict(config)
    training = Training(
        experiment, build_task(experiment), data, Manifest.load(data), join_world(torch.device("cpu")), Path(run), read_here,
        [Call(after_validation=lambda step, metrics: _die(training) if stop_at is not None and step >= stop_at else None)],
    )  # fmt: skip
    training.run()
    weights = {name: full(p).numpy() for name, p in training.state.model.named_parameters()}
    if pipe is not None and rank == 0:
        np.savez(pipe, **weights)
    leave()


def _die(training: Training) -> None:
    """Ends the process without a word, but not before the checkpoint that is being written is complete: how far a thread
    has come by now would depend on the machine."""
    training.checkpointer.close()
    os._exit(9)


def run(
    experiment: Experiment, data: Path, folder: Path, world: int = 1, stop_at: int | None = None, timeout: float = 240
) -> dict[str, np.ndarray]:
    """Trains with `world` processes; weights by name, or nothing if they had to die."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    output = folder.with_suffix(f".{world}.npz")
    args = (world, port, to_dict(experiment), str(data), str(folder), stop_at, str(output))
    processes = [context.Process(target=train_here, args=(rank, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
    if stop_at is not None:
        assert all(process.exitcode for process in processes)
        return {}
    assert [process.exitcode for process in processes] == [0] * world
    return dict(np.load(output))


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in Run(folder).metrics() if "loss" in record]


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """Weights and losses of an undisturbed training with two workers, with dropout."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return run(image_experiment(), images, folder, world=2), losses(folder)


def without_dropout(experiment: Experiment) -> Experiment:
    return replace(experiment, model=replace(experiment.model, encoder=replace(experiment.model.encoder, dropout=0.0)))


def test_a_killed_run_continues_to_bitwise_the_same_weights_and_records(images, uninterrupted, tmp_path):
    weights, curve = uninterrupted
    folder = tmp_path / "run"
    run(image_experiment(), images, folder, world=2, stop_at=8)
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [6, 9]
    continued = run(image_experiment(), images, folder, world=2)
    assert continued.keys() == weights.keys()
    assert all(np.array_equal(continued[name], weights[name]) for name in weights)
    assert losses(folder) == curve
    assert [r["step"] for r in Run(folder).metrics() if "loss" in r] == list(range(1, 13))


def test_two_workers_agree_to_leave_a_checkpoint_that_is_damaged_for_one_of_them(images, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    run(image_experiment(), images, folder, world=2, stop_at=8)
    shard = folder / "checkpoints" / "step-00000009" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    continued = run(image_experiment(), images, folder, world=2)
    assert all(np.array_equal(continued[name], weights) for name, weights in uninterrupted[0].items())
    assert (folder / "checkpoints" / "damaged-step-00000009" / shard.name).is_file()


def test_another_number_of_workers_gives_the_same_losses(images, tmp_path):
    experiment = without_dropout(image_experiment())
    one = run(experiment, images, tmp_path / "one", world=1)
    two = run(experiment, images, tmp_path / "two", world=2)
    # Sums are taken in another order, so float32 rounds differently: 1e-5 relative after 12 steps.
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
    # The gradient of key biases is mathematically 0: Adam scales its rounding error up to whole steps.
    differences = {name: np.abs(one[name] - two[name]).max() for name in one if not name.endswith("k_proj.bias")}
    assert max(differences.values()) < 1e-4, differences


def test_a_checkpoint_of_two_workers_continues_on_one(images, tmp_path):
    experiment = without_dropout(image_experiment())
    run(experiment, images, tmp_path / "plain", world=1)
    run(experiment, images, tmp_path / "run", world=2, stop_at=8)
    run(experiment, images, tmp_path / "run", world=1)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=1e-5)


def test_accumulation_gives_the_same_losses_as_one_batch(images, tmp_path):
    experiment = without_dropout(image_experiment())
    run(experiment, images, tmp_path / "whole")
    run(replace(experiment, parallel=ParallelConfig(micro_batch_size=5)), images, tmp_path / "parts")
    np.testing.assert_allclose(losses(tmp_path / "whole"), losses(tmp_path / "parts"), rtol=1e-5)


def test_activation_checkpointing_changes_nothing(images, uninterrupted, tmp_path):
    weights, curve = uninterrupted
    again = run(replace(image_experiment(), parallel=ParallelConfig(activation_checkpointing=1)), images, tmp_path / "run", world=2)
    np.testing.assert_allclose(losses(tmp_path / "run"), curve, rtol=1e-6)
    assert max(np.abs(again[name] - weights[name]).max() for name in weights) < 1e-5


def test_training_learns_and_keeps_the_newest_and_the_best(images, tmp_path):
    experiment = image_experiment(max_steps=200)
    experiment = replace(experiment, run=replace(experiment.run, val_every=50, checkpoint_every=50, keep_checkpoints=1))
    run(experiment, images, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val_acc"] > 0.9 and result["step"] == 200
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    best = min((r for r in Run(tmp_path / "run").metrics() if "val_loss" in r), key=lambda r: r["val_loss"])
    assert {c.step for c in checkpoints} == {200, best["step"]}
    assert choose_checkpoint(tmp_path / "run" / "checkpoints", "best", "val_loss").step == best["step"]


def test_a_folder_without_its_marker_is_not_a_checkpoint(images, tmp_path):
    run(image_experiment(), images, tmp_path / "run", stop_at=8)
    folder = tmp_path / "run" / "checkpoints"
    complete = list_checkpoints(folder)
    (complete[-1].path / "checkpoint.json").unlink()
    assert [c.step for c in list_checkpoints(folder)] == [c.step for c in complete[:-1]]


def test_a_loss_that_is_not_finite_stops_the_training_with_a_reason(images, tmp_path):
    experiment = image_experiment()
    experiment = replace(experiment, optim=replace(experiment.optim, lr=1e30, max_grad_norm=None, warmup_steps=0))
    training = Training(
        experiment, build_task(experiment), str(images), Manifest.load(images), join_world(torch.device("cpu")),
        tmp_path / "run", read_here,
    )  # fmt: skip
    with pytest.raises(NotFinite, match="(the loss|weights|the gradient's norm) became .* step"):
        training.run()


def test_a_checkpoint_that_a_callback_asks_for_is_made_between_the_usual_ones(images, tmp_path):
    experiment = image_experiment()
    callback = Call(after_step=lambda step, result: callback.training.save() if step == 4 else None)
    experiment = replace(experiment, run=replace(experiment.run, keep_checkpoints=20))
    Training(
        experiment, build_task(experiment), str(images), Manifest.load(images), join_world(torch.device("cpu")),
        tmp_path / "run", read_here, [callback],
    ).run()  # fmt: skip
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [3, 5, 6, 9, 12]


@pytest.mark.parametrize("rows, world", [(5, 1), (5, 2), (100, 1), (100, 3)])
def test_validation_is_exact_for_every_number_of_workers_and_rows(rows, world, tmp_path):
    """Also a set smaller than one batch, and one that the workers do not divide."""
    manifest = write_images(tmp_path / "data", train=rows, val=rows)
    experiment = without_dropout(image_experiment())
    task = build_task(experiment)
    loader = loader_of(experiment, task, str(tmp_path / "data"), manifest.splits["val"], train=False)
    labels, targets = [], 0
    for rank in range(world):
        for step in loader.steps(read_here, rank, world, 0, loader.order.steps_per_epoch):
            assert len({batch["images"].shape for batch in step}) == 1
            for batch in step:
                targets += int(task.num_targets(batch))
                labels += batch["labels"][batch["labels"] >= 0].tolist()
    split = manifest.splits["val"]
    expected = [x for b in range(split.num_blocks) for x in read_block(tmp_path / "data", split, b)["label"].to_pylist()]
    assert targets == rows and sorted(labels) == sorted(expected)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    train, val = rng.integers(6, 262, 1000).astype(np.uint16), rng.integers(6, 262, 301).astype(np.uint16)
    return folder, write_stream(folder, train, val), train, val


def targets_of(loader, task, stop: int) -> list[int]:
    found = []
    for step in loader.steps(read_here, 0, 1, 0, stop):
        for batch in step:
            found += batch["labels"][batch["labels"] >= 0].tolist()
    return found


def test_windows_are_those_of_the_stream_and_labels_the_next_ids(stream):
    folder, manifest, train, _ = stream
    experiment = replace(text_experiment(), task=replace(text_experiment().task, random_shift=False))
    task = build_task(experiment)
    loader = loader_of(experiment, task, str(folder), manifest.splits["train"], train=True)
    rows = loader.order.batch_rows(3)
    (batch,) = next(iter(loader.steps(read_here, 0, 1, 3, 4)))
    for row, ids, labels in zip(rows, batch["ids"].numpy(), batch["labels"].numpy(), strict=True):
        window = train[row * 16 : row * 16 + 17]
        if len(window) == 17:
            assert ids.tolist() == window[:-1].tolist() and labels.tolist() == window[-8:].tolist()


def test_the_last_window_is_padded_on_the_left_and_its_padding_is_no_target(stream):
    folder, manifest, _, val = stream
    experiment = text_experiment(global_batch_size=1)
    task = build_task(experiment)
    loader = loader_of(experiment, task, str(folder), manifest.splits["val"], train=False)
    last = manifest.splits["val"].rows - 1
    (step,) = [s for s in range(loader.order.rows) if loader.order.batch_rows(s).tolist() == [last]]
    (batch,) = next(iter(loader.steps(read_here, 0, 1, step, step + 1)))
    real = len(val) - last * 16 - 1
    assert batch["pad_mask"][0].tolist() == [True] * (16 - real) + [False] * real
    assert batch["ids"][0, 16 - real :].tolist() == val[last * 16 : -1].tolist()
    assert (batch["labels"][0] >= 0).sum() == min(real, 8)


@pytest.mark.parametrize("size", [2, 5, 9, 12, 16, 17, 18, 40, 301])
def test_a_stride_of_the_latents_scores_every_target_once_and_shows_what_comes_before_it(size, tmp_path):
    """Also of texts that end within the first window. Ids are unique, so that each tells its place."""
    val = np.arange(1000, 1000 + size).astype(np.uint16)
    manifest = write_stream(tmp_path, val, val)
    experiment = text_experiment()
    experiment = replace(experiment, task=replace(experiment.task, val_stride=8))
    task = build_task(experiment)
    loader = loader_of(experiment, task, str(tmp_path), manifest.splits["val"], train=False)
    assert sorted(targets_of(loader, task, loader.order.steps_per_epoch)) == val[1:].tolist()
    for (batch,) in loader.steps(read_here, 0, 1, 0, loader.order.steps_per_epoch):
        pad_mask = batch.get("pad_mask", torch.zeros_like(batch["ids"], dtype=torch.bool))
        for ids, labels, padding in zip(batch["ids"], batch["labels"], pad_mask, strict=True):
            for place in torch.nonzero(labels >= 0)[:, 0].tolist():
                before = ids[: 16 - 8 + place + 1][~padding[: 16 - 8 + place + 1]]
                target = int(labels[place])
                assert before.tolist() == list(range(target - len(before), target))
                assert len(before) >= min(9, target - 1000), "a whole prefix, or all there is"


def test_shifted_windows_of_an_epoch_cover_the_stream_from_the_shift_on(stream):
    folder, manifest, train, _ = stream
    experiment = text_experiment()
    task = build_task(experiment)
    split = manifest.splits["train"]
    loader = loader_of(experiment, task, str(folder), split, train=True)
    steps = loader.order.steps_per_epoch
    heads = set()
    for epoch in (1, 2):
        shift = task._shift(epoch, 16)
        rows = [row for step in range(epoch * steps, (epoch + 1) * steps) for row in loader.order.batch_rows(step)]
        windows = [ids for step in loader.steps(read_here, 0, 1, epoch * steps, (epoch + 1) * steps) for ids in step[0]["ids"].numpy()]
        for row, ids in zip(rows, windows[: len(rows)], strict=False):
            window = train[row * 16 + shift : row * 16 + shift + 17]
            if len(window) == 17:
                assert ids.tolist() == window[:-1].tolist()
        heads.add(shift)
    assert len(heads) == 2


def test_prefix_dropout_depends_on_seed_epoch_and_row_alone(stream):
    folder, manifest, _, _ = stream
    task = build_task(text_experiment())
    loader = loader_of(text_experiment(), task, str(folder), manifest.splits["train"], train=True)
    (whole,) = next(iter(loader.steps(read_here, 0, 1, 5, 6)))
    halves = [next(iter(loader.steps(read_here, rank, 2, 5, 6)))[0] for rank in range(2)]
    assert whole["prefix_keep"].shape == (6, 4)
    assert torch.equal(whole["prefix_keep"], torch.cat([half["prefix_keep"] for half in halves]))
    assert torch.equal(whole["ids"], torch.cat([half["ids"] for half in halves]))


def test_data_that_does_not_come_is_noticed():
    import threading

    from perceiver.training.prefetch import Prefetch

    class Impatient(Prefetch):
        STALL_SECONDS = 0.05

    release, waits = threading.Event(), []

    def source():
        release.wait()
        yield [{"x": torch.ones(1)}]

    def stalled(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            release.set()

    assert len(list(Impatient(source(), torch.device("cpu"), stalled=stalled))) == 1
    assert len(waits) >= 3 and waits == sorted(waits)
