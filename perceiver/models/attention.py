"""Attention layers: pre-layer-norm, multi-head scaled-dot-product attention, MLP, residuals; and their key/value cache.

Shapes: B batch, L queries, S keys, C channels, H heads, D channels of a head (queries/keys and values may differ).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver.models.dropout import drop
from perceiver.models.factored_attention import FactoredInput, factored_attention
from perceiver.models.position import Rotation
from perceiver.models.shapes import AttentionChannels


class KeyValueCache:
    """Keys and values of one attention layer in a ring of fixed size: the newest overwrite the oldest.

    Keys are stored rotated, so that the order inside the ring does not matter to attention. The memory is taken by the
    first fill, in the type and on the device of what is stored.

    Attributes:
        capacity: positions that the ring holds.
        num_written: positions written so far, including those overwritten.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_written: int | Tensor = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether the first fill has been."""
        return self._keys is not None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, H, n, D) and returns what is to be attended: a first fill itself, later what the ring holds.

        n is at most the capacity in the first fill and 1 in all later ones.
        """
        if self.filled:
            assert keys.shape[2] == 1
            return self._extend(keys, values)
        num_new = keys.shape[2]
        assert num_new <= self.capacity
        self._keys, self._values = (t.new_zeros(*t.shape[:2], self.capacity, t.shape[3]) for t in (keys, values))
        self._keys[:, :, :num_new] = keys
        self._values[:, :, :num_new] = values
        self.num_written = self._count(num_new)
        return keys, values

    def next_mask(self, padding: Tensor | None) -> Tensor | None:
        """What the query of the next position may attend of that which its `append` will return.

        Args:
            padding: (B, capacity), True = padding, or None where there is none. The next place is marked as none.

        Returns:
            (B or 1, 1, 1, places), True = may be attended; None: all.
        """
        if padding is None:
            return None
        padding[:, self.num_written % self.capacity] = False
        return ~padding[:, None, None, : min(self.num_written + 1, self.capacity)]

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows of the batch (R,), in this order, also several times (beams)."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def _count(self, num: int) -> int | Tensor:
        return num

    def _extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self._keys is not None and self._values is not None
        place = self.num_written % self.capacity
        self._keys[:, :, place : place + 1] = keys
        self._values[:, :, place : place + 1] = values
        self.num_written += 1
        filled = min(self.num_written, self.capacity)
        return self._keys[:, :, :filled], self._values[:, :, :filled]


class StaticKeyValueCache(KeyValueCache):
    """The same with shapes that never change, for compiled models: a later `append` returns the whole ring, of which
    `next_mask` tells what is filled. `num_written` is a tensor (1,) on the device of the keys.
    """

    num_written: Tensor

    def next_mask(self, padding: Tensor | None) -> Tensor:
        """Of the whole ring; see `KeyValueCache.next_mask`."""
        visible = torch.arange(self.capacity, device=self.num_written.device)[None] <= self.num_written
        if padding is not None:
            padding.index_fill_(1, self.num_written % self.capacity, False)
            visible = visible & ~padding
        return visible[:, None, None]

    def _count(self, num: int) -> Tensor:
        assert self._keys is not None
        return torch.full((1,), num, device=self._keys.device)

    def _extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self._keys is not None and self._values is not None
        place = self.num_written % self.capacity
        self._keys.index_copy_(2, place, keys)
        self._values.index_copy_(2, place, values)
        self.num_written += 1
        return self._keys, self._values


LONG_ENOUGH_TO_SPLIT = 512
"""CPU kernels compute what causality masks. From this length on, the first half of the queries is left alone with the
first half of the keys, which saves a quarter of the work."""


GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that PyTorch may choose from on GPUs. cuDNN's is none of them: it plans anew for every length (137 ms, an H200), fails where
queries are expanded and heads of values larger than those of keys, and gives NaN with some masks (PyTorch issue 196678)."""


LARGEST_FLASH_HEAD = 256


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
    if q.device.type == "cpu" and (dropout or q.shape[-1] != v.shape[-1]):
        mask = causal_mask(num_queries, num_keys, q.device) if causal else mask
        return _attend_plainly(q, k, v, mask, dropout)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    scale, value_size = q.shape[-1] ** -0.5, v.shape[-1]
    q, k, v = (pad_heads(t, size) for t, size in zip((q, k, v), head_sizes(q.shape[-1], value_size, masked), strict=True))
    with sdpa_kernel(GPU_KERNELS):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    return out[..., :value_size]


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
    weights, scale = drop(scores.softmax(dim=-1), dropout)
    return weights @ (v * scale if dropout else v)


class Attention(nn.Module):
    """Multi-head attention with projections.

    Args:
        channels: of inputs, queries, keys and values.
        num_heads: divides `qk_channels` and `v_channels`.
        dropout: probability for attention weights.
        qkv_bias, out_bias: whether the projections have biases.

    The output has `q_channels` channels.
    """

    def __init__(
        self,
        channels: AttentionChannels,
        *,
        num_heads: int,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(channels.q_channels, channels.qk_channels, bias=qkv_bias)
        self.k_proj = nn.Linear(channels.kv_channels, channels.qk_channels, bias=qkv_bias)
        self.v_proj = nn.Linear(channels.kv_channels, channels.v_channels, bias=qkv_bias)
        self.o_proj = nn.Linear(channels.v_channels, channels.q_channels, bias=out_bias)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, H * D) -> (B, H, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotate_q: Rotation | None = None,
        rotate_k: Rotation | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x_q (B or 1, L, q_channels), x_kv (B, S, kv_channels) -> (B, L, q_channels). Mask, causal: see `attend`."""
        q = self.split_heads(self.q_proj(x_q))
        k = self.split_heads(self.k_proj(x_kv))
        v = self.split_heads(self.v_proj(x_kv))
        if q.shape[0] != k.shape[0]:
            q = q.expand(k.shape[0], -1, -1, -1)
        if rotate_q is not None:
            q = rotate_q(q)
        if rotate_k is not None:
            k = rotate_k(k)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask=mask, causal=causal, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """LayerNorm, Linear(C -> w C), GELU, Linear(w C -> C)."""

    def __init__(self, num_channels: int, widening_factor: int, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.widen = nn.Linear(num_channels, widening_factor * num_channels, bias=bias)
        self.narrow = nn.Linear(widening_factor * num_channels, num_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(self.norm(x))))


class CrossAttentionLayer(nn.Module):
    """Cross-attention and MLP, both with residual connections.

    With `prefix`, keys and values come from [norm(prefix), norm(queries)] (Perceiver AR, arXiv 2202.07765); otherwise
    from norm(x_kv) alone.

    Args:
        channels: kv_channels are those of x_kv or the prefix.
        widening_factor: hidden channels of the MLP as a multiple of its channels.
        attention_residual: whether the queries are added to the attention's output.
        residual_dropout: dropout on both outputs before they are added.
        mlp_bias: whether the MLP has biases.
        Others: see `Attention`.
    """

    def __init__(
        self,
        channels: AttentionChannels,
        *,
        num_heads: int,
        widening_factor: int,
        dropout: float,
        attention_residual: bool = True,
        residual_dropout: float = 0.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.attention_residual = attention_residual
        self.residual_dropout = residual_dropout
        self.q_norm = nn.LayerNorm(channels.q_channels)
        self.kv_norm = nn.LayerNorm(channels.kv_channels)
        self.attention = Attention(channels, num_heads=num_heads, dropout=dropout, qkv_bias=qkv_bias, out_bias=out_bias)
        self.mlp = MLP(channels.q_channels, widening_factor, bias=mlp_bias)

    def forward(
        self,
        x_q: Tensor,
        x_kv: Tensor | FactoredInput | None = None,
        *,
        prefix: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        rotate_q: Rotation | None = None,
        rotate_k: Rotation | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x_q (B or 1, L, q_channels), x_kv (B, S, kv_channels) or prefix (B, P, kv_channels) -> (B, L, q_channels)."""
        queries = self.q_norm(x_q)
        if isinstance(x_kv, FactoredInput):
            out = factored_attention(self.attention, self.kv_norm, queries, x_kv)
        else:
            if prefix is not None:
                x_kv = torch.cat([self.kv_norm(prefix), queries], dim=1) if prefix.shape[1] else queries
            else:
                x_kv = self.kv_norm(x_kv)
            out = self.attention(queries, x_kv, mask=mask, causal=causal, rotate_q=rotate_q, rotate_k=rotate_k, cache=cache)
        out = F.dropout(out, self.residual_dropout, self.training)
        x = x_q + out if self.attention_residual else out
        return x + F.dropout(self.mlp(x), self.residual_dropout, self.training)


class SelfAttentionLayer(nn.Module):
    """Self-attention and MLP, both with residual connections. Arguments: see `CrossAttentionLayer`."""

    def __init__(
        self,
        channels: AttentionChannels,
        *,
        num_heads: int,
        widening_factor: int,
        dropout: float,
        residual_dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.residual_dropout = residual_dropout
        self.norm = nn.LayerNorm(channels.q_channels)
        self.attention = Attention(channels, num_heads=num_heads, dropout=dropout, qkv_bias=bias, out_bias=bias)
        self.mlp = MLP(channels.q_channels, widening_factor, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotate: Rotation | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        normed = self.norm(x)
        out = self.attention(normed, normed, mask=mask, causal=causal, rotate_q=rotate, rotate_k=rotate, cache=cache)
        x = x + F.dropout(out, self.residual_dropout, self.training)
        return x + F.dropout(self.mlp(x), self.residual_dropout, self.training)
