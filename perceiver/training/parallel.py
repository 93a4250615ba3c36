"""Parallelism from outside the model: devices, the mesh, sharding (FSDP2), activation checkpointing, compile, precision."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from perceiver.config import ParallelConfig, TrainingConfig
from perceiver.models.weights import blocks_of, neighbours
from perceiver.training.float8 import use_float8
from perceiver.training.whole import compute_in

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
"""The largest number that mallopt takes: 2 GiB."""
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the workers of a run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Over all workers, or (replicas, workers of a replica)."""

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all workers (in place)."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, value: T | None) -> T | None:
        """The value of the first worker that has one, on all workers."""
        if self.size == 1:
            return value
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return next((found for found in values if found is not None), None)


def choose_arithmetic(training: TrainingConfig, device: torch.device) -> None:
    """Sets how this process computes on a GPU, before it does; on CPUs there is nothing to choose."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high" if training.precision == "tf32" else "highest")
    if training.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by cuBLAS at its first product
    torch.use_deterministic_algorithms(training.deterministic)


def join_world(device: torch.device, replicas: int = 1) -> World:
    """The world of this process: the process group if there is one, else one of a single process, which it starts.

    With `replicas`, which divides the number of workers, parameters are sharded over neighbouring workers and replicated
    over such groups (HSDP): only gradients cross the groups' borders.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    if device.type == "cpu":
        reuse_freed_memory()
    size = dist.get_world_size()
    if replicas == 1:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    return World(dist.get_rank(), size, device, mesh)


def reuse_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system (no effect elsewhere).

    A training step on a CPU frees and takes the same large tensors again and again. By default each is mapped anew, and the
    page faults cost up to a sixth of a step (docs/experiments.md), more where other threads of the process compete for them.
    """
    libc = ctypes.CDLL(None)
    if platform.libc_ver()[0] == "glibc":
        libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def build_sharded(
    model: nn.Module, world: World, parallel: ParallelConfig, training: TrainingConfig, layers: Iterable[nn.Module]
) -> nn.Module:
    """Shards a model that was built on the meta device, gives it memory on this worker, and draws its initial weights.

    Each of `layers` becomes a unit of recomputation and compilation, and alone or with its neighbours one of sharding;
    what is left belongs to the model itself. One worker alone
    keeps the whole model: the hooks of sharding took half of a small model's step. A layer may say by an attribute `lengths_vary` that it
    is given inputs of other lengths from step to step: it is compiled for all of them at once.
    With `parallel.cpu_offload` the shards stay in the host's memory (pinned for GPUs): a layer's parameters come to the device when they
    are used, gradients go back, and the optimizer computes on the host.
    No process ever holds the whole model. Initial weights depend on the seed alone, not on the number of workers.
    """
    layers = list(layers)
    alone = is_alone(world.size, parallel)
    shard = None if alone else _sharding(world, parallel, training)
    if training.precision == "float8":
        use_float8(layers, world.device)
    for number, layer in enumerate(layers):
        if parallel.recompute_every and number % parallel.recompute_every == 0:
            checkpoint(layer)
        if parallel.compile:
            layer.compile(dynamic=getattr(layer, "lengths_vary", None))
    if shard is not None:
        for numbers in neighbours(blocks_of(model), parallel.layers_per_unit):
            shard([layers[number] for number in numbers], reshard_after_forward=parallel.reshard_after_forward)
        # What belongs to no layer stays whole from the forward to the backward pass, so that a loss may use the output matrix.
        shard(model, reshard_after_forward=False)
    model.to_empty(device="cpu" if parallel.cpu_offload else world.device)
    if parallel.cpu_offload:  # constants are the model's own and stay on the device
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(world.device))
    model.reset_buffers()
    model.init_weights(training.seed)
    if alone and training.in_bf16:
        compute_in(torch.bfloat16, model, layers)
    return model


def is_alone(workers: int, parallel: ParallelConfig) -> bool:
    """Whether a worker keeps its model whole: nobody shares it, and all of it stays on the device."""
    return workers == 1 and not parallel.cpu_offload


def _sharding(world: World, parallel: ParallelConfig, training: TrainingConfig) -> Callable[..., object]:
    """What makes a module a unit of sharding."""
    policy = MixedPrecisionPolicy()
    if training.in_bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    return partial(fully_shard, mesh=world.mesh, mp_policy=policy, offload_policy=offload)


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over the workers, or each keeps its own until a later one does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
