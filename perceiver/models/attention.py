"""Attention layers: pre-layer-norm, multi-head attention, MLP, residuals; and their key/value cache.

Shapes: B batch, L queries, S keys, C channels, H heads, D channels of a head (queries/keys and values may differ).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.models.attend import attend
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
