"""Configurations of the models, their inputs and their outputs. An input or an output of your own is a subclass, in a file of yours.

Shapes: B batch, N input positions, C channels of an input position, M output queries, Q channels of a query.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from perceiver.config.core import Config, UserError, spelled
from perceiver.config.sections import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


class InputConfig(Config):
    """What goes into a Perceiver IO: base class of all inputs."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The adapter: takes what the task's batch holds as the model's input, returns (B, N, C), or that and a mask (B, N) of padding.

        Where it has constants (buffers that are not saved), its method `reset_buffers()` computes them in place.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that returns the input adapter")

    @abstractmethod
    def adapted_channels(self) -> int:
        """C, the channels of what the adapter returns."""
        raise NotImplementedError(f"{type(self).__name__} needs a method adapted_channels() that returns a number")

    @abstractmethod
    def num_positions(self) -> int:
        """N at most."""
        raise NotImplementedError(f"{type(self).__name__} needs a method num_positions() that returns a number")

    def qk_channels(self, num_latent_channels: int) -> int:
        """Query and key channels of the encoder's cross-attention where its configuration has None."""
        return self.adapted_channels()

    def text_limits(self) -> tuple[int, int] | None:
        """Of text: the longest input in tokens and the number of ids; None for anything else."""
        return None

    def adapting_flops(self, num_positions: int) -> float:
        """FLOPs of the adapter's own products for one example of so many positions."""
        return 0.0

    @property
    def factorable(self) -> bool:
        """Whether positions are few channels over a fixed grid, so that attention to them may be factored (exactly, and cheaper): the
        adapter then has `points(x)`, (B, N, few channels), and `position_encoding`, (N, C less those)."""
        return False


@dataclass(frozen=True, kw_only=True)
class OutputQueries:
    """Output queries and what becomes of them."""

    num_learned: int
    """Learned queries; 0: the queries come from elsewhere."""
    num_channels: int
    """Q, channels of the queries."""
    num_outputs: int
    """Channels of the output: classes, vocabulary, ..."""
    tied: bool = False
    """Whether the output matrix is the token embedding."""


class OutputConfig(Config):
    """What comes out of a Perceiver IO: base class of all outputs."""

    @abstractmethod
    def queries(self, model: PerceiverIOConfig) -> OutputQueries:
        """Number and channels of the queries, and channels of the output."""
        raise NotImplementedError(f"{type(self).__name__} needs a method queries(model) that returns OutputQueries")

    def build_queries(self, model: PerceiverIOConfig) -> nn.Module | None:
        """A module that makes queries of the batch: takes what the model's input takes and the adapted input (B, N, C), returns
        (B, M, Q). None: `ask` does without."""
        return None

    def build_head(self, model: PerceiverIOConfig) -> nn.Module | None:
        """A module from decoded queries (B, M, Q) to outputs (B, M, outputs); None: a linear map with bias."""
        return None

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        """The queries (B or 1, M, Q).

        Args:
            learned: the learned queries (num_learned, Q), or the module of `build_queries`.
            x: the model's input as the batch has it.
            adapted: the adapted input (B, N, C).
            positions: numbers of the queries to decode (B, M); None: all.
        """
        if callable(learned):
            return learned(x, adapted)
        return learned[None] if positions is None else learned[positions]

    def answer(self, decoded: Tensor, model: PerceiverIOConfig) -> Tensor:
        """The model's output, of (B, M, outputs)."""
        return decoded

    def check_model(self, model: PerceiverIOConfig) -> None:
        """Checks that the output can be that of the model.

        Raises:
            UserError: it needs another input, say.
        """


class TextInput(InputConfig):
    """Token ids: learned token embedding + learned position embedding."""

    vocab_size: int = 262
    """Number of token ids (262: UTF-8 bytes and 6 special tokens)."""
    max_seq_len: int = 2048
    """Longest input in tokens."""
    num_channels: int = 768
    """Channels of the embeddings."""

    def build(self) -> nn.Module:
        from perceiver.models.adapters import TextAdapter

        return TextAdapter(self.vocab_size, self.max_seq_len, self.num_channels)

    def adapted_channels(self) -> int:
        return self.num_channels

    def num_positions(self) -> int:
        return self.max_seq_len

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def text_limits(self) -> tuple[int, int]:
        return self.max_seq_len, self.vocab_size


