"""Configurations of a Perceiver IO's encoder and decoder, and the channels of their attention layers."""

from perceiver.config import Config, UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.inputs import InputConfig
from perceiver.models.shapes import AttentionChannels, attention_channels


class EncoderConfig(Config):
    """Perceiver IO encoder: cross-attention of latents to the input, then self-attention blocks (arXiv 2107.14795)."""

    num_cross_attention_heads: int = 8
    """Heads of the cross-attention."""
    num_cross_attention_qk_channels: int | None = None
    """Query and key channels; None: the latents' for text, the input's for images and flow."""
    num_cross_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    num_cross_attention_layers: int = 1
    """Number of blocks, from the first, that start with a cross-attention (more than 1: the first Perceiver)."""
    first_cross_attention_layer_shared: bool = False
    """Whether later cross-attention layers use the first one's weights (otherwise layers 2, 3, ... share a second set)."""
    cross_attention_widening_factor: int = 1
    """Hidden channels of the cross-attention's MLP as a multiple of its channels."""
    num_self_attention_heads: int = 8
    """Heads of the self-attention."""
    num_self_attention_qk_channels: int | None = None
    """Query and key channels; None: the latents'."""
    num_self_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    num_self_attention_layers_per_block: int = 8
    """Layers of one self-attention block."""
    num_self_attention_blocks: int = 1
    """Number of blocks; blocks 2, 3, ... share one set of weights."""
    first_self_attention_block_shared: bool = True
    """Whether that set is also the first block's."""
    self_attention_widening_factor: int = 1
    """Hidden channels of the self-attention's MLPs as a multiple of their channels."""
    dropout: float = 0.0
    """Dropout on attention weights."""
    freeze: bool = False
    """Whether the encoder's parameters stay as they are during training."""

    def cross_attention(self, input: InputConfig, num_latent_channels: int) -> AttentionChannels:
        """Channels of the latents' attention to the input."""
        qk_channels = self.num_cross_attention_qk_channels or input.qk_channels(num_latent_channels)
        return attention_channels(num_latent_channels, input.adapted_channels(), qk_channels, self.num_cross_attention_v_channels)

    def self_attention(self, num_latent_channels: int) -> AttentionChannels:
        """Channels of the latents' attention to each other."""
        qk_channels = self.num_self_attention_qk_channels or num_latent_channels
        return attention_channels(num_latent_channels, num_latent_channels, qk_channels, self.num_self_attention_v_channels)

    def check(self, where: str) -> None:
        check_sizes(self, where)
        if self.num_cross_attention_layers > self.num_self_attention_blocks:
            raise UserError(
                f"{spelled(where)}num-cross-attention-layers is {self.num_cross_attention_layers}, but each precedes a "
                f"self-attention block: at most {spelled(where)}num-self-attention-blocks, {self.num_self_attention_blocks}"
            )


class DecoderConfig(Config):
    """Perceiver IO decoder: one cross-attention of output queries to the latents."""

    num_cross_attention_heads: int = 8
    """Heads."""
    num_cross_attention_qk_channels: int | None = None
    """Query and key channels; None: the queries'."""
    num_cross_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    cross_attention_widening_factor: int = 1
    """Hidden channels of the MLP as a multiple of its channels."""
    cross_attention_residual: bool = True
    """Whether the queries are added to the attention's output."""
    dropout: float = 0.0
    """Dropout on attention weights."""
    query_chunk: int | None = None
    """Queries decoded at once, so that memory does not grow with their number (training computes each part twice); None: all."""

    @property
    def has_cost_formulas(self) -> bool:
        """Whether the closed formulas for memory hold."""
        return self.query_chunk is None

    def cross_attention(self, num_query_channels: int, num_latent_channels: int) -> AttentionChannels:
        """Channels of the queries' attention to the latents."""
        qk_channels = self.num_cross_attention_qk_channels or num_query_channels
        return attention_channels(num_query_channels, num_latent_channels, qk_channels, self.num_cross_attention_v_channels)

    def check(self, where: str) -> None:
        check_sizes(self, where)
