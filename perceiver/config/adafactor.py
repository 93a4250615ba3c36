"""PyTorch's Adafactor over sharded parameters.

Loaded when such an optimizer is built, as it takes PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class Adafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor whose steps are those of whole parameters, whatever the number of workers.

    Its row and column means, its clipping and its relative step are functions of a whole matrix, and PyTorch refuses its in-place
    operations on sharded ones. So each worker gathers one parameter and its gradient at a time, takes PyTorch's step on them, and
    keeps its own shard of the result. The state, a row and a column of each matrix, is whole on all workers.
    """

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, states = self.param_groups, self.state
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_whole(parameter, parameter.grad, group, states)
        finally:
            self.param_groups, self.state = groups, states
        return loss

    def _step_whole(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], states: dict[Tensor, dict[str, Any]]) -> None:
        whole = torch.nn.Parameter(_whole(parameter), requires_grad=True)
        whole.grad = _whole(gradient)
        # PyTorch's own step, as if these were all the parameters.
        self.param_groups, self.state = [{**group, "params": [whole]}], {whole: states[parameter]}
        super().step()
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
