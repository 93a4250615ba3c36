"""Initial weights that depend on a seed and the parameters' names alone."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def initialize(model: nn.Module, scale: float, seed: int, adapt: Callable[[str, Tensor], Tensor] = lambda name, values: values) -> None:
    """Draws all parameters: matrices from N(0, scale^2), biases 0, LayerNorm 1 and 0.

    `adapt` takes each matrix' name and drawn values, which it may change in place, and returns the initial ones.

    Each parameter has a generator of its own, seeded with (seed, name), and is drawn as a whole on the CPU, one at a
    time, before a process keeps its shard. So weights are the same on any device and for any number of FSDP workers.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        elif not parameter.is_meta:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            values = torch.empty(parameter.shape).normal_(0.0, scale, generator=generator)
            copy_into(parameter, adapt(name, values))


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def copy_into(parameter: Tensor, values: Tensor) -> None:
    """Copies a full tensor into a parameter, or its shard of it into a sharded one (no communication)."""
    if isinstance(parameter, DTensor):
        values = values.to(device=parameter.device, dtype=parameter.dtype)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)
