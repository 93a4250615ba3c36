"""A Perceiver as a part of another model: any number of vectors in, a fixed number of vectors out. A plain `torch.nn.Module`.

Shapes: B batch, N input positions, C channels of an input position, L latents, D channels of a latent.
"""

from __future__ import annotations

from torch import Tensor, nn

from perceiver.models.array_input import ArrayInput
from perceiver.models.array_outputs import EmbeddingOutput
from perceiver.models.encoder_decoder import EncoderConfig
from perceiver.models.perceiver_io import PerceiverIOConfig
from perceiver.models.perceiver_io_parts import PerceiverEncoder


class Resampler(nn.Module):
    """Vectors (B, N, C), with a mask if you like, as latents (B, L, D): what an image or audio encoder says, in a few tokens for a
    language model.

    It is built like any module, and its weights are initial: `Resampler(768, num_latents=64, num_channels=1024)`. The order of the input
    has no meaning unless its vectors bear their positions. The work grows with N times L, not with N squared.

    Args:
        input_channels: C.
        num_latents: L.
        num_channels: D.
        num_layers: self-attention layers after each cross-attention.
        num_cross_attention_layers: how often the latents look at the input, each time before self-attention layers of its own.
        num_heads: of all attention layers; divides D.
        dropout: on attention weights.
        seed: of the initial weights.

    Raises:
        UserError: sizes that no model can have.
    """

    def __init__(
        self,
        input_channels: int,
        *,
        num_latents: int = 64,
        num_channels: int = 512,
        num_layers: int = 2,
        num_cross_attention_layers: int = 1,
        num_heads: int = 8,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        encoder = EncoderConfig(
            num_cross_attention_heads=num_heads,
            num_cross_attention_layers=num_cross_attention_layers,
            first_cross_attention_layer_shared=False,
            num_self_attention_heads=num_heads,
            num_self_attention_layers_per_block=num_layers,
            num_self_attention_blocks=num_cross_attention_layers,
            first_self_attention_block_shared=False,
            dropout=dropout,
        )
        config = PerceiverIOConfig(
            num_latents=num_latents,
            num_latent_channels=num_channels,
            input=ArrayInput(num_features=input_channels, num_channels=num_channels, positions="none"),
            encoder=encoder,
            output=EmbeddingOutput(),
        )
        config.check("")
        self.encoder = PerceiverEncoder(config, seed=seed)
        self.norm = nn.LayerNorm(num_channels)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Latents (B, L, D) of x (B, N, C); pad_mask (B, N), True = padding."""
        latents = self.encoder(*self.encoder.adapt(x, pad_mask))
        return self.norm(latents)
