"""What can be known to be wrong before a worker or an accelerator is held."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass

import ray
import torch
from ray.autoscaler.sdk import request_resources

from perceiver.config import Experiment, ParallelConfig, UserError, nearest, nodes, type_name
from perceiver.config.core import is_builtin
from perceiver.config.optimization import averaged_metric
from perceiver.costs.devices import cpu_has_bf16
from perceiver.costs.memory import has_formulas
from perceiver.data.sources import mixture_sources
from perceiver.models import check_model
from perceiver.tasks import Task, build_task
from perceiver.tasks.check import check_task, checked_task, checked_tree
from perceiver.tasks.check_calls import tried
from perceiver.terminal import number_of
from perceiver.training.noise_scale import check_noise_scale
from perceiver.training.optim import check_groups
from perceiver.training.profiling import check_snapshot
from ray_jobs.ray_env import use_gpus
from ray_jobs.read_ahead import DATA_CPUS

logger = logging.getLogger(__name__)
WORTH_BF16 = 1e10
"""FLOPs of a worker's step from which bf16 is worth its copies on CPUs with units for it: below, it took longer (docs/speed.md)."""
WHY = "docs/speed.md"


@dataclass(frozen=True)
class Resources:
    """What each worker of a run gets."""

    workers: int
    gpu: bool
    cpus_per_worker: float
    threads_per_worker: int | None
    """None: the cores of a worker's node divided by the workers there."""
    min_workers: int | None = None
    """Elastic: `workers` is the most there may be, this the least. None: always `workers`."""


def check_experiment(experiment: Experiment) -> None:
    """Checks what the configuration alone tells.

    Raises:
        UserError: the first field that cannot be right.
    """
    checked_tree(experiment)
    task = checked_task(experiment)
    if experiment.data.mixture:
        mixture_sources(experiment.data)
    check_best_metric(experiment, task)
    check_snapshot(experiment.run, experiment.parallel.device != "cpu")  # of auto it is known when the cluster is
    check_noise_scale(experiment.run.noise_scale, experiment.training.global_batch_size)
    check_balance(experiment, task)
    for number, callback in enumerate(experiment.callbacks):
        tried(callback, "check_metrics", f"callbacks.{number}.", metric_names(experiment, task))
    check_model(experiment.model)
    tried(task, "check")
    if experiment.optim.groups:
        with torch.device("meta"):
            check_groups(task.build_model(), experiment.optim)
    if any(not is_builtin(type_name(type(node))) for _, node in nodes(experiment)):
        check_task(experiment)


def check_balance(experiment: Experiment, task: Task) -> None:
    """Raises UserError where classes are to be balanced, but there are none."""
    if experiment.data.balance is not None and task.class_column is None:
        raise UserError(f"--data.balance is {experiment.data.balance}, but {experiment.preset} has no one class for each row: leave it out")


def metric_names(experiment: Experiment, task: Task) -> list[str]:
    """The metrics that validations give."""
    sources = [source.name for source in mixture_sources(experiment.data)] if experiment.data.mixture else []
    names = [f"val_{name}" for name in task.metric_directions]
    if experiment.optim.ema_decay is not None:
        names += [averaged_metric(name) for name in names]
    return names + [f"{name}/{source}" for name in names for source in sources]


def check_best_metric(experiment: Experiment, task: Task) -> None:
    """Raises UserError where run.best-metric is nothing that the task measures."""
    names = metric_names(experiment, task)
    metric = experiment.run.best_metric
    if metric not in names:
        raise UserError(f"run.best-metric is {metric!r} and must be one of {', '.join(names)}{nearest(metric, names)}")


