"""Scaled-dot-product attention itself, and which kernel computes it.

Shapes: B batch, L queries, S keys, H heads, D channels of a head (queries/keys and values may differ).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver.models.dropout import softmax_drop

LONG_ENOUGH_TO_SPLIT = 512
"""CPU kernels compute what causality masks. From this length on, the first half of the queries is left alone with the
first half of the keys, which saves a quarter of the work."""
MOST_PLAIN_WEIGHTS = 2**25
"""Attention weights in bf16 (64 MiB) up to which CPUs compute attention step by step: in bf16 PyTorch's fused CPU kernel takes three times
as long, for a single query seventeen times (docs/speed.md)."""
GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that PyTorch may choose from on GPUs. cuDNN's is none of them: it plans anew for every length (137 ms, an H200), fails where
queries are expanded and heads of values larger than those of keys, and gives NaN with some masks (PyTorch issue 196678)."""
LARGEST_FLASH_HEAD = 256
"""Channels of a head that the flash kernel takes."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Scaled-dot-product attention.

    Args:
        q, k, v: (B, H, L, D), (B, H, S, D), (B, H, S, D of values).
        mask: boolean, broadcastable to (B, H, L, S), True = may be attended; a key at least
            for each query. It already holds causality if wanted.
        causal: query i sees the keys up to S - L + i (aligned at the right ends); not together with a mask.
        dropout: probability for attention weights.

    Returns:
        (B, H, L, D of values).
    """
    num_queries, num_keys, masked = q.shape[2], k.shape[2], mask is not None
    if causal and num_queries == 1:
        causal = False
    elif causal and num_queries == num_keys and num_keys >= LONG_ENOUGH_TO_SPLIT and q.device.type == "cpu":
        half = num_keys // 2
        first = attend(*(t[:, :, :half] for t in (q, k, v)), causal=True, dropout=dropout)
        return torch.cat([first, attend(q[:, :, half:], k, v, causal=True, dropout=dropout)], dim=2)
    elif causal and num_queries != num_keys:  # `is_causal` aligns shorter queries at the left
        mask, causal = right_aligned(num_queries, num_keys, q.device), False
    # Numbers of weights are asked for only where they matter: where a model is exported, they would fix its sizes.
    few = q.dtype.itemsize < 4 and q.shape[:-1].numel() * num_keys <= MOST_PLAIN_WEIGHTS
    if q.device.type == "cpu" and is_plain(dropout, q.shape[-1], v.shape[-1], few):
        mask = causal_mask(num_queries, num_keys, q.device) if causal else mask
        return _attend_plainly(q, k, v, mask, dropout)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    scale, value_size = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = (pad_heads(t, size) for t, size in zip((q, k, v), head_sizes(q.shape[-1], value_size, masked), strict=True))
    with sdpa_kernel(GPU_KERNELS):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    return out[..., :value_size]


def is_plain(dropout: float, qk_size: int, value_size: int, few: bool) -> bool:
    """Whether attention is computed step by step on a CPU, not by PyTorch's fused kernel.

    Args:
        qk_size, value_size: channels of a head.
        few: its weights have fewer than 32 bits, and are at most `MOST_PLAIN_WEIGHTS` of all examples and heads together.
    """
    return bool(dropout) or qk_size != value_size or few


def head_sizes(qk_size: int, value_size: int, masked: bool) -> tuple[int, int, int]:
    """Channels of a head that GPU kernels are given for queries, keys and values.

    They want multiples of 8 (261 is none). The flash kernel, which takes no mask, wants one size of at most 256 for all three: filled up
    to it, heads of 32 and 160 channels take half the time (docs/performance.md).
    """
    sizes = tuple(-(-size // 8) * 8 for size in (qk_size, value_size))
    flash = not masked and max(sizes) <= LARGEST_FLASH_HEAD
    return (max(sizes),) * 3 if flash else (sizes[0], sizes[0], sizes[1])


def pad_heads(t: Tensor, size: int) -> Tensor:
    """(..., D) filled up with zeros, which change no score and no output, to (..., size)."""
    return F.pad(t, (0, size - t.shape[-1])) if t.shape[-1] < size else t


def right_aligned(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """What stands for `causal_mask` in PyTorch's attention. On GPUs it takes no memory: the flash kernel knows this alignment, where a
    mask would go to kernels that are slower, and of which cuDNN's is planned anew for every length.
    """
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # here, as it loads the compiler: seconds, also where there is no GPU

        return causal_lower_right(num_queries, num_keys)
    return causal_mask(num_queries, num_keys, device)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys), True where query i sees key j: j <= num_keys - num_queries + i (right ends aligned)."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """What PyTorch does on CPUs where it has no fused kernel, but with a cheaper dropout, and with a softmax that need
    not look for queries without any key: no mask here has them.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    weights, scale = softmax_drop(scores, dropout)
    return weights @ (v * scale if dropout else v)
