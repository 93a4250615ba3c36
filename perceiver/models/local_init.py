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

import torch
from torch import Tensor

from perceiver.config import UserError
from perceiver.models import shapes
from perceiver.models.configs import PerceiverIOConfig, TextInput, TextOutput

_SHARPNESS = {"encoder": 2.5, "within": 2.0, "decoder": 3.0}
"""How narrowly heads look at the start: the scale of query and key projections of the input, latents and output."""
_NOISE = 0.3
"""Random part of the latents' own query and key projections, of the usual 1 / sqrt(inputs)."""


def check_local_init(config: PerceiverIOConfig) -> None:
    """Checks that a model can start so.

    Raises:
        UserError: it reads no text, or has too few channels for places; names the field, its value, and what would be right.
    """
    if not isinstance(config.input, TextInput):
        raise UserError("model.init is local, which needs model.input to be TextInput")
    channels, needed = config.input.num_channels, config.input.num_channels // 2
    if channels % 4:
        raise UserError(f"model.input.num-channels is {channels} and must be a multiple of 4 for model.init local")
    places = {"model.num-latent-channels": config.num_latent_channels}
    if isinstance(config.output, TextOutput):
        places["model.output.num-query-channels"] = shapes.output_queries(config).num_channels
    for name, number in places.items():
        if number < needed:
            raise UserError(f"{name} is {number} and must be at least {needed} for model.init local")
    for name, layer, heads in (
        ("encoder.num-cross-attention", shapes.encoder_cross_attention(config), config.encoder.num_cross_attention_heads),
        ("encoder.num-self-attention", shapes.encoder_self_attention(config), config.encoder.num_self_attention_heads),
        ("decoder.num-cross-attention", shapes.decoder_cross_attention(config), config.decoder.num_cross_attention_heads),
    ):
        if layer.qk_channels < 2 * heads:
            raise UserError(
                f"model.{name}-qk-channels is {layer.qk_channels} and must be at least {2 * heads} for model.init local: "
                f"2 for each of {heads} heads"
            )


class LocalInit:
    """Turns the normal initial weights of a text model into local ones, one parameter at a time (see `initialize`)."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        assert isinstance(config.input, TextInput)
        self.config, self.num_positions = config, config.input.max_seq_len
        self.num_channels = config.input.num_channels // 2
        self.spacing = self.num_positions / config.num_latents
        exponents = torch.arange(self.num_channels // 2) / (self.num_channels // 2)
        self.frequencies = math.pi * float(self.num_positions) ** -exponents  # half a turn a position, down to one a text
        self.text_output = isinstance(config.output, TextOutput)

    def __call__(self, name: str, normal: Tensor) -> Tensor:
        """The initial value of the parameter `name`; `normal` is drawn from N(0, init_scale^2) and is all that is random."""
        num_channels = self.num_channels
        if name.endswith("txt_embedding.weight"):
            normal[:, :num_channels] = 0.0
            return normal
        if name.endswith("pos_embedding.weight"):
            return self._places(torch.arange(self.num_positions), normal) * self.config.init_scale
        if name == "encoder.latents":
            return self._places((torch.arange(self.config.num_latents) + 0.5) * self.spacing - 0.5, normal)
        if name == "decoder.queries":
            return self._places(torch.arange(self.num_positions), normal) if self.text_output else normal
        values = normal / self.config.init_scale * normal.shape[1] ** -0.5
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return self._looking(name, values)
        if name.startswith("encoder.") and name.endswith(("o_proj.weight", "narrow.weight")):
            values[:num_channels] = 0.0  # places stay readable in all layers
            if "self_attention" in name:
                values *= (2 * self.config.encoder.num_self_attention_layers_per_block) ** -0.5
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
        encoder, decoder, spacing = self.config.encoder, self.config.decoder, self.spacing
        if name.startswith("decoder."):
            heads = decoder.num_cross_attention_heads
            share = self.num_channels / shapes.output_queries(self.config).num_channels  # of the channels, those not zero
            distances = [(h - (heads - 1) / 2) * spacing / heads for h in range(heads)]
            return (heads if self.text_output else None), _SHARPNESS["decoder"] * share**0.25, 0.0, distances
        if "self_attention" in name:
            heads = encoder.num_self_attention_heads
            return heads, _SHARPNESS["within"], _NOISE, [(h - heads // 2) * spacing for h in range(heads)]
        heads = encoder.num_cross_attention_heads
        step = max(1.0, 2 * spacing / heads)
        share = self.num_channels / self.config.num_latent_channels
        distances = [(h - (heads - 1) / 2) * step for h in range(heads)]
        return heads, _SHARPNESS["encoder"] * share**0.25, 0.0, distances