def plan_resources(experiment: Experiment) -> Resources:
    """What to ask Ray for, so that workers and data tasks fit side by side.

    Raises:
        UserError: they cannot fit; says what would.
    """
    parallel = experiment.parallel
    gpu = use_gpus(parallel)
    wait_for_growth(parallel, gpu)
    total = ray.cluster_resources()
    cpus = total.get("CPU", 0.0)
    cores = cluster_cores()
    # What there must be at the start; an elastic run grows later.
    field, least = ("parallel.min-workers", parallel.min_workers) if parallel.min_workers else ("parallel.workers", parallel.workers)
    if gpu and total.get("GPU", 0) < least:
        raise UserError(
            f"{field} is {least} but the cluster has {number_of(total.get('GPU', 0.0), 'GPU')}: use at most that many workers, "
            "--parallel.wait-minutes for a cluster that grows, or --parallel.device cpu"
        )
    if not gpu and least > cores:
        raise UserError(f"{field} is {least} but the cluster has {number_of(cores, 'CPU')}: use at most that many workers")
    if parallel.cpus_per_worker:
        share = parallel.cpus_per_worker
    elif parallel.min_workers:
        share = 1.0 if gpu else _share_of_a_node()
    else:
        share = min(1.0, math.floor((cpus - DATA_CPUS) / parallel.workers * 100) / 100)
    if share <= 0 or least * share + DATA_CPUS > cpus:
        raise UserError(
            f"{number_of(least, 'worker')} with {number_of(share, 'CPU')}{' each' if least > 1 else ''} "
            f"and a data task with {DATA_CPUS:g} need "
            f"{number_of(least * share + DATA_CPUS, 'CPU')} but the cluster has {cpus:g}: "
            f"lower {field} or parallel.cpus-per-worker"
        )
    return Resources(parallel.workers, gpu, share, parallel.threads_per_worker, parallel.min_workers)


def say_cpu_precision(experiment: Experiment, gpu: bool) -> None:
    """Says where another precision would make a training on this machine's CPU faster; of a cluster's CPUs nothing is known."""
    training, parallel = experiment.training, experiment.parallel
    if gpu or parallel.address or os.environ.get("RAY_ADDRESS"):
        return
    units = cpu_has_bf16()
    if units is False and training.in_bf16:
        logger.warning(f"this machine's CPU has no units for bf16: --training.precision fp32 is faster here ({WHY})")
    if units and not training.in_bf16 and has_formulas(experiment.model):
        examples = training.global_batch_size / parallel.workers
        if build_task(experiment).flops_per_example() * examples >= WORTH_BF16:
            logger.info(f"this machine's CPU has units for bf16: --training.precision bf16 may take half the time ({WHY})")


def _node_cpus() -> list[float]:
    return [n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["Alive"]]


def _share_of_a_node() -> float:
    """CPUs for each worker of an elastic run, at most one, such that workers that fill the nodes leave room for a data task: Ray
    starts as many as fit, and workers without data would wait for ever. On every node, if that can be, as nodes go; else on
    the smallest ones.
    """
    sizes = sorted({cpus for cpus in _node_cpus() if cpus})
    # Ray counts in ten-thousandths.
    shares = [math.floor((cpus - DATA_CPUS) / n * 1e4) / 1e4 for cpus in sizes for n in range(1, 2 * int(cpus))]
    for careful in (sizes, sizes[:1]):
        fitting = [s for s in shares if 0 < s <= 1 and all(cpus - cpus // s * s >= DATA_CPUS for cpus in careful)]
        if fitting:
            return max(fitting)
    raise UserError(
        f"an elastic run on nodes with {', '.join(f'{cpus:g}' for cpus in sizes)} CPUs would leave none for its data tasks: set "
        f"parallel.cpus-per-worker, so that {number_of(DATA_CPUS, 'CPU')} of a full node stay free"
    )


def wait_for_growth(parallel: ParallelConfig, gpu: bool, trainings: int = 1) -> None:
    """Asks the cluster's autoscaler for what the workers of a number of trainings need and waits for it, at most parallel.wait_minutes."""

    def enough() -> bool:
        total = ray.cluster_resources()
        return total.get("CPU", 0) >= cpus and (not gpu or total.get("GPU", 0) >= workers)

    workers = trainings * (parallel.min_workers or parallel.workers)
    cpus = workers * (parallel.cpus_per_worker or 1.0) + trainings * DATA_CPUS
    end = time.monotonic() + 60 * parallel.wait_minutes
    if enough() or parallel.wait_minutes <= 0:
        return
    bundle = {"CPU": parallel.cpus_per_worker or 1, **({"GPU": 1} if gpu else {})}
    request_resources(bundles=[bundle] * workers + [{"CPU": 1}] * trainings)
    while not enough() and time.monotonic() < end:
        time.sleep(2)
    request_resources(bundles=[])


def cluster_cores() -> int:
    """CPUs of the cluster, without the extra one that a local cluster counts for data tasks."""
    total = int(ray.cluster_resources().get("CPU", 0))
    alone = len(ray.nodes()) == 1
    return min(total, os.cpu_count() or total) if alone and total == (os.cpu_count() or 0) + 1 else total
