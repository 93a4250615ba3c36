"""How many trainings run side by side on a cluster: the trials of a sweep, or the seeds of one experiment."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from perceiver.config import ParallelConfig, UserError
from perceiver.terminal import number_of
from ray_jobs.preflight import cluster_cores, wait_for_growth
from ray_jobs.ray_env import held, use_gpus
from ray_jobs.read_ahead import DATA_CPUS


@dataclass(frozen=True)
class Capacity:
    """How many trainings run at once, and what each of their workers gets."""

    concurrent: int
    cpus_per_worker: float
    threads_per_worker: int | None
    why: str

    def words(self) -> list[str]:
        """What it is on the command line of a training."""
        threads = [] if self.threads_per_worker is None else [f"--parallel.threads-per-worker={self.threads_per_worker}"]
        return [f"--parallel.cpus-per-worker={self.cpus_per_worker}", *threads]


ONE = Capacity(1, 1.0, None, "one after the other")


def plan_capacity(parallel: ParallelConfig, concurrent: int | None) -> Capacity:
    """How many trials fit into the cluster side by side, each with its workers and a data task.

    Args:
        parallel: of each; with a fixed number of workers.
        concurrent: how many are asked for; None: as many as fit beside what other jobs hold now, and one at least, which waits for them.

    Raises:
        UserError: not one fits, or fewer than asked for; shows the sum.
    """
    wait_for_growth(parallel, use_gpus(parallel), concurrent or 1)
    fits, now, why = _fits(parallel, "a trial")
    if fits < (concurrent or 1):
        advice = "lower parallel.workers, parallel.cpus-per-worker or --concurrent, or use a larger cluster"
        raise UserError(f"{why}: {advice}")
    return _capacity(parallel, concurrent or max(1, now), why)


def most_at_once(parallel: ParallelConfig, count: int) -> Capacity:
    """How many of a number of trainings run side by side; one, where there is room for no more or for less than each would like."""
    wait_for_growth(parallel, use_gpus(parallel), count)
    _, now, why = _fits(parallel, "a training")
    return _capacity(parallel, max(1, min(now, count)), why)


def _fits(parallel: ParallelConfig, what: str) -> tuple[int, int, str]:
    """How many trainings the cluster has room for, how many beside what other jobs hold now, and the sum in words."""
    gpu, workers = use_gpus(parallel), parallel.workers
    total = ray.cluster_resources()
    cpus = total.get("CPU", 0.0)
    share = parallel.cpus_per_worker or 1.0
    need = workers * share + DATA_CPUS

    def room(cpus: float, gpus: float) -> int:
        count = int(cpus // need)
        if gpu:
            return min(count, int(gpus // workers))
        return 0 if workers > cluster_cores() else count

    fits = room(cpus, total.get("GPU", 0.0))
    now = room(cpus - held("CPU"), total.get("GPU", 0.0) - held("GPU"))
    each = f"{number_of(share, 'CPU')}{' and a GPU' if gpu else ''}{' each' if workers > 1 else ''}"
    there = f"{number_of(cpus, 'CPU')} and {number_of(total.get('GPU', 0.0), 'GPU')}"
    others = f" ({now} beside what other jobs hold now)" if now < fits else ""
    return (
        fits,
        now,
        (
            f"{what} needs {number_of(workers, 'worker')} with {each} and {number_of(DATA_CPUS, 'CPU')} for data, "
            f"{number_of(need, 'CPU')} in all; the cluster has {there}, which is room for {fits} at once{others}"
        ),
    )


def _capacity(parallel: ParallelConfig, count: int, why: str) -> Capacity:
    threads = parallel.threads_per_worker
    if threads is None and not use_gpus(parallel):
        threads = max(1, cluster_cores() // (count * parallel.workers))
    return Capacity(count, parallel.cpus_per_worker or 1.0, threads, f"{count} at once ({why})")
