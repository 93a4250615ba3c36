"""A training on 8 or on 512 devices before there are any: the arithmetic of `perceiver/costs/scale.py` for an experiment, with what the
job itself adds: starting, messages, memory of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from perceiver.config import Experiment
from perceiver.costs.devices import GIB, Device
from perceiver.costs.memory import checkpoint_bytes
from perceiver.costs.scale import CheckpointTime, Cluster, Reads, StepTime, checkpoint_time, reads, step_time
from perceiver.tasks import build_task
from ray_jobs import collector, watch
from ray_jobs.memory_check import layout_of, step_of
from ray_jobs.messages import PUMP_EVERY

PEAKS = {"bf16": "bf16", "float8": "bf16", "tf32": "tf32_peak", "fp32": "fp32"}
"""The peak of a device by precision, which MFU refers to: with float8 linear layers alone may be faster than it."""
ACTORS_PER_SECOND = 50.0
"""That Ray starts in a cluster. An assumption, as is the next."""
NCCL_SECONDS, NCCL_SECONDS_PER_WORKER = 2.0, 0.01
"""Of the process group."""
IMPORTS = 8.0
"""Seconds from asking for workers until they run. An assumption."""
FIRST_BATCH = 3.0
"""Seconds until the first batch. An assumption."""
HEAD = 3.0 * GIB
"""Memory of Ray's servers, the driver, its controller and its helpers on the head node. An assumption."""
HEAD_PER_WORKER = 64 * 1024
"""Of the records that Ray and the driver keep of a worker. An assumption."""
DRIVER_PER_WORKER = 2 * 1024
"""Of the newest report of a worker, in the driver."""


@dataclass(frozen=True, kw_only=True)
class Messages:
    """Messages a second."""

    reports: float
    """Of workers or of nodes to the driver: signs of life."""
    others: float
    """To the driver: lines, questions whether it was interrupted, and its own for what has come."""
    polls: float
    """Of Ray Train's controller to the workers."""

    @property
    def to_driver(self) -> float:
        return self.reports + self.others


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A training on a number of devices."""

    workers: int
    replicas: int
    step: StepTime
    units_per_second: float
    checkpoint: CheckpointTime
    checkpoint_share: float
    """Of the time, for which training stands still."""
    startup: float
    """Seconds from the request for workers to the first step, of a run that continues."""
    reads: Reads
    messages: Messages
    head_memory: float
    driver_memory: float
    """Bytes that the driver keeps of its workers."""


def poll_seconds(workers: int) -> float:
    """Seconds between two questions of Ray Train's controller to each of its workers, so that it asks 64 a second at most from 128 on."""
    return max(2.0, workers / 64)


def messages(workers: int, nodes: int, seconds_per_step: float, log_every: int) -> Messages:
    """What is sent while a training runs, from the intervals of the code that sends it."""
    direct = workers <= collector.DIRECTLY
    lines = 1 / (log_every * seconds_per_step)
    return Messages(
        reports=workers / watch.EVERY if direct else nodes / collector.EVERY,
        others=lines + 1.0 + 1 / PUMP_EVERY,
        polls=workers / poll_seconds(workers),
    )


def simulate(
    experiment: Experiment, device: Device, mfu: float, cluster: Cluster, *, row_bytes: float, rows_per_block: int, read_ratio: float
) -> Scale:
    """The experiment with its own number of workers and replicas.

    Args:
        mfu: share of the device's peak that one device alone reaches, without traffic and without recomputing.
        row_bytes: bytes of a stored row.
        read_ratio: rows read for each row that is needed (`perceiver.data.reading.read_ratio`).
    """
    task, parallel, training = build_task(experiment), experiment.parallel, experiment.training
    layout, step, workers = layout_of(experiment), step_of(experiment), experiment.parallel.workers
    batch, nodes = training.global_batch_size, -(-workers // cluster.gpus_per_node)
    peak = getattr(device, PEAKS[training.precision])
    num_layers, every = len(step.units(1)) - 1, parallel.recompute_every
    recomputed = -(-num_layers // every) / num_layers if every else 0.0  # share of the layers: another forward pass, a third of the work
    computing = batch * task.flops_per_example() * (1 + recomputed / 3) / (workers * peak * mfu)
    time = step_time(step, layout, parallel.replicas, computing, cluster)
    checkpoint = checkpoint_time(checkpoint_bytes(step, layout), workers, cluster)
    starting = IMPORTS + workers / ACTORS_PER_SECOND + NCCL_SECONDS + NCCL_SECONDS_PER_WORKER * workers
    return Scale(
        workers=workers,
        replicas=parallel.replicas,
        step=time,
        units_per_second=batch * task.throughput_unit()[1] / time.total,
        checkpoint=checkpoint,
        checkpoint_share=checkpoint.blocked / (experiment.run.checkpoint_every * time.total + checkpoint.blocked),
        startup=starting + checkpoint.loading + FIRST_BATCH,
        reads=reads(batch * row_bytes / time.total, read_ratio, row_bytes * rows_per_block, workers, cluster),
        messages=messages(workers, nodes, time.total, experiment.run.log_every),
        head_memory=HEAD + workers * HEAD_PER_WORKER,
        driver_memory=workers * DRIVER_PER_WORKER,
    )


def on(experiment: Experiment, workers: int, replicas: int, batch: int | None = None) -> Experiment:
    """The experiment on other devices, with a global batch of its own where one is given."""
    training = experiment.training if batch is None else replace(experiment.training, global_batch_size=batch)
    return replace(experiment, training=training, parallel=replace(experiment.parallel, workers=workers, replicas=replicas))


def plan_lines(time: StepTime, cluster: Cluster, units: float, unit: str) -> Iterator[str]:
    """What the network makes of a plan's step."""
    yield (
        f"  with the network   {time.total:.3g} s per step, {units / time.total:,.0f} {unit}/s in all, {time.efficiency:.0%} computing; "
        f"{time.traffic:.2g} s of traffic (nodes of {cluster.gpus_per_node}, {cluster.intra_node / 1e9:g} GB/s a GPU within, "
        f"{cluster.inter_node / 1e9:g} GB/s a node between)"
    )
