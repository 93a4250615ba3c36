"""Whether a step of an experiment fits into the memory of its devices, and what would."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from perceiver.config import Experiment, OptimConfig, ParallelConfig, TrainingConfig, UserError
from perceiver.costs.activations import Layout
from perceiver.costs.devices import DEVICES, GIB
from perceiver.costs.memory import Step, largest_micro_batch, step_memory
from perceiver.tasks import build_task
from perceiver.training.float8 import check_package
from perceiver.training.optim import freeze
from perceiver.training.parallel import is_alone

CONTEXT = 1.5 * GIB
"""Of a GPU: its context, kernels, and the buffers of NCCL. An assumption, as is the next."""
FRAGMENTS = 0.05
"""Share of a GPU's memory that PyTorch's allocator loses to fragments."""
RAY_TYPES = {"A100-40G": "a100-40gb", "A100-80G": "a100-80gb", "A10G": "a10g", "L4": "l4", "L40": "l40", "L40S": "l40s", "T4": "t4",
             "H100": "h100", "H200": "h200", "B200": "b200"}  # fmt: skip
"""Names of Ray's accelerator types that tell the memory ("A100" alone does not)."""
WITHOUT_BF16 = {"K80", "P4", "P100", "V100", "T4"}
"""Names of Ray's accelerator types that have no units for bf16."""
NO_FLOAT8_ON_CPUS = "--training.precision is 'float8', for which CPUs have no units: use --training.precision bf16 or fp32"
WITHOUT_FLOAT8 = WITHOUT_BF16 | {"A10G", "A100", "A100-40G", "A100-80G"}
"""The same of float8."""


def usable(memory: float) -> float:
    """Bytes of a GPU that are left for tensors."""
    return memory * (1 - FRAGMENTS) - CONTEXT