class ImageInput(InputConfig):
    """Every pixel attended, channels last, with Fourier position features."""

    image_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width, channels."""
    num_frequency_bands: int = 32
    """Fourier bands per axis."""

    def build(self) -> nn.Module:
        from perceiver.models.adapters import ImageAdapter

        return ImageAdapter(self)

    def adapted_channels(self) -> int:
        *axes, num_pixel_channels = self.image_shape
        return num_pixel_channels + len(axes) * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        height, width, _ = self.image_shape
        return height * width

    @property
    def factorable(self) -> bool:
        return True

    def check(self, where: str) -> None:
        _check_shape(self.image_shape, where)


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

    def build(self) -> nn.Module:
        from perceiver.models.adapters import FlowAdapter

        return FlowAdapter(self)

    def adapted_channels(self) -> int:
        return self.num_patch_hidden_channels + len(self.image_shape) * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        height, width = self.image_shape
        return height * width

    def adapting_flops(self, num_positions: int) -> float:
        return 2.0 * num_positions * 2 * self.num_patch_input_channels * self.num_patch_hidden_channels

    def check(self, where: str) -> None:
        _check_shape(self.image_shape, where)


def _check_shape(image_shape: tuple[int, ...], where: str) -> None:
    if min(image_shape) < 1:
        raise UserError(f"{spelled(where)}image-shape is {tuple(image_shape)}, but all its sizes must be at least 1")


class TextOutput(OutputConfig):
    """One learned query per position; logits over the vocabulary."""

    num_query_channels: int | None = None
    """Channels of the queries; None: as the token embedding, whose matrix is then also the output matrix (tied)."""

    def queries(self, model: PerceiverIOConfig) -> OutputQueries:
        text = model.input
        assert isinstance(text, TextInput)
        return OutputQueries(
            num_learned=text.max_seq_len,
            num_channels=self.num_query_channels or text.num_channels,
            num_outputs=text.vocab_size,
            tied=self.num_query_channels is None,
        )

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        return learned[None, : x.shape[1]] if positions is None else learned[positions]

    def check_model(self, model: PerceiverIOConfig) -> None:
        _needs(self, model, TextInput)


class ClassOutput(OutputConfig):
    """Learned queries and a linear head to classes."""

    num_classes: int = 10
    """Number of classes."""
    num_queries: int = 1
    """Number of learned output queries."""
    num_query_channels: int = 128
    """Channels of the output queries."""

    def queries(self, model: PerceiverIOConfig) -> OutputQueries:
        return OutputQueries(num_learned=self.num_queries, num_channels=self.num_query_channels, num_outputs=self.num_classes)

    def answer(self, decoded: Tensor, model: PerceiverIOConfig) -> Tensor:
        """Logits (B, classes), or (B, queries, classes) if there are several queries."""
        # A copy, not a view: FSDP hangs its hook for the backward pass on what the model returns.
        return decoded.squeeze(1).clone() if decoded.shape[1] == 1 else decoded


class FlowOutput(OutputConfig):
    """The adapted input itself as queries; two flow channels per pixel."""

    rescale_factor: float = 100.0
    """The output is divided by this number."""

    def queries(self, model: PerceiverIOConfig) -> OutputQueries:
        return OutputQueries(num_learned=0, num_channels=model.input.adapted_channels(), num_outputs=2)

    def ask(self, learned: Any, x: Any, adapted: Any, positions: Tensor | None) -> Tensor:
        return adapted

    def answer(self, decoded: Tensor, model: PerceiverIOConfig) -> Tensor:
        """Flow in pixels, (B, height, width, 2)."""
        assert isinstance(model.input, FlowInput)
        return (decoded / self.rescale_factor).unflatten(1, model.input.image_shape)

    def check_model(self, model: PerceiverIOConfig) -> None:
        _needs(self, model, FlowInput)


def _needs(output: OutputConfig, model: PerceiverIOConfig, needed: type[InputConfig]) -> None:
    if not isinstance(model.input, needed):
        raise UserError(
            f"model.output is {type(output).__name__}, which needs model.input to be {needed.__name__}, not {type(model.input).__name__}"
        )


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

    def build(self) -> nn.Module:
        from perceiver.models.perceiver_io import PerceiverIO

        return PerceiverIO(self)

    def text_limits(self) -> tuple[int, int] | None:
        return self.input.text_limits()

    def check(self, where: str) -> None:
        from perceiver.models.check import check_io

        check_io(self)


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

    def build(self) -> nn.Module:
        from perceiver.models.perceiver_ar import PerceiverAR

        return PerceiverAR(self)

    def text_limits(self) -> tuple[int, int]:
        return self.max_seq_len, self.vocab_size

    def check(self, where: str) -> None:
        from perceiver.models.check import check_ar

        check_ar(self)
