"""Initial weights of a text model whose attention starts at neighbouring positions.

A Perceiver routes text through latents that begin without any relation to positions: from small random weights attention is
uniform, every output sees the mean of the text, and while that lasts there is no gradient that would teach positions to find
their neighbours. A small masked language model stays there, at the loss of guessing by frequency. Here the relation is given:
positions, latents and output queries start as the same sines and cosines of a place in the text (arXiv 1706.03762, Section
3.5), latents at places that are evenly spaced, and query and key projections start such that each head looks a fixed distance
away. Nothing but values differs: parameters, functions and training are those of any other model, and all of it is learned.

Shapes: N positions, L latents, P channels that hold a place at the start (half of the embedding's).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver.models.inputs import TextInput

_SHARPNESS = {"encoder": 2.5, "within": 2.0, "decoder": 3.0}
"""How narrowly heads look at the start: the scale of query and key projections of the input, latents and output."""
_NOISE = 0.3
"""Random part of the latents' own query and key projections, of the usual 1 / sqrt(inputs)."""


@dataclass(frozen=True, kw_only=True)
class LocalInit:
    """Turns the normal initial weights of a text model into local ones, one parameter at a time (see `initialize`)."""

    text: TextInput
    """The model's input."""
    num_latents: int
    """Number of latents."""
    num_latent_channels: int
    """Channels of the latents."""
    num_encoder_heads: int
    """Heads of the encoder's cross-attention."""
    num_latent_heads: int
    """Heads of the self-attention of the latents."""
    num_decoder_heads: int
    """Heads of the decoder's cross-attention."""
    num_layers_per_block: int
    """Self-attention layers of a block."""
    num_query_channels: int | None
    """Channels of the output queries where there is one for each position of the text; else None."""
    init_scale: float
    """Standard deviation of the embeddings, and of the normal weights that are given."""

    @property
    def num_positions(self) -> int:
        return self.text.max_seq_len

    @property
    def num_channels(self) -> int:
        """P."""
        return self.text.num_channels // 2

    @property
    def spacing(self) -> float:
        """Positions from one latent to the next."""
        return self.num_positions / self.num_latents

    @property
    def frequencies(self) -> Tensor:
        """(P / 2,): half a turn a position, down to one a text."""
        exponents = torch.arange(self.num_channels // 2) / (self.num_channels // 2)
        return math.pi * float(self.num_positions) ** -exponents

    def __call__(self, name: str, normal: Tensor) -> Tensor:
        """The initial value of the parameter `name`; `normal` is drawn from N(0, init_scale^2) and is all that is random."""
        num_channels = self.num_channels
        if name.endswith("txt_embedding.weight"):
            normal[:, :num_channels] = 0.0
            return normal
        if name.endswith("pos_embedding.weight"):
            return self._places(torch.arange(self.num_positions), normal) * self.init_scale
        if name == "encoder.latents":
            return self._places((torch.arange(self.num_latents) + 0.5) * self.spacing - 0.5, normal)
        if name == "decoder.queries":
            return self._places(torch.arange(self.num_positions), normal) if self.num_query_channels is not None else normal
        values = normal / self.init_scale * normal.shape[1] ** -0.5
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return self._looking(name, values)
        if name.startswith("encoder.") and name.endswith(("o_proj.weight", "narrow.weight")):
            values[:num_channels] = 0.0  # places stay readable in all layers
            if "self_attention" in name:
                values *= (2 * self.num_layers_per_block) ** -0.5
        return values

    def _places(self, places: Tensor, like: Tensor) -> Tensor:
        """Sines and cosines of places (n,) in the first P channels of n vectors, zero in the others: mean square 1 in the P."""
        angles = places[:, None] * self.frequencies
        values = torch.zeros_like(like)
        values[:, : self.num_channels] = math.sqrt(2) * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return values

    def _looking(self, name: str, values: Tensor) -> Tensor:
        """Query or key projection (heads * D, inputs) whose heads score keys by their distance from a place near the query's.

        A head compares D / 2 of the frequencies; its query is turned by the distance that it looks away.
        """
        heads, sharpness, noise, distances = self._heads(name)
        if heads is None:
            return values
        values *= noise
        per_head = values.shape[0] // heads
        num_pairs, num_frequencies = per_head // 2, len(self.frequencies)
        for head, distance in enumerate(distances):
            chosen = torch.arange(num_pairs) * num_frequencies // num_pairs + head * num_frequencies // (num_pairs * heads)
            chosen = chosen % num_frequencies
            turn = self.frequencies[chosen] * (distance if name.endswith("q_proj.weight") else 0.0)
            sin_row = head * per_head + 2 * torch.arange(num_pairs)
            values[sin_row, 2 * chosen] += sharpness * turn.cos()
            values[sin_row, 2 * chosen + 1] += sharpness * turn.sin()
            values[sin_row + 1, 2 * chosen] -= sharpness * turn.sin()
            values[sin_row + 1, 2 * chosen + 1] += sharpness * turn.cos()
        return values

    def _heads(self, name: str) -> tuple[int | None, float, float, list[float]]:
        """Of the attention of a projection: heads (None: it has no places), sharpness, noise, distances in positions."""
        spacing = self.spacing
        if name.startswith("decoder."):
            if self.num_query_channels is None:
                return None, 0.0, 0.0, []
            heads = self.num_decoder_heads
            share = self.num_channels / self.num_query_channels  # of the channels, those not zero
            distances = [(h - (heads - 1) / 2) * spacing / heads for h in range(heads)]
            return heads, _SHARPNESS["decoder"] * share**0.25, 0.0, distances
        if "self_attention" in name:
            heads = self.num_latent_heads
            return heads, _SHARPNESS["within"], _NOISE, [(h - heads // 2) * spacing for h in range(heads)]
        heads = self.num_encoder_heads
        step = max(1.0, 2 * spacing / heads)
        share = self.num_channels / self.num_latent_channels
        distances = [(h - (heads - 1) / 2) * step for h in range(heads)]
        return heads, _SHARPNESS["encoder"] * share**0.25, 0.0, distances