def share(training: TrainingConfig, parallel: ParallelConfig) -> int:
    """Examples of a global batch that the worker with the most of them takes."""
    return -(-training.global_batch_size // parallel.workers)


def layout_of(experiment: Experiment, cuda: bool = True) -> Layout:
    """The layout of an experiment's training step on one of its workers."""
    return layout(experiment.training, experiment.parallel, experiment.optim, cuda)


def layout(training: TrainingConfig, parallel: ParallelConfig, optim: OptimConfig, cuda: bool = True) -> Layout:
    """The layout of a training step on one of the workers (see `Loader.micro_batches`)."""
    examples = share(training, parallel)
    count = -(-examples // min(parallel.micro_batch_size or examples, examples))
    return Layout(
        micro_batch_size=-(-examples // count),
        accumulated=count,
        shards=parallel.workers // parallel.replicas,
        alone=is_alone(parallel.workers, parallel),
        precision="bf16" if training.in_bf16 else training.precision,
        checkpoint_every=parallel.recompute_every,
        layers_per_unit=parallel.layers_per_unit,
        reshard_after_forward=parallel.reshard_after_forward,
        cpu_offload=parallel.cpu_offload,
        cuda=cuda,
        averaged=optim.ema_decay is not None,
        optimizer=optim.optimizer,
    )


def step_of(experiment: Experiment) -> Step:
    """The training step of an experiment, of which memory is worked out; counted where `optim.groups` freezes parameters."""
    task, optim = build_task(experiment), experiment.optim
    if not any(group.freeze for group in optim.parsed_groups):
        return task.step()
    with torch.device("meta"):
        model = task.build_model()
    freeze(model, optim)
    return task.count(model)


def check_fits(experiment: Experiment, limit: float, cuda: bool = True) -> None:
    """Checks that an experiment's step fits into `limit` bytes; see `check_step_fits`."""
    check_step_fits(step_of(experiment), experiment.training, experiment.parallel, experiment.optim, limit, cuda)


def check_step_fits(
    step: Step, training: TrainingConfig, parallel: ParallelConfig, optim: OptimConfig, limit: float, cuda: bool, where: str = "a device"
) -> None:
    """Checks that a step fits into `limit` bytes.

    Raises:
        UserError: it does not; says which change would make it fit.
    """
    own = layout(training, parallel, optim, cuda)
    needed = step_memory(step, own).total
    if needed <= limit:
        return

    def largest(parallel: ParallelConfig) -> int:
        return largest_micro_batch(step, layout(training, parallel, optim, cuda), limit, share(training, parallel))

    raise UserError(
        f"a step with a micro-batch of {own.micro_batch_size} needs {_size(needed)} but {where} has {_size(limit)} for "
        f"it: {_what_would(parallel, largest, cuda)}"
    )


def _size(memory: float) -> str:
    return f"{memory / GIB:.1f} GiB" if memory >= GIB else f"{memory / 2**20:.1f} MiB"


def _what_would(parallel: ParallelConfig, largest: Callable[[ParallelConfig], int], cuda: bool) -> str:
    """The least change that makes a step fit.

    Args:
        largest: the largest micro-batch that fits with other settings of the workers; 0: none.
    """
    micro_batch = "--parallel.micro-batch-size"
    if size := largest(parallel):
        return f"{micro_batch} {size} fits"
    recomputed = replace(parallel, activation_checkpointing=1)
    if size := largest(recomputed):
        return f"--parallel.activation-checkpointing 1 with {micro_batch} {size} fits"
    for factor in (2, 4, 8, 16, 32, 64):
        more = replace(recomputed, workers=parallel.workers * factor)
        if cuda and (size := largest(more)):
            return f"--workers {more.workers} with --parallel.activation-checkpointing 1 and {micro_batch} {size} fits"
    if cuda and (size := largest(replace(recomputed, cpu_offload=True))):
        return f"--parallel.cpu-offload True with --parallel.activation-checkpointing 1 and {micro_batch} {size} fits"
    return "it takes devices with more memory, or a smaller model"


def memory_limit(parallel: ParallelConfig, gpu: bool) -> tuple[ParallelConfig, float | None, str]:
    """What a step may take in the joined cluster: parallel.device-memory-gib, else the GPUs' memory, else that of the nodes.

    Returns:
        The settings with as few workers as there may be (an elastic run's least, of which each holds the most); the bytes of a worker,
        None where nobody knows the memory of the GPUs; and whose they are, for a message.
    """
    given, least, suffix = parallel.device_memory_gib, parallel.min_workers, ""
    if least is not None:
        parallel = replace(parallel, workers=least, min_workers=None)
        suffix = f" (where parallel.min-workers, {least}, are all there are)"
    if not gpu:
        return parallel, given * GIB if given else _node_memory(parallel.workers), f"each worker{suffix}"
    memory = given * GIB if given else _gpu_memory()
    return parallel, memory and usable(memory), f"a GPU of {_size(memory or 0)}{suffix}"


def check_memory(experiment: Experiment, gpu: bool) -> None:
    """Checks a training in the joined cluster; see `memory_limit`.

    Raises:
        UserError: see `check_step_fits`.
    """
    parallel, limit, where = memory_limit(experiment.parallel, gpu)
    if limit is not None:
        check_step_fits(step_of(experiment), experiment.training, parallel, experiment.optim, limit, gpu, where)


def check_float8(training: TrainingConfig, parallel: ParallelConfig) -> None:
    """What is known of float8 before a cluster is joined.

    Raises:
        UserError: its package is missing, or no worker will have a GPU.
    """
    if training.precision != "float8":
        return
    check_package("--training.precision")
    joins = parallel.address or os.environ.get("RAY_ADDRESS")
    if parallel.device == "cpu" or not (joins or torch.cuda.is_available()):
        raise UserError(NO_FLOAT8_ON_CPUS)


def check_precision(experiment: Experiment, gpu: bool) -> None:
    """Raises UserError where a run in bf16 or float8 might get GPUs, or one in float8 CPUs, that have no units for it: they would emulate
    it, slower than fp32.
    """
    precision = experiment.training.precision
    if precision == "float8" and not gpu:
        raise UserError(NO_FLOAT8_ON_CPUS)
    without = {"bf16": WITHOUT_BF16, "float8": WITHOUT_FLOAT8}.get(precision, set())
    lacking = _gpu_types() & without if gpu else set()
    if lacking:
        other = "fp32" if precision == "bf16" or lacking & WITHOUT_BF16 else "bf16"
        raise UserError(
            f"--training.precision is {precision!r}, but the cluster has GPUs without units for it ({', '.join(sorted(lacking))}): use "
            f"--training.precision {other}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full: that of a GPU, or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def out_of_memory(experiment: Experiment, error: BaseException) -> str:
    """What a worker without memory left says: what a step was expected to take, and what takes less."""
    whose = "device" if isinstance(error, torch.OutOfMemoryError) else "machine"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    own, step = layout_of(experiment), step_of(experiment)
    size, every = own.micro_batch_size, own.checkpoint_every
    less = [("--parallel.micro-batch-size", size // 2, replace(own, micro_batch_size=size // 2))] if size > 1 else []
    if every != 1:
        less.append(("--parallel.activation-checkpointing", 1, replace(own, checkpoint_every=1)))
    now = step_memory(step, own).total
    sizes = [(f"{field} {value}", step_memory(step, changed).total) for field, value, changed in less]
    changes = [f"{change} ({_size(needed)})" for change, needed in sizes if needed < now]
    return (
        f"the {whose}'s memory is full ({reason}). A step with a micro-batch of {size} was expected to take "
        f"{_size(now)} of it: "
        + (f"continue with {' or '.join(changes)}" if changes else f"it takes more --workers, or {whose}s with more memory")
        + f", and see that no other program holds memory of the {whose}"
    )


def _gpu_types() -> set[str]:
    """The kinds of the cluster's GPUs, as Ray calls them."""
    import ray

    return {name.removeprefix("accelerator_type:") for name in ray.cluster_resources() if name.startswith("accelerator_type:")}


def _gpu_memory() -> float | None:
    """Memory of the cluster's smallest GPUs by their type, or of this machine's; None: not known."""
    types = _gpu_types()
    known = [DEVICES[RAY_TYPES[name]].memory for name in types if name in RAY_TYPES]
    if known and len(known) == len(types):
        return min(known)
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _node_memory(workers: int) -> float:
    """Memory of a CPU worker where workers fill the nodes evenly: what the smallest node gives Ray, its object store included."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    smallest = min(node.get("memory", 0) + node.get("object_store_memory", 0) for node in nodes)
    return smallest / math.ceil(workers / len(nodes))
