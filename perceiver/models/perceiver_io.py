"""Perceiver IO (arXiv 2107.14795) and, with repeated cross-attention, the first Perceiver (arXiv 2103.03206).

Shapes: B batch, N input positions, L latents, D latent channels, Q output queries, M queries asked for.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perceiver.config import ModelConfig, UserError
from perceiver.models.checks import check_count, check_heads, check_sizes
from perceiver.models.encoder_decoder import DecoderConfig, EncoderConfig
from perceiver.models.initialize import initialized
from perceiver.models.inputs import InputConfig, TextInput
from perceiver.models.local_init import LocalInit
from perceiver.models.outputs import OutputConfig, OutputQueries, TextOutput
from perceiver.models.perceiver_io_parts import PerceiverDecoder, PerceiverEncoder, initialize_part, reset_parts
from perceiver.models.shapes import AttentionChannels
from perceiver.models.tensor_shapes import Shape


class PerceiverIOConfig(ModelConfig):
    """Perceiver and Perceiver IO models."""

    encoder_fields: ClassVar[tuple[str, ...]] = ("input.", "encoder.", "num_latents", "num_latent_channels")

    num_latents: int = 256
    """Number of latents."""
    num_latent_channels: int = 1280
    """Channels of the latents."""
    input: InputConfig = TextInput()
    """How the input becomes vectors that the latents attend to."""
    encoder: EncoderConfig = EncoderConfig()
    """The encoder: latents attend to the input, then to themselves."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder: output queries attend to the latents."""
    output: OutputConfig = TextOutput()
    """The output: its queries, and the head that makes predictions of them."""
    init_scale: float = 0.02
    """Standard deviation of initial weights."""
    init: Literal["normal", "local"] = "normal"
    """normal: all matrices random, as published. local: the attention of a text model starts at neighbouring positions
    (docs/text-chain.md); without it, a small model does not learn from random weights. init_scale is then that of the embeddings."""

    def build(self) -> nn.Module:
        return PerceiverIO(self)

    def text_limits(self) -> tuple[int, int] | None:
        return self.input.text_limits()

    def num_text_ids(self) -> int | None:
        return self.input.num_text_ids()

    def picture_shape(self) -> tuple[int, int, int] | None:
        return self.input.picture_shape()

    def number_of_classes(self) -> int | None:
        return self.output.number_of_classes()

    def batch_shape(self) -> Shape | None:
        return self.input.batch_shape()

    def encoder_cross_attention(self) -> AttentionChannels:
        """Channels of the latents' attention to the input."""
        return self.encoder.cross_attention(self.input, self.num_latent_channels)

    def encoder_self_attention(self) -> AttentionChannels:
        """Channels of the latents' attention to each other."""
        return self.encoder.self_attention(self.num_latent_channels)

    def decoder_cross_attention(self) -> AttentionChannels:
        """Channels of the output queries' attention to the latents."""
        return self.decoder.cross_attention(self.output_queries().num_channels, self.num_latent_channels)

    def output_queries(self) -> OutputQueries:
        """Number and channels of the output queries, and channels of the output."""
        return self.output.queries(self)

    def local_init(self) -> LocalInit:
        """How `init` local draws weights."""
        assert isinstance(self.input, TextInput)
        queries = self.output_queries()
        return LocalInit(
            text=self.input,
            num_latents=self.num_latents,
            num_latent_channels=self.num_latent_channels,
            num_encoder_heads=self.encoder.num_cross_attention_heads,
            num_latent_heads=self.encoder.num_self_attention_heads,
            num_decoder_heads=self.decoder.num_cross_attention_heads,
            num_layers_per_block=self.encoder.num_self_attention_layers_per_block,
            num_query_channels=queries.num_channels if queries.per_position else None,
            init_scale=self.init_scale,
        )

    def check(self, where: str) -> None:
        check_sizes(self, where)
        self.output.check_model(self)
        check_count(self.input, "adapted_channels", self.input.adapted_channels())
        check_count(self.input, "num_positions", self.input.num_positions())
        queries = self.output_queries()
        if not isinstance(queries, OutputQueries):
            raise UserError(f"{type(self.output).__name__}.queries returned {queries!r:.80} and must return perceiver.models.OutputQueries")
        check_count(self.output, "queries(model).num_channels", queries.num_channels)
        check_count(self.output, "queries(model).num_outputs", queries.num_outputs)
        check_count(self.output, "queries(model).num_learned", queries.num_learned)
        for field, heads, channels in self._attention_layers():
            check_heads(heads, channels.qk_channels, f"model.{field}-heads", f"model.{field}-qk-channels")
            check_heads(heads, channels.v_channels, f"model.{field}-heads", f"model.{field}-v-channels")
        if self.init == "local":
            self._check_local_init()

    def _attention_layers(self) -> list[tuple[str, int, AttentionChannels]]:
        """Fields, heads and channels of the three kinds of layers."""
        return [
            ("encoder.num-cross-attention", self.encoder.num_cross_attention_heads, self.encoder_cross_attention()),
            ("encoder.num-self-attention", self.encoder.num_self_attention_heads, self.encoder_self_attention()),
            ("decoder.num-cross-attention", self.decoder.num_cross_attention_heads, self.decoder_cross_attention()),
        ]

    def _check_local_init(self) -> None:
        if not isinstance(self.input, TextInput):
            raise UserError("model.init is local, which needs model.input to be TextInput")
        channels, needed = self.input.num_channels, self.input.num_channels // 2
        if channels % 4:
            raise UserError(f"model.input.num-channels is {channels} and must be a multiple of 4 for model.init local")
        places = {"model.num-latent-channels": self.num_latent_channels}
        if (queries := self.output_queries()).per_position:
            places["model.output.num-query-channels"] = queries.num_channels
        for name, number in places.items():
            if number < needed:
                raise UserError(f"{name} is {number} and must be at least {needed} for model.init local")
        for name, heads, layer in self._attention_layers():
            if layer.qk_channels < 2 * heads:
                raise UserError(
                    f"model.{name}-qk-channels is {layer.qk_channels} and must be at least {2 * heads} for model.init local: "
                    f"2 for each of {heads} heads"
                )


