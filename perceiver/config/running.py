"""The sections `parallel` and `run` of an experiment: where and how fast it runs, and how it reports. No part of a run's identity."""

from __future__ import annotations

from typing import Literal

from perceiver.config.core import Config, UserError, check_positive, home, spelled


class ParallelConfig(Config):
    """How a run is laid out on machines. Not part of its identity."""

    workers: int = 1
    """Workers, one a GPU (or one a process on CPUs); `--workers N` for short."""
    min_workers: int | None = None
    """Elastic: start with as many workers as there is room for, from this number up to `workers`, and grow and shrink with the
    cluster; `--workers 2..8` for short. None: always exactly `workers`."""
    resize_seconds: float = 60.0
    """Elastic: seconds between looks for room for more workers. A larger number of workers continues from the last checkpoint."""
    replicas: int = 1
    """Copies of the model: each is sharded over workers / replicas neighbours (HSDP: one a node, say); 1: over all workers."""
    micro_batch_size: int | None = None
    """Examples that a worker computes at once; its share of the global batch is accumulated from such parts. None: all at once."""
    activation_checkpointing: int | Literal["auto"] = 0
    """Recompute every n-th layer in the backward pass to save memory; 0: none, 1: all; auto: as few as the memory plan says that fit."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory and update them there (no effect on CPUs)."""
    compile: bool = False
    """torch.compile each layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the cluster has them, or its autoscaler may start machines with them."""
    device_memory_gib: float | None = None
    """GiB of memory of a worker's device, for the check whether a step fits; None: as found."""
    cpus_per_worker: float | None = None
    """CPUs reserved in Ray for a worker; None: chosen so that data tasks still fit."""
    threads_per_worker: int | None = None
    """Compute threads of a CPU worker; None: the machine's cores divided by its workers."""
    wait_minutes: float = 0.0
    """How long to wait for a cluster to grow to the size that the run needs (its autoscaler is asked to add machines); 0: start
    with what is there, or fail."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""

    @property
    def recompute_every(self) -> int:
        """`activation_checkpointing` as a number; of auto, which a training replaces before it starts, 0."""
        return 0 if self.activation_checkpointing == "auto" else self.activation_checkpointing

    def check(self, where: str) -> None:
        check_positive(self, where, "workers", "min_workers", "replicas", "micro_batch_size", "threads_per_worker")
        for name in ("cpus_per_worker", "device_memory_gib"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{spelled(where + name)} is {value} and must be above 0, or None for what is found")
        if self.recompute_every < 0:
            raise UserError(f"{spelled(where)}activation-checkpointing is {self.recompute_every} and must be auto or not negative")
        if self.wait_minutes < 0:
            raise UserError(f"{spelled(where)}wait-minutes is {self.wait_minutes} and must not be negative")
        if self.workers % self.replicas:
            raise UserError(f"{where}replicas is {self.replicas} and must divide {where}workers ({self.workers})")
        if self.min_workers is not None:
            if self.min_workers > self.workers:
                raise UserError(f"{where}min-workers is {self.min_workers} and must be at most {where}workers ({self.workers})")
            if self.replicas > 1:
                raise UserError(
                    f"{where}replicas is {self.replicas}: an elastic run ({where}min-workers) has no replicas, as its workers change"
                )
            if not self.resize_seconds > 0:
                raise UserError(f"{where}resize-seconds is {self.resize_seconds} and must be above 0")


class RunConfig(Config):
    """Where a run is kept and how it reports. Not part of its identity."""

    name: str = ""
    """Name of the run; "": the preset's name."""
    storage: str = ""
    """Folder of all runs, on a file system that all nodes share (or there is one node); or s3://, gs://, ...: checkpoints and
    records are copied there from local folders, and a run continues from there on any machine. "": $PERCEIVER_HOME/runs."""
    log_every: int = 10
    """Steps between lines of progress and metrics."""
    val_every: int = 500
    """Steps between validations (there is always one at the end)."""
    val_batches: int | None = None
    """Number of global batches to validate on, from the start of the fixed validation order; None: all."""
    checkpoint_every: int = 500
    """Steps between checkpoints (there is always one at the end)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; the best are kept besides. (A validation that is among the best so far makes a
    checkpoint of its own.)"""
    keep_best: int = 1
    """How many of the best checkpoints are kept, by run.best-metric."""
    best_metric: str = "val_loss"
    """Metric that names the best checkpoint: a validation metric of the task (val_loss, val_acc, ...)."""
    max_failures: int = 3
    """How often a run restarts by itself from its last checkpoint when a worker dies; -1: without limit."""
    stall_minutes: float = 30.0
    """Minutes without any progress of a worker (one line of code, one step) after which it is ended and the run restarts from its last
    checkpoint. A worker whose process does not answer at all is ended after one minute."""

    profile: str | None = None
    """Steps to profile on the first worker, FIRST..LAST counted from 1 (20..25): a trace for Perfetto and a table of the operators that
    cost most, in the run's folder under profile."""
    layer_grad_norms: bool = False
    """Whether the gradient's norm of each layer is among the metrics, grad_norm/LAYER, at each line of progress."""

    def check(self, where: str) -> None:
        if self.profile is not None:
            profiled_steps(self.profile, f"--{where}profile")
        check_positive(self, where, "log_every", "val_every", "val_batches", "checkpoint_every", "keep_checkpoints", "keep_best")
        if not self.stall_minutes > 0:
            raise UserError(f"{spelled(where)}stall-minutes is {self.stall_minutes} and must be more than 0")
        if self.max_failures < -1:
            raise UserError(f"{where}max-failures is {self.max_failures} and must be at least -1 (without limit)")

    @property
    def storage_path(self) -> str:
        """The local folder of runs."""
        return str(home() / "runs") if self.remote_root or not self.storage else self.storage

    @property
    def remote_root(self) -> str | None:
        """The URI that runs are copied to; None: nowhere."""
        return self.storage if "://" in self.storage else None


def profiled_steps(text: str, field: str = "--run.profile") -> tuple[int, int]:
    """The first and the last step that FIRST..LAST, or a single number, names.

    Raises:
        UserError: it is neither, or names none.
    """
    first, dots, last = text.partition("..")
    try:
        steps = int(first), int(last if dots else first)
    except ValueError:
        steps = 0, 0
    if not 1 <= steps[0] <= steps[1]:
        raise UserError(f"{field} is {text!r} and must be FIRST..LAST, two steps counted from 1 (20..25)")
    return steps
