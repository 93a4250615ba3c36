"""Perceiver AR (arXiv 2202.07765): a causal model whose last positions are latents and all before them is prefix.

Shapes: B batch, N positions = P prefix + L latents, K prefix positions kept, C channels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import ModelConfig, UserError
from perceiver.models.attend import causal_mask
from perceiver.models.attention import (
    CrossAttentionLayer,
    KeyValueCache,
    SelfAttentionLayer,
    StaticKeyValueCache,
)
from perceiver.models.checks import check_heads, check_sizes
from perceiver.models.initialize import initialize, initialized
from perceiver.models.inputs import TextAdapter
from perceiver.models.position import rotation, token_positions
from perceiver.models.shapes import AttentionChannels
from perceiver.models.tensor_shapes import check_tensor


class PerceiverARConfig(ModelConfig):
    """Perceiver AR (arXiv 2202.07765): causal; the last positions are latents, all before them is prefix."""

    vocab_size: int = 262
    """Number of token ids."""
    max_seq_len: int = 4096
    """Longest input in tokens, prefix and latents together."""
    max_latents: int = 512
    """Number of latents: the last positions of the input, which predict. The prefix holds at most the rest."""
    num_channels: int = 512
    """Channels of all layers."""
    num_heads: int = 8
    """Heads of all attention layers."""
    num_self_attention_layers: int = 8
    """Causal self-attention layers on the latents."""
    num_self_attention_rotary_layers: int = 1
    """Number of self-attention layers, from the first, with rotary embedding; -1: all."""
    self_attention_widening_factor: int = 4
    """Hidden channels of the self-attention's MLPs as a multiple of num_channels."""
    cross_attention_widening_factor: int = 4
    """Hidden channels of the cross-attention's MLP as a multiple of num_channels."""
    cross_attention_dropout: float = 0.5
    """Share of the prefix positions to leave out in training (prefix dropout)."""
    post_attention_dropout: float = 0.0
    """Dropout on attention weights."""
    residual_dropout: float = 0.0
    """Dropout on layer outputs before they are added."""
    abs_pos_emb: bool = True
    """Use a learned position embedding. Rotary embedding then covers half of each head's channels, otherwise all."""
    output_norm: bool = False
    """Apply LayerNorm before the output matrix."""
    output_bias: bool = True
    """Add a bias for each token at the output (whose matrix is the token embedding)."""
    init_scale: float = 0.02
    """Standard deviation of initial weights."""

    def build(self) -> nn.Module:
        return PerceiverAR(self)

    def text_limits(self) -> tuple[int, int]:
        return self.max_seq_len, self.vocab_size

    def causal_limits(self) -> tuple[int, int]:
        return self.max_seq_len, self.max_latents

    def check(self, where: str) -> None:
        check_sizes(self, where, except_for="num_self_attention_rotary_layers")
        check_heads(self.num_heads, self.num_channels, "model.num-heads", "model.num-channels")
        if self.num_channels // self.num_heads < 2:
            raise UserError(
                f"model.num-heads is {self.num_heads} for {self.num_channels} channels, but rotary embedding needs "
                f"heads of at least 2 channels: at most {self.num_channels // 2} heads"
            )
        if self.max_latents > self.max_seq_len:
            raise UserError(f"model.max-latents is {self.max_latents}, but must be at most model.max-seq-len, {self.max_seq_len}")
        if not -1 <= self.num_self_attention_rotary_layers <= self.num_self_attention_layers:
            raise UserError(
                f"model.num-self-attention-rotary-layers is {self.num_self_attention_rotary_layers}, but must be -1 "
                f"(all) or 0 to model.num-self-attention-layers, {self.num_self_attention_layers}"
            )


