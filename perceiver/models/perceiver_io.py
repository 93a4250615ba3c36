"""Perceiver IO (arXiv 2107.14795) and, with repeated cross-attention, the first Perceiver (arXiv 2103.03206).

Shapes: B batch, N input positions, L latents, D latent channels, Q output queries, M queries asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver.config import ModelConfig, UserError
from perceiver.models import factored_attention
from perceiver.models.attention import CrossAttentionLayer, SelfAttentionLayer
from perceiver.models.checks import check_heads, check_sizes
from perceiver.models.encoder_decoder import DecoderConfig, EncoderConfig
from perceiver.models.factored_attention import FactoredInput
from perceiver.models.initialize import initialize, initialized
from perceiver.models.inputs import InputConfig, TextInput
from perceiver.models.local_init import LocalInit
from perceiver.models.outputs import OutputConfig, OutputQueries, PartedQueries, TextOutput
from perceiver.models.shapes import AttentionChannels
from perceiver.models.tensor_shapes import check_tensor


class PerceiverIOConfig(ModelConfig):
    """Perceiver and Perceiver IO models."""

    encoder_fields: ClassVar[tuple[str, ...]] = ("input.", "encoder.", "num_latents", "num_latent_channels")

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
        return PerceiverIO(self)

    def text_limits(self) -> tuple[int, int] | None:
        return self.input.text_limits()

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


def reset_parts(module: nn.Module) -> None:
    """Computes the constants of all parts of a module that have some."""
    for part in module.modules():
        if not isinstance(part, (PerceiverEncoder, PerceiverIO)) and hasattr(part, "reset_buffers"):
            part.reset_buffers()


class PerceiverEncoder(nn.Module):
    """Input to latents, also by itself: block i is self-attention, preceded by cross-attention to the input in the first few blocks.

    `PerceiverEncoder(config, seed=0)` has the initial weights of the encoder of `PerceiverIO(config, seed)`.
    `cross_attention_n` and `self_attention_n` are the second set of weights, which all later layers or blocks share;
    None where there is none because the first set serves them too, or because there is no later one.
    """

    @initialized
    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.num_blocks = encoder.num_self_attention_blocks
        self.num_cross_attention_layers = encoder.num_cross_attention_layers
        self.input_adapter = config.input.build()
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.num_latent_channels))

        cross, within = config.encoder_cross_attention(), config.encoder_self_attention()

        def cross_attention_layer() -> CrossAttentionLayer:
            return CrossAttentionLayer(
                cross,
                num_heads=encoder.num_cross_attention_heads,
                widening_factor=encoder.cross_attention_widening_factor,
                dropout=encoder.dropout,
            )

        def self_attention_block() -> nn.ModuleList:
            return nn.ModuleList(
                SelfAttentionLayer(
                    within,
                    num_heads=encoder.num_self_attention_heads,
                    widening_factor=encoder.self_attention_widening_factor,
                    dropout=encoder.dropout,
                )
                for _ in range(encoder.num_self_attention_layers_per_block)
            )

        second_cross = self.num_cross_attention_layers > 1 and not encoder.first_cross_attention_layer_shared
        second_block = self.num_blocks > 1 and not encoder.first_self_attention_block_shared
        self.cross_attention_1 = cross_attention_layer()
        self.self_attention_1 = self_attention_block()
        self.cross_attention_n = cross_attention_layer() if second_cross else None
        self.self_attention_n = self_attention_block() if second_block else None

        # Text has one embedding per position and example: nothing is shared by the batch that could be factored out.
        # Queries that are made from the adapted input need it as a whole.
        self.factored = config.input.factorable and not config.output.asks_input(config)
        self.num_query_heads, self.cross_channels = config.num_latents * encoder.num_cross_attention_heads, cross

    def layers(self) -> Iterator[nn.Module]:
        yield self.cross_attention_1
        yield from self.self_attention_1
        if self.cross_attention_n is not None:
            yield self.cross_attention_n
        if self.self_attention_n is not None:
            yield from self.self_attention_n

    def init_weights(self, seed: int) -> None:
        """Draws all parameters and computes all buffers, as in the whole model."""
        self.reset_buffers()
        _initialize(self, self.config, seed, prefix="encoder")

    def reset_buffers(self) -> None:
        """Computes the constants that are not in checkpoints anew, in place (after `to_empty`)."""
        reset_parts(self)

    def adapt(self, x: Any, pad_mask: Tensor | None = None) -> tuple[Tensor | FactoredInput, Tensor | None]:
        """The input as keys and values are made from it, and its mask of padding: the given one, or the adapter's own.

        Raises:
            UserError: a tensor of another shape than the input's (`InputConfig.batch_shape`).
        """
        self.config.input.check_batch(x)
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.to(self.latents.dtype)
        element_size = self.latents.element_size()
        if self.factored and factored_attention.is_cheaper(self.num_query_heads, self.cross_channels, element_size):
            norm = self.cross_attention_1.kv_norm
            points = self.input_adapter.points(x).to(self.latents.dtype)
            return FactoredInput.of(points, self.input_adapter.position_encoding, norm.eps), pad_mask
        adapted = self.input_adapter(x)
        return adapted if isinstance(adapted, tuple) else (adapted.to(self.latents.dtype), pad_mask)

    def forward(self, adapted: Tensor | FactoredInput, pad_mask: Tensor | None = None) -> Tensor:
        """adapted input of N positions, pad_mask (B, N), True = padding -> latents (B, L, D).

        A row that is padding throughout attends to all of it: finite, and nothing that should be used.

        Raises:
            UserError: a tensor of another shape.
        """
        if isinstance(adapted, Tensor):
            check_tensor(adapted, ("B", "N", self.cross_channels.kv_channels), "the encoder takes")
        if pad_mask is not None:
            positions = adapted if isinstance(adapted, Tensor) else adapted.pixels
            check_tensor(pad_mask, tuple(positions.shape[:2]), "pad_mask of this input must be")
        mask = None
        if pad_mask is not None:
            mask = (~pad_mask | pad_mask.all(dim=1, keepdim=True))[:, None, None]
        x = self.latents[None]  # one for the whole batch until the first attention to the input
        for number in range(self.num_blocks):
            if number < self.num_cross_attention_layers:
                layer = self.cross_attention_1
                if number > 0 and self.cross_attention_n is not None:
                    layer = self.cross_attention_n
                x = layer(x, adapted, mask=mask)
            block = self.self_attention_1
            if number > 0 and self.self_attention_n is not None:
                block = self.self_attention_n
            for layer in block:
                x = layer(x)
        return x


class PerceiverDecoder(nn.Module):
    """Latents to output: cross-attention of output queries to the latents, and a linear map.

    `PerceiverDecoder(config, seed=0)` has the initial weights of the decoder of `PerceiverIO(config, seed)`.

    Attributes:
        queries: learned queries (Q, channels), or the module that makes them of the batch; None where the adapted input is the query.
        output: map of decoded queries to outputs; None where the token embedding is the output matrix (tied text).
        output_bias: bias per token of the tied output.
    """

    @initialized
    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.config = config
        decoder, queries = config.decoder, config.output_queries()
        learned, num_outputs = queries.num_learned, queries.num_outputs
        self.queries = config.output.build_queries(config)
        if learned:
            self.queries = nn.Parameter(torch.empty(learned, queries.num_channels))
        self.cross_attention = CrossAttentionLayer(
            config.decoder_cross_attention(),
            num_heads=decoder.num_cross_attention_heads,
            widening_factor=decoder.cross_attention_widening_factor,
            dropout=decoder.dropout,
            attention_residual=decoder.cross_attention_residual,
        )
        self.output = None
        if not queries.tied:
            self.output = config.output.build_head(config) or nn.Linear(queries.num_channels, num_outputs)
        self.output_bias = nn.Parameter(torch.empty(num_outputs)) if queries.tied else None

    def init_weights(self, seed: int) -> None:
        """Draws all parameters, as in the whole model."""
        _initialize(self, self.config, seed, prefix="decoder")

    def forward(self, queries: Tensor | PartedQueries, latents: Tensor, tied_matrix: Tensor | None = None, x: Any = None) -> Tensor:
        """queries (B or 1, M, channels), latents (B, L, D) -> (B, M, outputs); tied_matrix (outputs, channels); x: the model's input."""
        size = self.config.decoder.query_chunk
        if size is None or queries.shape[1] <= size:
            return self._finish(self._decode(queries, latents, tied_matrix), x)
        parts = []
        for part in queries.split(size, dim=1):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._decode, part, latents, tied_matrix, use_reentrant=False))
            else:
                parts.append(self._decode(part, latents, tied_matrix))
        return self._finish(torch.cat(parts, dim=1), x)

    def _decode(self, queries: Tensor | Callable[[], Tensor], latents: Tensor, tied_matrix: Tensor | None) -> Tensor:
        """All that is done to each query by itself."""
        x = self.cross_attention(queries() if callable(queries) else queries, latents)
        if self.output is None:
            return F.linear(x, tied_matrix, self.output_bias)
        return self.output(x) if self.config.output.head_per_query else x

    def _finish(self, decoded: Tensor, x: Any) -> Any:
        """What is done to all queries together."""
        if self.output is None or self.config.output.head_per_query:
            return decoded
        return self.output(decoded, x) if self.config.output.head_takes_input else self.output(decoded)


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
        _initialize(self, self.config, seed)

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


def _initialize(module: nn.Module, config: PerceiverIOConfig, seed: int, prefix: str = "") -> None:
    """Draws the parameters of a model, or of its part called `prefix`."""
    if config.init == "local":
        initialize(module, config.init_scale, seed, config.local_init(), prefix=prefix)
    else:
        initialize(module, config.init_scale, seed, prefix=prefix)
