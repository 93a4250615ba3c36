"""What can be known to be wrong before a worker or an accelerator is held."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import ray
from ray.autoscaler.sdk import request_resources

from perceiver.config import Experiment, ParallelConfig, UserError
from perceiver.data.sources import mixture_sources
from perceiver.models import check_model
from perceiver.tasks import build_task
from ray_jobs.ingest import DATA_CPUS
from ray_jobs.ray_env import use_gpus


@dataclass(frozen=True)
class Resources:
    """What each worker of a run gets."""

    workers: int
    gpu: bool
    cpus_per_worker: float
    threads_per_worker: int


def check_experiment(experiment: Experiment) -> None:
    """Checks what the configuration alone tells.

    Raises:
        UserError: the first field that cannot be right.
    """
    task = build_task(experiment)
    training, optim, data, run, parallel = (
        experiment.training, experiment.optim, experiment.data, experiment.run, experiment.parallel,
    )  # fmt: skip
    least_one = {
        "training.global-batch-size": training.global_batch_size,
        "training.max-steps": training.max_steps,
        "training.max-epochs": training.max_epochs,
        "parallel.workers": parallel.workers,
        "parallel.replicas": parallel.replicas,
        "parallel.micro-batch-size": parallel.micro_batch_size,
        "parallel.threads-per-worker": parallel.threads_per_worker,
        "data.rows-per-block": data.rows_per_block,
        "data.blocks-per-shard": data.blocks_per_shard,
        "data.shuffle-window-blocks": data.shuffle_window_blocks,
        "data.lanes": data.lanes,
        "run.log-every": run.log_every,
        "run.val-every": run.val_every,
        "run.val-batches": run.val_batches,
        "run.checkpoint-every": run.checkpoint_every,
        "run.keep-checkpoints": run.keep_checkpoints,
    }
    for name, value in least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value} and must be at least 1")
    if parallel.device_memory_gib is not None and not parallel.device_memory_gib > 0:
        raise UserError(f"parallel.device-memory-gib is {parallel.device_memory_gib} and must be above 0, or None for what is found")
    if parallel.workers % parallel.replicas:
        raise UserError(f"parallel.replicas is {parallel.replicas} and must divide parallel.workers ({parallel.workers})")
    if training.max_steps is None and training.max_epochs is None:
        raise UserError("training.max-steps and training.max-epochs are both None: set one of them")
    if not optim.lr > 0 or not math.isfinite(optim.lr):
        raise UserError(f"optim.lr is {optim.lr} and must be above 0")
    if optim.warmup_steps < 0 or optim.weight_decay < 0:
        raise UserError(f"optim.warmup-steps ({optim.warmup_steps}) and optim.weight-decay ({optim.weight_decay}) must not be negative")
    if optim.max_grad_norm is not None and optim.max_grad_norm <= 0:
        raise UserError(f"optim.max-grad-norm is {optim.max_grad_norm} and must be above 0, or None for no clipping")
    if not 0 <= optim.min_lr_fraction <= 1:
        raise UserError(f"optim.min-lr-fraction is {optim.min_lr_fraction} and must be from 0 to 1")
    if "/" in experiment.run_name or experiment.run_name.startswith("."):
        raise UserError(f"run.name is {experiment.run_name!r} and must be a plain folder name (the folder of runs is run.storage)")
    if data.mixture:
        mixture_sources(data)
    check_model(experiment.model)
    task.check()


def plan_resources(experiment: Experiment) -> Resources:
    """What to ask Ray for, so that workers and data tasks fit side by side.

    Raises:
        UserError: they cannot fit; says what would.
    """
    parallel = experiment.parallel
    gpu = use_gpus(parallel)
    _wait_for_growth(parallel, gpu)
    total = ray.cluster_resources()
    cpus = total.get("CPU", 0.0)
    cores = cluster_cores()
    if gpu and total.get("GPU", 0) < parallel.workers:
        raise UserError(
            f"parallel.workers is {parallel.workers} but the cluster has {total.get('GPU', 0):g} GPUs: "
            f"use at most that many workers, or --parallel.device cpu"
        )
    if not gpu and parallel.workers > cores:
        raise UserError(f"parallel.workers is {parallel.workers} but the cluster has {cores} CPUs: use at most that many workers")
    share = parallel.cpus_per_worker or min(1.0, math.floor((cpus - DATA_CPUS) / parallel.workers * 100) / 100)
    if share <= 0 or parallel.workers * share + DATA_CPUS > cpus:
        raise UserError(
            f"{parallel.workers} workers with {share:g} CPUs each and a data task with {DATA_CPUS:g} need "
            f"{parallel.workers * share + DATA_CPUS:g} CPUs but the cluster has {cpus:g}: "
            f"lower parallel.workers or parallel.cpus-per-worker"
        )
    on_node = math.ceil(parallel.workers / max(1, len([n for n in ray.nodes() if n["Alive"]])))
    threads = parallel.threads_per_worker or max(1, (os.cpu_count() or 1) // on_node)
    return Resources(parallel.workers, gpu, share, threads)


def _wait_for_growth(parallel: ParallelConfig, gpu: bool) -> None:
    """Asks the cluster's autoscaler for what the workers need and waits for it, at most parallel.wait_minutes."""

    def enough() -> bool:
        total = ray.cluster_resources()
        return total.get("CPU", 0) >= cpus and (not gpu or total.get("GPU", 0) >= parallel.workers)

    cpus = parallel.workers * (parallel.cpus_per_worker or 1.0) + DATA_CPUS
    end = time.monotonic() + 60 * parallel.wait_minutes
    if enough() or parallel.wait_minutes <= 0:
        return
    bundle = {"CPU": parallel.cpus_per_worker or 1, **({"GPU": 1} if gpu else {})}
    request_resources(bundles=[bundle] * parallel.workers + [{"CPU": 1}])
    while not enough() and time.monotonic() < end:
        time.sleep(2)
    request_resources(bundles=[])


def cluster_cores() -> int:
    """CPUs of the cluster, without the extra one that a local cluster counts for data tasks."""
    total = int(ray.cluster_resources().get("CPU", 0))
    alone = len(ray.nodes()) == 1
    return min(total, os.cpu_count() or total) if alone and total == (os.cpu_count() or 0) + 1 else total