@dataclass
class PerceiverARCache:
    """Keys and values of all layers, and what is known of the tokens they belong to. Made by `PerceiverAR.make_cache`.

    The cross-attention keeps the newest max_seq_len tokens, each self-attention layer the newest max_latents latents.
    What is kept stays as it was computed: a latent that a model without cache would turn into prefix, or move in its
    window, keeps the norm, learned position and context that it had.
    """

    cross_attention: KeyValueCache
    self_attention: list[KeyValueCache]
    num_padding: Tensor | None = None
    """Left padding of each row's prompt (B, 1); None: no row is padded, and no mask is needed."""
    padding: Tensor | None = None
    """(B, ring of the cross-attention), True = padding."""
    latent_padding: Tensor | None = None
    """(B, ring of the self-attention), True = padding."""

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows of the batch (R,), in this order, also several times (beams)."""
        for layer in (self.cross_attention, *self.self_attention):
            layer.select(rows)
        if self.num_padding is not None:
            assert self.padding is not None and self.latent_padding is not None
            self.num_padding = self.num_padding[rows]
            self.padding, self.latent_padding = self.padding[rows], self.latent_padding[rows]


class PerceiverAR(nn.Module):
    """Perceiver AR over token ids: `PerceiverAR(config, seed=0)`, on the default device, with initial weights (none on "meta").

    Padding is on the left and may reach into the latents. A padded latent attends to itself alone and no other attends
    to it: its output is finite and means nothing, those of the others are as without padding.
    """

    @initialized
    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__()
        self.config = config
        channels, head_channels = config.num_channels, config.num_channels // config.num_heads
        self.num_rotated_channels = head_channels // 2 if config.abs_pos_emb else head_channels
        num_rotary_layers = config.num_self_attention_rotary_layers
        self.num_rotary_layers = config.num_self_attention_layers if num_rotary_layers == -1 else num_rotary_layers

        same = AttentionChannels(q_channels=channels, kv_channels=channels, qk_channels=channels, v_channels=channels)
        self.input_adapter = TextAdapter(config.vocab_size, config.max_seq_len, channels, positions=config.abs_pos_emb)
        self.cross_attention = CrossAttentionLayer(
            same,
            num_heads=config.num_heads,
            widening_factor=config.cross_attention_widening_factor,
            dropout=config.post_attention_dropout,
            residual_dropout=config.residual_dropout,
            qkv_bias=False,
            mlp_bias=False,
        )
        self.cross_attention.lengths_vary = True  # those of prefixes, see `build_sharded`
        self.self_attention = nn.ModuleList(
            SelfAttentionLayer(
                same,
                num_heads=config.num_heads,
                widening_factor=config.self_attention_widening_factor,
                dropout=config.post_attention_dropout,
                residual_dropout=config.residual_dropout,
                bias=False,
            )
            for _ in range(config.num_self_attention_layers)
        )
        self.output_norm = nn.LayerNorm(channels) if config.output_norm else None
        self.output_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.output_bias else None

    def layers(self) -> list[nn.Module]:
        """Layers to shard, recompute and compile one by one."""
        return [self.cross_attention, *self.self_attention]

    def init_weights(self, seed: int) -> None:
        """Draws all parameters; see `initialize`."""
        initialize(self, self.config.init_scale, seed)

    def reset_buffers(self) -> None:
        """Nothing: there are no constants in memory."""

    def compile_next(self) -> None:
        """Compiles the step of one more token with a static cache, one graph for a batch size (no effect if it is)."""
        if "_hidden_next" not in self.__dict__:
            self.__dict__["_hidden_next"] = torch.compile(self._hidden_next, fullgraph=True, dynamic=False)

    def make_cache(self, max_tokens: int | None = None, static: bool = False) -> PerceiverARCache:
        """An empty cache for one batch of sequences.

        Args:
            max_tokens: length of prompt and continuation together, if known, to take no more memory than needed.
            static: for a compiled step: of full size whatever `max_tokens`, and of the same shapes at every step.
        """
        config = self.config
        if static:
            layers: list[KeyValueCache] = [StaticKeyValueCache(config.max_latents) for _ in self.self_attention]
            return PerceiverARCache(StaticKeyValueCache(config.max_seq_len), layers)
        num_tokens = min(config.max_seq_len, max_tokens or config.max_seq_len)
        num_latents = min(config.max_latents, num_tokens)
        return PerceiverARCache(KeyValueCache(num_tokens), [KeyValueCache(num_latents) for _ in self.self_attention])

    def forward(
        self,
        x: Tensor,
        prefix_len: int = 0,
        pad_mask: Tensor | None = None,
        prefix_keep: Tensor | None = None,
        cache: PerceiverARCache | None = None,
        return_hidden: bool = False,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the tokens that follow each latent.

        Args:
            x: token ids (B, N); with a filled cache the one next token (B, 1).
            prefix_len: P, number of positions, from the first, that are prefix; the others are latents.
            pad_mask: (B, N), True = padding (on the left); with a filled cache None. Pass None where nothing is padded:
                it saves the masks.
            prefix_keep: (B, K) positions of the prefix that are kept, others are left out (prefix dropout); None: all.
            cache: an empty cache is filled by this call, a filled one is read and extended.
            return_hidden: leave out the output matrix and return hidden states instead, see `head`.
            last_only: return the last latent's alone.

        Returns:
            (B, L, V), or hidden states (B, L, C); with `last_only` L is 1.
        """
        if cache is not None and cache.cross_attention.filled:
            hidden = self._hidden_next(x, cache)
        else:
            hidden = self._hidden(x, prefix_len, pad_mask, prefix_keep, cache)
        if last_only:
            hidden = hidden[:, -1:]
        return hidden if return_hidden else self.head(hidden)

    def hidden(self, x: Tensor, prefix_len: int = 0, **arguments: Tensor | None) -> Tensor:
        """Final hidden states (B, L, C), after the output norm: `forward` without `head`, same arguments."""
        return self(x, prefix_len, return_hidden=True, **arguments)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C): piece by piece, a loss needs no memory for all logits at once."""
        return F.linear(hidden, *self.output_matrix())

    def output_matrix(self) -> tuple[Tensor, Tensor | None]:
        """The matrix (V, C) and bias (V,) or None of `head`."""
        return self.input_adapter.txt_embedding.weight, self.output_bias

    def _hidden(
        self,
        x: Tensor,
        prefix_len: int,
        pad_mask: Tensor | None,
        prefix_keep: Tensor | None,
        cache: PerceiverARCache | None,
    ) -> Tensor:
        check_tensor(x, ("B", ("N", self.config.max_seq_len)), "a Perceiver AR takes", whole_numbers=True)
        num_latents = x.shape[1] - prefix_len
        if not 0 < num_latents <= self.config.max_latents:
            raise UserError(
                f"prefix_len is {prefix_len} for {x.shape[1]} tokens, which leaves {num_latents} latents: there must be 1 to "
                f"{self.config.max_latents}"
            )
        positions = token_positions(x, pad_mask)
        if prefix_keep is not None:
            # Indices are chosen before embedding, so that nothing is computed for positions that are left out.
            x, positions, pad_mask = (_keep(t, prefix_keep, prefix_len) for t in (x, positions, pad_mask))
            prefix_len = prefix_keep.shape[1]
        embedded = self.input_adapter(x, positions)
        rotate = rotation(positions, self.num_rotated_channels)
        rotate_latents = rotate.last(num_latents)
        mask = latent_mask = None
        if pad_mask is not None:
            mask = causal_padding_mask(pad_mask, num_latents)
            latent_mask = causal_padding_mask(pad_mask[:, prefix_len:], num_latents)
        if cache is not None:
            self._note_prompt(cache, x, pad_mask, num_latents)

        hidden = self.cross_attention(
            embedded[:, prefix_len:],
            prefix=embedded[:, :prefix_len],
            mask=mask,
            causal=mask is None,
            rotate_q=rotate_latents,
            rotate_k=rotate,
            cache=cache and cache.cross_attention,
        )
        for number, layer in enumerate(self.self_attention):
            hidden = layer(
                hidden,
                mask=latent_mask,
                causal=latent_mask is None,
                rotate=rotate_latents if number < self.num_rotary_layers else None,
                cache=cache and cache.self_attention[number],
            )
        return self.output_norm(hidden) if self.output_norm is not None else hidden

    def _note_prompt(self, cache: PerceiverARCache, x: Tensor, pad_mask: Tensor | None, num_latents: int) -> None:
        if pad_mask is None:
            return
        cache.num_padding = pad_mask.sum(dim=1, keepdim=True)
        cache.padding = pad_mask.new_zeros(x.shape[0], cache.cross_attention.capacity)
        cache.padding[:, : x.shape[1]] = pad_mask
        cache.latent_padding = pad_mask.new_zeros(x.shape[0], cache.self_attention[0].capacity)
        cache.latent_padding[:, :num_latents] = pad_mask[:, -num_latents:]

    def _hidden_next(self, x: Tensor, cache: PerceiverARCache) -> Tensor:
        """One more latent after those of the cache. Positions count on: rotary embedding sees but their differences."""
        assert x.shape[1] == 1
        # The cross-attention's ring has been given all tokens so far.
        num_tokens = cache.cross_attention.num_written
        # A copy: the count is raised before the position has been used.
        position = num_tokens.clone() if isinstance(num_tokens, Tensor) else torch.full((1,), num_tokens, device=x.device)
        position = position[None]
        if cache.num_padding is not None:
            position = position - cache.num_padding
        mask = cache.cross_attention.next_mask(cache.padding)
        latent_mask = cache.self_attention[0].next_mask(cache.latent_padding)
        # Learned positions end with the window: there a token that came later stands in the last place.
        hidden = self.input_adapter(x, position.clamp(max=self.config.max_seq_len - 1))
        rotate = rotation(position, self.num_rotated_channels)
        hidden = self.cross_attention(
            hidden, prefix=hidden[:, :0], mask=mask, rotate_q=rotate, rotate_k=rotate, cache=cache.cross_attention
        )
        for number, (layer, layer_cache) in enumerate(zip(self.self_attention, cache.self_attention, strict=True)):
            rotate_layer = rotate if number < self.num_rotary_layers else None
            hidden = layer(hidden, mask=latent_mask, rotate=rotate_layer, cache=layer_cache)
        return self.output_norm(hidden) if self.output_norm is not None else hidden


def causal_padding_mask(pad_mask: Tensor, num_queries: int) -> Tensor:
    """What the last positions may attend: themselves, and all before them that is not padding.

    Args:
        pad_mask: (B, S), True = padding.

    Returns:
        (B, 1, num_queries, S), True = may be attended. No row is empty: a padded query sees itself.
    """
    num_keys = pad_mask.shape[1]
    causal = causal_mask(num_queries, num_keys, pad_mask.device)
    itself = causal.triu(num_keys - num_queries)
    return (causal & ~pad_mask[:, None] | itself)[:, None]


def _keep(t: Tensor | None, prefix_keep: Tensor, prefix_len: int) -> Tensor | None:
    """Keeps the given positions of the prefix and all latents of a (B or 1, N) tensor."""
    if t is None:
        return None
    t = t.expand(prefix_keep.shape[0], -1)
    return torch.cat([t[:, :prefix_len].gather(1, prefix_keep), t[:, prefix_len:]], dim=1)
