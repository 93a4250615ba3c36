"""Configurations of the models."""

from typing import Literal

from perceiver.config.core import Config
from perceiver.config.sections import InputConfig, ModelConfig, OutputConfig


class TextInput(InputConfig):
    """Token ids: learned token embedding + learned position embedding."""

    vocab_size: int = 262
    """Number of token ids (262: UTF-8 bytes and 6 special tokens)."""
    max_seq_len: int = 2048
    """Longest input in tokens."""
    num_channels: int = 768
    """Channels of the embeddings."""


class ImageInput(InputConfig):
    """Every pixel attended, channels last, with Fourier position features."""

    image_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width, channels."""
    num_frequency_bands: int = 32
    """Fourier bands per axis."""


class FlowInput(InputConfig):
    """Two frames as 3 x 3 patch features per pixel, projected, with Fourier position features."""

    image_shape: tuple[int, int] = (368, 496)
    """Height and width of one patch."""
    num_patch_input_channels: int = 27
    """Channels of one frame's patch features (3 x 3 x 3)."""
    num_patch_hidden_channels: int = 64
    """Channels after the input projection of both frames."""
    num_frequency_bands: int = 64
    """Fourier bands per axis."""


class TextOutput(OutputConfig):
    """One learned query per position; logits over the vocabulary."""

    num_query_channels: int | None = None
    """Channels of the queries; None: as the token embedding, whose matrix is then also the output matrix (tied)."""


class ClassOutput(OutputConfig):
    """Learned queries and a linear head to classes."""

    num_classes: int = 10
    """Number of classes."""
    num_queries: int = 1
    """Number of learned output queries."""
    num_query_channels: int = 128
    """Channels of the output queries."""


class FlowOutput(OutputConfig):
    """The adapted input itself as queries; two flow channels per pixel."""

    rescale_factor: float = 100.0
    """The output is divided by this number."""


class EncoderConfig(Config):
    """Perceiver IO encoder: cross-attention of latents to the input, then self-attention blocks (arXiv 2107.14795)."""

    num_cross_attention_heads: int = 8
    """Heads of the cross-attention."""
    num_cross_attention_qk_channels: int | None = None
    """Query and key channels; None: the latents' for text, the input's for images and flow."""
    num_cross_attention_v_channels: int | None = None
    """Value channels; None: as query and key."""
    num_cross_attention_layers: int = 1
    """The first so many blocks are each preceded by a cross-attention (more than 1: the first Perceiver)."""
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


class PerceiverIOConfig(ModelConfig):
    """Perceiver and Perceiver IO models."""

    num_latents: int = 256
    """Number of latents."""
    num_latent_channels: int = 1280
    """Channels of the latents."""
    input: InputConfig = TextInput()
    """What goes in."""
    encoder: EncoderConfig = EncoderConfig()
    """Input to latents."""
    decoder: DecoderConfig = DecoderConfig()
    """Latents to output."""
    output: OutputConfig = TextOutput()
    """What comes out."""
    init_scale: float = 0.02
    """Standard deviation of initial weights."""
    init: Literal["normal", "local"] = "normal"
    """normal: all matrices random, as published. local: a text model's attention starts at neighbouring positions, without which
    a small one does not learn from random weights (docs/text-chain.md); init_scale is then that of the embeddings."""


class PerceiverARConfig(ModelConfig):
    """Perceiver AR (arXiv 2202.07765): causal; the last positions are latents, all before them is prefix."""

    vocab_size: int = 262
    """Number of token ids."""
    max_seq_len: int = 4096
    """Longest input in tokens, prefix and latents together."""
    max_latents: int = 512
    """Positions at the end of the input that are latents and predict; the prefix holds at most the rest."""
    num_channels: int = 512
    """Channels of all layers."""
    num_heads: int = 8
    """Heads of all attention layers."""
    num_self_attention_layers: int = 8
    """Causal self-attention layers on the latents."""
    num_self_attention_rotary_layers: int = 1
    """Rotary embedding in so many of the first self-attention layers; -1: in all."""
    self_attention_widening_factor: int = 4
    """Hidden channels of the self-attention's MLPs as a multiple of num_channels."""
    cross_attention_widening_factor: int = 4
    """Hidden channels of the cross-attention's MLP as a multiple of num_channels."""
    cross_attention_dropout: float = 0.5
    """Share of prefix positions left out in training (prefix dropout)."""
    post_attention_dropout: float = 0.0
    """Dropout on attention weights."""
    residual_dropout: float = 0.0
    """Dropout on layer outputs before they are added."""
    abs_pos_emb: bool = True
    """Learned position embedding; rotary embedding then covers half of each head's channels, otherwise all."""
    output_norm: bool = False
    """LayerNorm before the output matrix."""
    output_bias: bool = True
    """Bias per token at the output (the output matrix is the token embedding)."""
    init_scale: float = 0.02
    """Standard deviation of initial weights."""
