"""Optimizers besides the two that `optimization.py` starts from, of torch.optim and of timm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from perceiver.config.core import UserError, spelled
from perceiver.config.optimization import Adam, AdamW, OptimizerConfig, float_pair, shard_size

if TYPE_CHECKING:
    import torch


class Sgd(OptimizerConfig):
    """Gradient descent with momentum; weight decay is added to the gradient."""

    momentum: float = 0.9
    """Momentum factor."""
    nesterov: bool = False
    """Use Nesterov momentum."""

    def check(self, where: str) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"--{spelled(where)}momentum is {self.momentum} and must be at least 0 and below 1")
        if self.nesterov and not self.momentum:
            raise UserError(f"--{spelled(where)}nesterov is True, which needs a --{spelled(where)}momentum above 0")

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, nesterov=self.nesterov)

    def state_size(self, shape: tuple[int, ...], shards: int = 1, hidden: bool = False) -> int:
        return shard_size(shape, shards) if self.momentum else 0


class Lion(OptimizerConfig):
    """Lion (arXiv 2302.06675): steps of one size, by the sign of the momentum; learning rates a third to a tenth of AdamW's."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Shares of the momentum in the step, and of the momentum that is kept."""

    def check(self, where: str) -> None:
        _check_betas(self.betas, where)

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        from timm.optim import Lion as Implementation

        return Implementation(groups, lr=lr, betas=float_pair(self.betas))

    def state_size(self, shape: tuple[int, ...], shards: int = 1, hidden: bool = False) -> int:
        return shard_size(shape, shards)


class AdamW8bit(AdamW):
    """AdamW whose moments are kept in 8 bits (arXiv 2110.02861): about a quarter of the memory, in longer steps."""

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        from perceiver.config.adamw8bit import AdamW8bit as Implementation

        return Implementation(groups, lr=lr, betas=float_pair(self.betas), eps=self.eps)

    def state_size(self, shape: tuple[int, ...], shards: int = 1, hidden: bool = False) -> float:
        from perceiver.config.adamw8bit import row_blocks

        size, blocks = shard_size(shape, shards), row_blocks(shape)
        return 2 * size if blocks is None else 2 * (size / 4 + shard_size((shape[0], blocks), shards))


class Lamb(Adam):
    """LAMB (arXiv 1904.00962): Adam whose step in each weight is as long as a share of the weight, for very large batches."""

    eps: float = 1e-6
    """Added to the denominator."""

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        from timm.optim import Lamb as Implementation

        return Implementation(groups, lr=lr, betas=float_pair(self.betas), eps=self.eps, max_grad_norm=None)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        import torch

        for group in optimizer.param_groups:  # counted there, where no checkpoint looks
            group["step"] = torch.tensor(float(step))


class Adafactor(OptimizerConfig):
    """Adafactor (arXiv 1804.04235), which keeps a row and a column of second moments of each matrix. Its steps are relative to the weights'
    size: by `lr` (0.01 in the paper), and by 1 / sqrt(step) at most. Each worker computes the steps of whole parameters.
    """

    beta2_decay: float = -0.8
    """Exponent by which the share of a new gradient in the second moments falls with the steps."""
    clip_threshold: float = 1.0
    """Largest root mean square of a step, before it is multiplied by the learning rate."""
    least_scale: float = 1e-3
    """Size that a weight is taken to have at least."""

    def check(self, where: str) -> None:
        if not -1 <= self.beta2_decay < 0:
            raise UserError(f"--{spelled(where)}beta2-decay is {self.beta2_decay} and must be at least -1 and below 0")
        for name, value in {"clip-threshold": self.clip_threshold, "least-scale": self.least_scale}.items():
            if not value > 0:
                raise UserError(f"--{spelled(where)}{name} is {value} and must be above 0")

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        from perceiver.config.adafactor import Adafactor as Implementation

        return Implementation(groups, lr=lr, beta2_decay=self.beta2_decay, eps=(None, self.least_scale), d=self.clip_threshold)

    def state_size(self, shape: tuple[int, ...], shards: int = 1, hidden: bool = False) -> int:
        size = math.prod(shape)  # whole on all workers
        return size if len(shape) < 2 else size // shape[-1] + size // shape[-2]


class Muon(AdamW):
    """Muon (https://kellerjordan.github.io/posts/muon): the matrices of layers take orthogonal steps, all else is left to AdamW, with whose
    learning rates and weight decays it is used (arXiv 2502.16982). Each worker computes the steps of whole matrices.
    """

    apart: ClassVar[bool] = True
    momentum: float = 0.95
    """Share of the matrices' momentum that is kept."""
    nesterov: bool = True
    """Look ahead by the momentum."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products by which a step is made orthogonal; bf16 is faster on GPUs."""

    def check(self, where: str) -> None:
        super().check(where)
        if not 0 <= self.momentum < 1:
            raise UserError(f"--{spelled(where)}momentum is {self.momentum} and must be at least 0 and below 1")

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        import torch

        from perceiver.config.muon import Muon as Implementation

        precision = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return Implementation(
            groups,
            momentum=self.momentum,
            nesterov=self.nesterov,
            precision=precision,
            lr=lr,
            betas=float_pair(self.betas),
            eps=self.eps,
            fused=True,
        )

    def state_size(self, shape: tuple[int, ...], shards: int = 1, hidden: bool = False) -> int:
        return (1 if hidden else 2) * shard_size(shape, shards)


def _check_betas(betas: tuple[float, float], where: str) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"--{spelled(where)}betas is {betas} and both must be at least 0 and below 1")
