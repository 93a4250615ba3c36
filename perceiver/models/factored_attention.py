"""Cross-attention to an image whose channels are mostly positions, without forming keys and values.

An image's input channels are x_n = [p_n, e_n]: a few pixel channels p_n of each image and many position features e_n
that are the same for all images. Attention is linear in keys and values before and after its softmax, so projections
can be moved from the inputs to the (few) queries and (few) weighted means:

    scores   q . (W_k norm(x_n) + b_k)            = (W_k^T q) . norm(x_n) + q . b_k
    outputs  sum_n a_n (W_v norm(x_n) + b_v)      = W_v (sum_n a_n norm(x_n)) + (sum_n a_n) b_v

and, since LayerNorm is linear but for its two statistics, norm(x_n) = g * r_n (x_n - m_n 1) + b splits into a product
with the position table (one matrix product for the whole batch; a single one where the batch shares its queries, as in
the first cross-attention to learned latents) and rank-one terms of p_n and m_n. It is exact: see
tests/models/test_factored_attention.py.

Shapes: B batch, L queries, N positions, H heads, P pixel channels, E position channels, C = P + E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from perceiver.models.dropout import softmax_drop
from perceiver.models.shapes import AttentionChannels


class AttentionParts(Protocol):
    """The parts of `perceiver.models.attention.Attention` that are computed in another order here."""

    num_heads: int
    dropout: float
    training: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def split_heads(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FactoredInput:
    """An image as pixels and the shared position table, with the statistics of its LayerNorm."""

    pixels: Tensor
    """(B, N, P)."""
    table: Tensor
    """(N, E)."""
    mean: Tensor
    """(B, N): mean over the C channels."""
    rstd: Tensor
    """(B, N): 1 / standard deviation over the C channels."""

    @classmethod
    def of(cls, pixels: Tensor, table: Tensor, eps: float) -> FactoredInput:
        num_channels = pixels.shape[-1] + table.shape[-1]
        mean = (pixels.sum(-1) + table.sum(-1)) / num_channels
        square = (pixels.square().sum(-1) + table.square().sum(-1)) / num_channels
        return cls(pixels, table, mean, torch.rsqrt(square - mean.square() + eps))


def is_cheaper(num_query_heads: int, channels: AttentionChannels, element_size: int) -> bool:
    """Whether the factored form needs no more memory, and so less time, than keys and values.

    Per input position it keeps a score and a weight of each query and head in float32 or better; the plain form keeps
    the input, its norm, keys and values, in elements of `element_size` bytes.
    """
    plain = 2 * channels.kv_channels + channels.qk_channels + channels.v_channels
    return 2 * num_query_heads * max(element_size, 4) < plain * element_size


def factored_attention(attention: AttentionParts, norm: nn.LayerNorm, queries: Tensor, x: FactoredInput) -> Tensor:
    """`attention(queries, norm([x.pixels, x.table]))`, computed in float32 or better.

    Args:
        queries: (B or 1, L, channels), normed.

    Returns:
        (B, L, channels).
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    num_pixel, num_heads = x.pixels.shape[-1], attention.num_heads
    gain, shift = norm.weight.to(dtype), norm.bias.to(dtype)
    pixels, table, mean, rstd = (t.to(dtype) for t in (x.pixels, x.table, x.mean, x.rstd))

    # Queries in input coordinates: (B or 1, H, L, C), then scaled by the norm's gain.
    q = attention.split_heads(attention.q_proj(queries)).to(dtype)
    q = q * q.shape[-1] ** -0.5
    w_k = attention.k_proj.weight.to(dtype).unflatten(0, (num_heads, -1))
    q_input = q @ w_k
    q_gain = q_input * gain
    constant = (q_input @ shift)[..., None]
    if attention.k_proj.bias is not None:
        b_k = attention.k_proj.bias.to(dtype).unflatten(0, (num_heads, 1, -1))
        constant = constant + (q * b_k).sum(-1, keepdim=True)
    # scores = rstd (q_e . e + q_p . p - mean sum(q)) + constant, over (B, H, L, N)
    scores = q_gain[..., num_pixel:] @ table.T
    left = torch.cat([q_gain[..., :num_pixel], -q_gain.sum(-1, keepdim=True), constant], dim=-1)
    right = torch.cat([pixels * rstd[..., None], (mean * rstd)[..., None], torch.ones_like(rstd)[..., None]], dim=-1)
    scores = torch.addcmul(left @ right.transpose(1, 2)[:, None], scores, rstd[:, None, None])
    weights, scale = softmax_drop(scores, attention.dropout if attention.training else 0.0)

    # Weighted means of the normed input: (B, H, L, C)
    scaled = weights * (rstd * scale)[:, None, None]
    small = torch.cat([pixels, mean[..., None]], dim=-1)[:, None]
    mean_small = scaled @ small
    mean_table = scaled @ table
    means = torch.cat([mean_small[..., :num_pixel], mean_table], dim=-1) - mean_small[..., num_pixel:]
    total = weights.sum(-1, keepdim=True) * scale
    means = means * gain + total * shift
    w_v = attention.v_proj.weight.to(dtype).unflatten(0, (num_heads, -1))
    out = means @ w_v.transpose(1, 2)
    if attention.v_proj.bias is not None:
        out = out + total * attention.v_proj.bias.to(dtype).unflatten(0, (num_heads, 1, -1))
    return attention.o_proj(out.transpose(1, 2).flatten(2).to(queries.dtype))
