"""A worker's tensors, as whole ones."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, without its gradient. All workers have to ask for it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
