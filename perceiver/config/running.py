"""The sections `parallel` and `run` of an experiment: where and how fast it runs, and how it reports. No part of a run's identity."""

from __future__ import annotations

from typing import Literal

from perceiver.config.checks import check_positive
from perceiver.config.core import Config, UserError, home, spelled


class ParallelConfig(Config):
    """How a run is laid out on machines. Not part of its identity."""

    workers: int = 1
    """Number of workers, one for each GPU (or one process each on CPUs); short: --workers N."""
    min_workers: int | None = None
    """Elastic runs: start with at least this many workers and at most `workers`, and grow and shrink with the cluster; short: --workers
    2..8. None: always exactly `workers`."""
    resize_seconds: float = 60.0
    """Elastic runs: seconds between checks for room for more workers. To use it, the run continues from its last checkpoint with more
    workers."""
    replicas: int = 1
    """Copies of the model, each sharded over workers / replicas neighbouring workers (HSDP: one copy for each node, say). 1: one copy,
    sharded over all workers."""
    micro_batch_size: int | None = None
    """Examples that a worker computes at once. Gradients of its share of the global batch are accumulated over such parts. None: the
    whole share at once."""
    activation_checkpointing: int | Literal["auto"] = 0
    """Recompute every n-th layer in the backward pass to save memory. 0: none; 1: all; auto: as few as fit, by the memory plan."""
    layers_per_unit: int = 1
    """Neighbouring layers of a block whose parameters are gathered, and gradients reduced, in one message (FSDP). More: fewer messages, and
    more memory for gathered parameters."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a layer after its forward pass, and gather them again for the backward pass. False: keep them, which
    saves a third of the traffic and takes memory for all parameters in the type of computation."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory and update them there (no effect on CPUs)."""
    compile: bool = False
    """torch.compile each layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the cluster has them or its autoscaler may start machines with them, otherwise CPUs."""
    device_memory_gib: float | None = None
    """Memory of a worker's device in GiB, for the check whether a step fits; None: as found."""
    cpus_per_worker: float | None = None
    """CPUs to reserve in Ray for each worker; None: chosen so that data tasks still fit."""
    threads_per_worker: int | None = None
    """Compute threads of a CPU worker; None: the machine's cores divided by its workers."""
    spare_workers: bool = True
    """Keep a spare process for each worker, with PyTorch loaded, which replaces it if it is lost. Spares start half a minute after the
    first step, if the machine has 1 GiB of free memory for each and another 2 GiB."""
    wait_minutes: float = 0.0
    """How long to wait for the cluster to grow to the size that the run needs (its autoscaler is asked for machines). 0: do not wait;
    start with what is there, or fail."""
    address: str | None = None
    """Ray cluster to join; None: the one this process runs in, else $RAY_ADDRESS, else a new local one."""

    @property
    def recompute_every(self) -> int:
        """`activation_checkpointing` as a number; of auto, which a training replaces before it starts, 0."""
        return 0 if self.activation_checkpointing == "auto" else self.activation_checkpointing

    def check(self, where: str) -> None:
        check_positive(self, where, "workers", "min_workers", "replicas", "micro_batch_size", "layers_per_unit", "threads_per_worker")
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
    """Folder of all runs, on a file system that all nodes share (if there are several); or s3://, gs://, ...: checkpoints and records are
    then copied there from local folders, and the run can continue on any machine. "": $PERCEIVER_HOME/runs."""
    log_every: int = 10
    """Steps between lines of progress and metrics."""
    val_every: int = 500
    """Steps between validations (there is always one at the end)."""
    val_batches: int | None = None
    """Number of global batches to validate on, from the start of the fixed validation order; None: all."""
    checkpoint_every: int = 500
    """Steps between checkpoints (there is always one at the end)."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; the best ones are kept besides. (A validation that is among the best so far saves a
    checkpoint.)"""
    keep_best: int = 1
    """Number of best checkpoints to keep, by run.best-metric."""
    best_metric: str = "val_loss"
    """Validation metric that decides which checkpoint is the best (val_loss, val_acc, ...)."""
    max_failures: int = 3
    """Number of times that a run restarts by itself from its last checkpoint after a worker died; -1: no limit."""
    stall_minutes: float = 30.0
    """Minutes without progress after which a worker is ended and the run restarts from its last checkpoint. A worker whose process does
    not answer at all is ended after one minute."""

    profile: str | None = None
    """Steps to profile on the first worker, FIRST..LAST counted from 1 (20..25). Writes a trace for Perfetto and a table of the most
    expensive operators to the run's folder, under profile."""
    memory_snapshot: str | None = None
    """Steps, FIRST..LAST, in which the first worker's GPU records its allocations, and where in the code they were made, to
    profile/memory-FIRST-LAST.pickle in the run's folder (for pytorch.org/memory_viz); also where memory runs out."""
    layer_grad_norms: bool = False
    """Add the norm of the gradient of each layer (grad_norm/LAYER) to the logged metrics."""
    noise_scale: bool = False
    """Add the gradient noise scale to the logged metrics: about the global batch size, in examples, above which a larger one hardly saves
    steps (arXiv 1812.06162). Takes about a step more at each line of progress."""

    def check(self, where: str) -> None:
        if self.profile is not None:
            profiled_steps(self.profile, f"--{where}profile")
        if self.memory_snapshot is not None:
            profiled_steps(self.memory_snapshot, f"--{where}memory-snapshot")
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
