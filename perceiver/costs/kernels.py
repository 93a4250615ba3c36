"""What attention's kernels compute and keep, where operators are counted one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perceiver.models import attend

if TYPE_CHECKING:
    from perceiver.costs.count import _Watch

SDPA = F.scaled_dot_product_attention


@contextmanager
def without_masks(cuda: bool) -> Iterator[None]:
    """On GPUs the kernel knows causality, of fewer queries than keys too, and no mask is made."""
    with mock.patch.object(attend, "right_aligned", lambda *sizes: None) if cuda else nullcontext():
        yield


class Kernels(TorchFunctionMode):
    """Fused attention and dropout in place of what meta tensors would be given."""

    def __init__(self, cuda: bool, watch: _Watch) -> None:
        super().__init__()
        self._cuda, self._watch = cuda, watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self._cuda:
            return _dropout(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # this mode does not see the calls inside of it
            with mock.patch.object(F, "scaled_dot_product_attention", self._attention):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        few = query.dtype.itemsize < 4 and query.shape[:-1].numel() * key.shape[-2] <= attend.MOST_PLAIN_WEIGHTS
        if not self._cuda and attend.is_plain(dropout_p, query.shape[-1], value.shape[-1], few):
            return SDPA(query, key, value, attn_mask, dropout_p, *args, **kwargs)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # kernels add masks
        return _FusedAttention.apply(query, key, value, attn_mask, self._watch)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


class _FusedAttention(torch.autograd.Function):
    """Attention of shapes alone. It keeps its inputs, its output and, in fp32, logarithms of the softmax's sums."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, watch: _Watch) -> Tensor:
        out = _as_kernels_do(query, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        ctx.watch = watch
        scores, means = _attention_flops(query, key, value)
        watch.flops += scores + means
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        scores, means = _attention_flops(query, key, value)
        for_query, for_key, for_value = ctx.needs_input_grad[:3]
        # Gradients of values; of weights; of queries; of keys. Scores are computed anew, which does not count.
        ctx.watch.flops += means * (for_value + (for_query or for_key)) + scores * (for_query + for_key)
        inputs = ((query, for_query), (key, for_key), (value, for_value))
        return (*[_as_kernels_do(t, t.shape[-1]) if needed else None for t, needed in inputs], None, None)


def _as_kernels_do(like: Tensor, channels: int) -> Tensor:
    """A new tensor of the shape of `like` but for its channels. In memory heads stand side by side, so that to join them copies nothing."""
    *batch, heads, length, _ = like.shape if like.dim() > 3 else (*like.shape[:-2], 1, *like.shape[-2:])
    return like.new_empty(*batch, length, heads, channels).transpose(-3, -2).reshape(*like.shape[:-1], channels)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, float]:
    """FLOPs of the scores and of the weighted means."""
    pairs = 2.0 * math.prod(query.shape[:-1]) * key.shape[-2]
    return pairs * query.shape[-1], pairs * value.shape[-1]
