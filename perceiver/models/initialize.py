"""Initial weights that depend on a seed and the parameters' names alone."""

import hashlib
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Initializable(Protocol):
    """A module that can draw its own weights."""

    def init_weights(self, seed: int) -> None: ...

    def to_empty(self, *, device: torch.device | None) -> object: ...


class Embedding(nn.Embedding):
    """Draws nothing on the meta device, where this would be an operation in Python: the first of these loads PyTorch's compiler, which
    takes half a second and 100 MiB.
    """

    def reset_parameters(self) -> None:
        """Draws the weights, from torch's own generator."""
        if not self.weight.is_meta:
            super().reset_parameters()


def initialized(build: Callable[[Any, Any], None]) -> Callable[..., None]:
    """Turns a constructor `build(self, config)` into one of (self, config, seed=0) that leaves initial weights in its module.

    The parts are built on the meta device; then the module takes memory on the default device, unless that is "meta" too, and
    draws its weights. So a part with such a constructor is not drawn twice, and torch's own generator is not used.
    """

    @wraps(build)
    def construct(self: Initializable, config: Any, seed: int = 0) -> None:
        device = torch.get_default_device()
        with torch.device("meta"):
            build(self, config)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    return construct


@torch.no_grad()
def initialize(
    model: nn.Module,
    scale: float,
    seed: int,
    adapt: Callable[[str, Tensor], Tensor] = lambda name, values: values,
    prefix: str = "",
) -> None:
    """Draws all parameters: matrices from N(0, scale^2), biases 0, LayerNorm 1 and 0.

    `adapt` takes each matrix' name and drawn values, which it may change in place, and returns the initial ones. `prefix` goes
    before all names: a part of a model has then the weights that it has in the whole.

    Each parameter has a generator of its own, seeded with (seed, name), and is drawn as a whole on the CPU, one at a
    time, before a process keeps its shard. So weights are the same on any device and for any number of FSDP workers.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    for name, parameter in model.named_parameters(prefix=prefix):
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
    if hasattr(parameter, "device_mesh"):
        # Here and not above: it loads a second's worth of modules, which only sharded models need.
        from torch.distributed.tensor import distribute_tensor

        values = values.to(device=parameter.device, dtype=parameter.dtype)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)
