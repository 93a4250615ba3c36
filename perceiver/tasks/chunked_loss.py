"""Cross-entropy over a large vocabulary without all logits in memory at once.

Of N positions and V classes the logits take N x V numbers in fp32, and again as much for their gradient: 16,384 positions and
32,000 classes 2.1 GB each. Here they are made a chunk of positions at a time, and the chunk's gradients with them, so that only
gradients of the size of the hidden states and of the matrix are kept. The computation is the same, no product is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver.tasks.base import IGNORE_INDEX

CHUNK_ELEMENTS = 2**26
"""Most logits that are in memory at once, in fp32: 256 MiB."""


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy of softmax(hidden weight^T + bias) over the valid labels; differentiable once.

    Args:
        hidden: (..., C).
        weight: (V, C), of the same type as `hidden`: products are computed in it, all else in fp32.
        bias: (V,) or None.
        labels: (...), int64; IGNORE_INDEX where there is no target.
        chunk_elements: most logits at once.

    Returns:
        The sum: (), fp32; and, without gradient, what each label adds to it: (...), fp32.
    """
    loss, each = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, bias, labels.flatten(), chunk_elements)
    return loss, each.view(labels.shape)


def chunk_rows(num_classes: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Positions whose logits are computed at once."""
    return max(1, chunk_elements // num_classes)


def chunk_loss(scores: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a chunk and its gradient with respect to the scores, as a compiler can fuse them: the scores are read twice, and
    nothing in fp32 is written, where the operations one by one pass nine times over all of it.

    Args:
        scores: (n, V), of the type of the products.
        target: (n, 1) int64, of valid and of other positions.
        valid: (n,) bool.

    Returns:
        What each position adds to the loss (n,), fp32; the gradient (n, V), of the scores' type.
    """
    exact = scores.float()
    exact = exact - exact.amax(dim=-1, keepdim=True)
    total = exact.exp().sum(dim=-1, keepdim=True)
    each = (total.log() - exact.gather(1, target))[:, 0] * valid
    wanted = torch.arange(scores.shape[1], device=scores.device)[None] == target
    gradient = (exact.exp() / total - wanted.float()) * valid[:, None]
    return each, gradient.to(scores.dtype)


@lru_cache(maxsize=1)
def triton_is_there() -> bool:
    """Whether code for GPUs can be compiled."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def fused_chunk_loss() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`chunk_loss`, compiled at its first call. Not when this module is imported: to load the compiler takes seconds."""
    return torch.compile(chunk_loss, dynamic=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_elements: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        each = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over chunks in fp32, whatever the type of the products.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        size = chunk_rows(weight.shape[0], chunk_elements)
        for start in range(0, len(labels), size):
            part, target = hidden[start : start + size], labels[start : start + size]
            valid = target != IGNORE_INDEX
            target = target.clamp(min=0)[:, None]
            scores = F.linear(part, weight, bias)
            if compiled := scores.device.type == "cuda" and not needs_bias and triton_is_there():
                each[start : start + size], scores = fused_chunk_loss()(scores, target, valid)
            else:
                scores = scores.float()
                scores -= scores.amax(dim=-1, keepdim=True)
                wanted = scores.gather(1, target)
                total = scores.exp_().sum(dim=-1, keepdim=True)
                each[start : start + size] = (total.log() - wanted)[:, 0] * valid
            loss += each[start : start + size].sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            if not compiled:
                scores /= total  # now probabilities, and with the next two lines the gradient of the scores
                scores.scatter_add_(1, target, -torch.ones_like(wanted))
                scores *= valid[:, None]
                if grad_bias is not None:
                    grad_bias += scores.sum(dim=0)
                scores = scores.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(scores, weight, out=grad_hidden[start : start + size])
            if grad_weight is not None:
                grad_weight += scores.mT @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(each)
        ctx.set_materialize_grads(False)
        return loss, each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtypes[0]),
            None if grad_bias is None else (grad_bias * grad).to(ctx.dtypes[1]),
            None,
            None,
        )