class PerceiverIO(nn.Module):
    """Perceiver IO for text, images and optical flow: `PerceiverIO(config, seed=0)`.

    It is built on the default device, with initial weights (none on "meta").
    For anything but `forward` under FSDP (`encode`), see `torch.distributed.fsdp.register_fsdp_forward_method`.
    """

    @initialized
    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PerceiverEncoder(config)
        self.decoder = PerceiverDecoder(config)
        if config.encoder.freeze:
            self.encoder.requires_grad_(False)

    def layers(self) -> list[nn.Module]:
        """Layers to shard, recompute and compile one by one; each once, also where its weights serve several times."""
        return [*self.encoder.layers(), self.decoder.cross_attention]

    def init_weights(self, seed: int) -> None:
        """Draws all parameters and computes all buffers; see `initialize` and, for `init` local, `LocalInit`."""
        self.reset_buffers()
        initialize_part(self, self.config, seed)

    def reset_buffers(self) -> None:
        """Computes the constants that are not in checkpoints anew, in place (after `to_empty`)."""
        reset_parts(self)

    def encode(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """The latents (B, L, D) of an input as in `forward`."""
        with self._encoder_gradients():
            return self.encoder(*self.encoder.adapt(x, pad_mask))

    def forward(self, x: Any, pad_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The model's output.

        Args:
            x: what the input's adapter takes: token ids (B, N); images (B, height, width, channels); pairs of frames (B, 2, features,
                height, width); anything else for inputs of your own.
            pad_mask: (B, N), True = padding.
            positions: for learned queries: only decode these (B, M).

        Returns:
            Text: logits (B, N or M, vocabulary). Classes: logits (B, classes), or (B, queries, classes) if there are
            several queries. Flow: (B, height, width, 2). Else what the output's head returns.
        """
        with self._encoder_gradients():
            adapted, pad_mask = self.encoder.adapt(x, pad_mask)
            latents = self.encoder(adapted, pad_mask)
        output = self.config.output
        decoded = self.decoder(output.ask_in_parts(self.decoder.queries, x, adapted, positions), latents, self._tied_matrix(), x)
        return output.answer(decoded, self.config)

    def _tied_matrix(self) -> Tensor | None:
        return self.encoder.input_adapter.txt_embedding.weight if self.decoder.output is None else None

    def _encoder_gradients(self) -> torch.set_grad_enabled:
        """A frozen encoder runs as in evaluation: no activation is kept for a backward pass that would change nothing."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.encoder.freeze)
