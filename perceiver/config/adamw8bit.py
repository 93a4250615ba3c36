"""AdamW whose moments are kept in 8 bits, over sharded parameters.

Loaded when such an optimizer is built, as it takes PyTorch.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 256
"""Largest number of neighbouring values that share a scale."""
SMALLEST = 4096
"""Parameters of fewer values keep moments in 32 bits, as in bitsandbytes and torchao."""
SHORTEST = 64
"""So do those with shorter rows: their scales would take too large a part of what is saved."""
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names of the moments in the state, and whether their values have signs."""
SCALE = "_scale"
_TINY = torch.finfo(torch.float32).tiny
"""Smallest scale, so that blocks of zeros are no division by zero. Squares of small gradients are far below 1e-12."""


def row_blocks(shape: tuple[int, ...]) -> int | None:
    """Blocks of each row (slice of the first dimension) of a parameter; None: its moments stay in 32 bits.

    A block never crosses a row's end. Shards are slices of rows, so blocks are the same on any number of workers.
    """
    row = math.prod(shape[1:])
    if len(shape) < 2 or math.prod(shape) < SMALLEST or row < SHORTEST:
        return None
    return -(-row // BLOCK)


def dynamic_values(signed: bool) -> Tensor:
    """The 256 values between -1 (or 0) and 1 that a code stands for, ascending: dynamic tree quantization (arXiv 2110.02861, 1511.04561).

    Seven decades, each with twice as many values as the one below it, so that the relative error is small for small values too.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1.0, -1.0) if signed else (1.0,):
            values += (sign * 10.0 ** (decade - 6) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize(values: Tensor, blocks: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of `values`) of the nearest of the table's values, and scales (fp32, rows x blocks): each block's largest
    absolute value.
    """
    rows = values.shape[0]
    flat = values.reshape(rows, -1)
    row = flat.shape[1]
    padded = torch.nn.functional.pad(flat, (0, blocks * _block(row, blocks) - row)).view(rows, blocks, -1)
    scale = padded.abs().amax(-1).clamp_(min=_TINY)
    middles = (table[1:] + table[:-1]) / 2.0
    codes = torch.bucketize(padded / scale[..., None], middles, out_int32=True).to(torch.uint8)
    return codes.view(rows, -1)[:, :row].reshape(values.shape), scale


def dequantize(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The values (fp32) that codes and scales stand for; see `quantize`."""
    rows, blocks = scale.shape
    values = table[codes.reshape(rows, -1).int()]
    row = values.shape[1]
    return (values * scale.repeat_interleave(_block(row, blocks), dim=1)[:, :row]).view(codes.shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments are codes of 8 bits and a scale for each block of at most 256 values (arXiv 2110.02861).

    A step computes in fp32 on a worker's own shard. The state is plain tensors, sharded as the parameter is, so that checkpoints hold it
    and any number of workers continues from it.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._tables: dict[tuple[bool, torch.device], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, but the state's types stay: PyTorch would make codes the type of the parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, own, strict=True):
            if number in state_dict["state"]:
                state = state_dict["state"][number]
                self.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0)}
        blocks = row_blocks(tuple(parameter.shape))
        for name, signed in MOMENTS.items():
            zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            if blocks is None:
                state[name] = zeros
                continue
            codes, scale = quantize(_local(zeros), blocks, self._table(signed, parameter.device))
            state[name], state[name + SCALE] = _sharded_as(codes, parameter), _sharded_as(scale, parameter)
        return state

    def _step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._begin(parameter))
        state["step"] += 1
        step, (beta1, beta2), lr = state["step"].item(), group["betas"], float(group["lr"])
        weight, gradient = _local(parameter), _local(parameter.grad).float()  # type: ignore[arg-type]
        if not weight.numel():
            return  # a worker without a shard of it
        first = self._moment(state, "exp_avg").lerp_(gradient, 1 - beta1)
        second = self._moment(state, "exp_avg_sq").lerp_(gradient.square(), 1 - beta2)
        self._keep(state, "exp_avg", first)
        self._keep(state, "exp_avg_sq", second)
        weight.mul_(1 - lr * group["weight_decay"])
        size = lr / (1 - beta1**step)
        weight.addcdiv_(first, second.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"]), value=-size)

    def _moment(self, state: dict[str, Tensor], name: str) -> Tensor:
        """A copy of a moment, fp32."""
        kept = _local(state[name])
        if name + SCALE not in state:
            return kept.clone()
        return dequantize(kept, _local(state[name + SCALE]), self._table(MOMENTS[name], kept.device))

    def _keep(self, state: dict[str, Tensor], name: str, value: Tensor) -> None:
        kept = _local(state[name])
        if name + SCALE not in state:
            kept.copy_(value)
            return
        scale = _local(state[name + SCALE])
        codes, scales = quantize(value, scale.shape[1], self._table(MOMENTS[name], kept.device))
        kept.copy_(codes)
        scale.copy_(scales)

    def _table(self, signed: bool, device: torch.device) -> Tensor:
        if (signed, device) not in self._tables:
            self._tables[signed, device] = dynamic_values(signed).to(device)
        return self._tables[signed, device]


def _block(row: int, blocks: int) -> int:
    """Values of a block: of BLOCK, or of a whole row that is shorter."""
    return row if blocks == 1 else BLOCK


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_as(local: Tensor, parameter: Tensor) -> Tensor:
    """A worker's rows as a part of a tensor whose rows are distributed as the parameter's are."""
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((parameter.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
