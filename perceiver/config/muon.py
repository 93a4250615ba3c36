"""Muon: momentum made orthogonal, for the matrices of layers, and AdamW for all else, as one optimizer over sharded parameters.

Loaded when such an optimizer is built, as it takes PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

HIDDEN = "hidden"
"""In a group of parameters: whether all are matrices of layers."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, and five of it: https://kellerjordan.github.io/posts/muon/."""
STEPS = 5


class Muon(torch.optim.AdamW):
    """Muon on the groups that are `HIDDEN`, AdamW on the others.

    The direction of a matrix's step is its momentum with all singular values near 1, times 0.2 sqrt(max(rows, columns)), so that
    learning rates and weight decays are those of AdamW (arXiv 2502.16982). It is a function of the whole matrix: each worker gathers the
    momentum, computes the direction and keeps its own shard, so that the number of workers changes nothing but the order of sums.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, nesterov: bool, precision: torch.dtype, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._momentum, self._nesterov, self._precision = momentum, nesterov, precision

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own would bring states of old versions up to date, and expects moments of all parameters.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(HIDDEN)]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get(HIDDEN):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, parameter.grad, group["lr"], group["weight_decay"])
        return loss

    def _step_matrix(self, matrix: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average = state["momentum_buffer"]
        average.lerp_(gradient, 1 - self._momentum)
        update = gradient.lerp(average, self._momentum) if self._nesterov else average
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        scale = 0.2 * max(whole.shape) ** 0.5
        direction = zeropower_via_newtonschulz(whole, STEPS, [COEFFICIENTS] * STEPS, dtype=self._precision).to(matrix.dtype)
        if isinstance(matrix, DTensor):
            direction = distribute_tensor(direction, matrix.device_mesh, matrix.placements, src_data_rank=None)
        matrix.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr * scale)
