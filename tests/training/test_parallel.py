"""Numbers proof: the same training under any number of workers, sharding, recomputation and accumulation.

Processes with gloo, through the code that Ray's workers run. `python -m tests.training.test_parallel` prints the numbers.
"""

import multiprocessing
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from perceiver.checkpoints import list_checkpoints
from perceiver.config import Cosine, Experiment, ParallelConfig, UserError, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training
from ray_jobs.preflight import check_experiment
from tests.support.small import leave, text_experiment, write_stream

STEPS = 50
LAYOUTS = {
    "1 worker": ParallelConfig(workers=1),
    "2 workers": ParallelConfig(workers=2),
    "4 workers": ParallelConfig(workers=4),
    "2 x 2 workers (HSDP)": ParallelConfig(workers=4, replicas=2),
    "2 workers, every layer recomputed": ParallelConfig(workers=2, activation_checkpointing=1),
    "2 workers, every second layer recomputed": ParallelConfig(workers=2, activation_checkpointing=2),
    "2 workers, 2 layers together": ParallelConfig(workers=2, layers_per_unit=2),
    "2 workers, recomputed, 2 layers together, kept": ParallelConfig(
        workers=2, layers_per_unit=2, reshard_after_forward=False, activation_checkpointing=1
    ),
    "1 worker, 4 accumulated micro-batches": ParallelConfig(workers=1, micro_batch_size=2),
    "2 workers, recomputed, 2 accumulated": ParallelConfig(workers=2, micro_batch_size=2, activation_checkpointing=1),
}
TOLERANCE = 2e-5
"""Relative, for every loss of 50 steps: fp32 sums are taken in another order, and Adam carries that on."""


def experiment() -> Experiment:
    """A Perceiver AR with all that clm-c4 has: windows of random length, clipping, a cosine; 8 examples a step."""
    base = text_experiment(global_batch_size=8, max_steps=STEPS)
    return replace(
        base,
        task=replace(base.task, min_seq_len=8, random_shift=False),
        model=replace(base.model, cross_attention_dropout=0.0, abs_pos_emb=False, output_norm=True, output_bias=False),
        optim=replace(base.optim, lr=3e-3, schedule=Cosine(min_lr_fraction=0.1), warmup_steps=5, max_grad_norm=1.0),
        run=replace(base.run, val_every=STEPS, checkpoint_every=20, log_every=1),
    )


def worker(rank: int, port: int, config: dict, data: str, folder: str, stop_at: int | None) -> None:
    torch.set_num_threads(1)
    made: Experiment = from_dict(config)
    size = made.parallel.workers
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = join_world(torch.device("cpu"), made.parallel.replicas)
    if made.parallel.replicas > 1:
        assert world.mesh.shape == (made.parallel.replicas, size // made.parallel.replicas)
    settings = {} if stop_at is None else {"stop_at": stop_at}
    manifest, task = Manifest.load(data), build_task(made)
    Training(made, task, data, manifest, world, Path(folder), read_here, **settings).run()
    leave()


def train(made: Experiment, data: Path, folder: Path, stop_at: int | None = None) -> None:
    """Trains with as many processes as the experiment has workers, forked from a server that has all imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_parallel"])
    args = (port, to_dict(made), str(data), str(folder), stop_at)
    processes = [context.Process(target=worker, args=(rank, *args)) for rank in range(made.parallel.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def losses(folder: Path) -> np.ndarray:
    return np.array([record["loss"] for record in Run(folder).metrics() if "loss" in record])


def val_loss(folder: Path) -> float:
    return Run(folder).metrics()[-1]["val_loss"]


def make_data(folder: Path) -> Path:
    """Text with something to learn: each id follows from the one before it three times out of four."""
    rng = np.random.default_rng(0)
    ids = [6]
    for follows, other in zip(rng.random(6000) < 0.75, rng.integers(6, 262, 6000), strict=True):
        ids.append((ids[-1] * 7 + 1) % 256 + 6 if follows else int(other))
    write_stream(folder, np.array(ids[:5000], np.uint16), np.array(ids[5000:], np.uint16))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    train(experiment(), data, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1 worker"])
def test_every_layout_gives_the_same_losses(layout, data, alone, tmp_path):
    train(replace(experiment(), parallel=LAYOUTS[layout]), data, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == STEPS and losses(alone)[-5:].mean() < losses(alone)[:5].mean() - 0.05
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=TOLERANCE)
    np.testing.assert_allclose(val_loss(tmp_path / "run"), val_loss(alone), rtol=TOLERANCE)


@pytest.mark.slow
def test_a_run_of_two_replicas_of_two_workers_continues_on_one_worker(data, alone, tmp_path):
    made = experiment()
    train(replace(made, parallel=ParallelConfig(workers=4, replicas=2)), data, tmp_path / "run", stop_at=20)
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [20]
    train(made, data, tmp_path / "run")
    assert [r["step"] for r in Run(tmp_path / "run").metrics() if "loss" in r] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=TOLERANCE)


@pytest.mark.slow
def test_shards_in_the_hosts_memory_give_the_same_losses(data, alone, tmp_path):
    train(replace(experiment(), parallel=ParallelConfig(workers=2, cpu_offload=True)), data, tmp_path / "run", stop_at=10)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone)[:10], rtol=TOLERANCE)


def test_replicas_that_do_not_divide_the_workers_are_refused():
    made = replace(experiment(), parallel=ParallelConfig(workers=4, replicas=3))
    with pytest.raises(UserError, match="parallel.replicas is 3 and must divide parallel.workers .4."):
        check_experiment(made)


def main() -> None:
    """Prints the numbers of all layouts."""
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data")
        reference = None
        print(f"| layout | loss, step 1 | loss, step {STEPS} | validation loss | largest difference of a loss |")
        print("|---|---:|---:|---:|---:|")
        for number, (name, parallel) in enumerate(LAYOUTS.items()):
            run = Path(folder) / f"run{number}"
            train(replace(experiment(), parallel=parallel), data, run)
            found = losses(run)
            reference = found if reference is None else reference
            difference = np.abs(found / reference - 1).max()
            print(f"| {name} | {found[0]:.6f} | {found[-1]:.6f} | {val_loss(run):.6f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
