"""The exponential moving average of a model's weights: as many shards as the weights have, a function of the steps taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

Average = dict[str, Tensor]
"""Averaged weights by name, each sharded as its parameter."""


def begin_average(model: nn.Module) -> Average:
    """The average of no step: the weights themselves."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def update_average(average: Average, model: nn.Module, decay: float, step: int) -> None:
    """Moves the average towards the weights of a step (from 0). In the first steps it forgets faster, so that it does not remember
    initial weights for long.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(map(_local, average.values())), [_local(p) for p in model.parameters()], weight)


@contextmanager
def averaged(average: Average, model: nn.Module) -> Iterator[None]:
    """The model with its averaged weights in the place of its own, which it has again at the end, bit for bit."""
    _exchange(average, model)
    try:
        yield
    finally:
        _exchange(average, model)


@torch.no_grad()
def _exchange(average: Average, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what was gathered for the last forward pass would be used by the next one
    for name, parameter in model.named_parameters():
        own, other = _local(parameter), _local(average[name])
        kept = own.clone()
        own.copy_(other)
        other.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    """A worker's own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
