"""One optimizer step of a whole large model on CPU workers: built on meta, sharded, stepped, saved, loaded by one worker.

    python -m ray_jobs.preprocess clm-c4 --source FILE --data.val-source FILE --data.tokenizer spiece.model
    python -m benchmarks.large_step clm-c4 --source FILE --data.val-source FILE --workers 2 --training.global-batch-size 2

Workers are processes with gloo, through the training that Ray's workers run (`perceiver.training.run.Training`); no Ray. The run
takes `training.max_steps` steps (unless given: one), validates on `run.val_batches` batches (one) and saves. Then a single worker
loads the checkpoint and validates the same batches: the loss must be the same. Peak memory is what the system counts as resident
of each process, PyTorch itself included.
"""

import multiprocessing
import resource
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from perceiver.checkpoints import list_checkpoints
from perceiver.config import Experiment, from_dict, to_dict
from perceiver.costs.flops import num_parameters
from perceiver.costs.memory import step_memory
from perceiver.data.manifest import Manifest
from perceiver.datasets import Dataset, with_prepared_tokenizer, with_tokenizer
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import make_val_loaders, read_here
from perceiver.training.callbacks import Callback
from perceiver.training.metrics import evaluate
from perceiver.training.parallel import World, join_world
from perceiver.training.run import Training, build_state
from perceiver.training.state import load_state
from ray_jobs.cli import main_entry, parse_experiment
from ray_jobs.memory_check import layout_of, step_of
from ray_jobs.preflight import check_experiment


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(rank: int, size: int, text: str) -> None:
    print(f"  {size} worker{'s' if size > 1 else ''}, worker {rank}: {text}; peak memory {peak_gib():.2f} GiB", flush=True)


def join(rank: int, port: int, experiment: Experiment) -> World:
    torch.set_num_threads(experiment.parallel.threads_per_worker or 1)
    size = experiment.parallel.workers
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return join_world(torch.device("cpu"), experiment.parallel.replicas)


class Steps(Callback):
    """Reports every step."""

    def after_log(self, step: int, metrics: dict[str, float]) -> None:
        report(self.training.world.rank, self.training.world.size, f"step {step} taken")


def train_worker(rank: int, port: int, config: dict[str, Any], data: str, folder: str, results: Any) -> None:
    """One worker of the training; the first puts its validation loss into `results`."""
    experiment = from_dict(config)
    world, start = join(rank, port, experiment), time.perf_counter()
    training = Training(
        experiment, build_task(experiment), data, Manifest.load(data), world, Path(folder), read_here,
        [Steps()],
    )  # fmt: skip
    report(rank, world.size, f"built and sharded after {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    metrics = training.run()
    report(rank, world.size, f"stepped, validated and saved after {time.perf_counter() - start:.0f} s")
    dist.barrier()
    if rank == 0:
        results.put(metrics["val_loss"])


def load_worker(rank: int, port: int, config: dict[str, Any], data: str, folder: str, results: Any) -> None:
    """Loads model and optimizer from the last checkpoint of a run and puts the validation loss into `results`."""
    experiment = from_dict(config)
    world, task, start = join(rank, port, experiment), build_task(experiment), time.perf_counter()
    state = build_state(experiment, task, world)
    load_state(list_checkpoints(Path(folder) / "checkpoints")[-1].path, state)
    report(rank, world.size, f"loaded step {state.step} with its optimizer after {time.perf_counter() - start:.0f} s")
    loaders = make_val_loaders(experiment, task, data, Manifest.load(data))
    metrics, *_ = evaluate(task, state.model, loaders, world, read_here, experiment.run.val_batches)
    report(rank, world.size, "validated")
    results.put(metrics["val_loss"])


def run(function: Any, experiment: Experiment, data: str, folder: Path) -> float:
    """Runs a worker function in as many processes as the experiment has workers; the validation loss.

    Raises:
        RuntimeError: a worker failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    args = (port, to_dict(experiment), data, str(folder), results)
    processes = [context.Process(target=function, args=(rank, *args)) for rank in range(experiment.parallel.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"workers ended with {[process.exitcode for process in processes]}")
    return results.get(timeout=10)


def main(argv: list[str]) -> int:
    experiment = with_tokenizer(parse_experiment(argv, "benchmarks.large_step"))
    given = {argument.partition("=")[0] for argument in argv}
    steps = experiment.training.max_steps if "--training.max-steps" in given else 1
    experiment = replace(
        experiment,
        training=replace(experiment.training, max_steps=steps),
        run=replace(experiment.run, val_batches=experiment.run.val_batches if "--run.val-batches" in given else 1, log_every=1),
    )
    if hasattr(experiment.task, "sample_tokens"):
        experiment = replace(experiment, task=replace(experiment.task, sample_tokens=0))
    check_experiment(experiment)
    dataset = Dataset.find(experiment)
    data = dataset.folder
    experiment = with_prepared_tokenizer(experiment, data, dataset.manifest)
    print(f"{experiment.preset}: {num_parameters(experiment.model):,} parameters, {experiment.parallel.workers} workers", flush=True)
    planned = step_memory(step_of(experiment), layout_of(experiment, cuda=False)).total
    print(f"  planned: {planned / 2**30:.2f} GiB of tensors for the step of a worker", flush=True)
    with tempfile.TemporaryDirectory(dir=experiment.run.storage or None) as folder:
        saved = run(train_worker, experiment, data, Path(folder))
        step = next(record for record in Run(Path(folder)).metrics() if "loss" in record)
        print(f"  step 1: loss {step['loss']:.4f}, {step['step_seconds']:.1f} s; validation loss {saved:.6f}", flush=True)
        files = [path for path in Path(folder, "checkpoints").rglob("*") if path.is_file()]
        print(f"  checkpoint: {sum(path.stat().st_size for path in files) / 2**30:.2f} GiB in {len(files)} files", flush=True)
        alone = replace(experiment, parallel=replace(experiment.parallel, workers=1, replicas=1))
        loaded = run(load_worker, alone, data, Path(folder))
    print(f"  validation loss of the loaded model on 1 worker {loaded:.6f}, relative difference {abs(loaded / saved - 1):.1e}")
    return 0 if abs(loaded / saved - 1) < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main_entry(main))
