"""Perceiver IO (arXiv 2107.14795) and, with repeated cross-attention, the first Perceiver (arXiv 2103.03206).

Shapes: B batch, N input positions, L latents, D latent channels, Q output queries, M queries asked for.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import ClassOutput, FlowInput, FlowOutput, ImageInput, PerceiverIOConfig, TextInput, TextOutput
from perceiver.models import factored_attention, shapes
from perceiver.models.adapters import FlowAdapter, ImageAdapter, TextAdapter
from perceiver.models.attention import CrossAttentionLayer, SelfAttentionLayer
from perceiver.models.factored_attention import FactoredInput
from perceiver.models.initialize import initialize, initialized
from perceiver.models.local_init import LocalInit


def build_adapter(config: TextInput | ImageInput | FlowInput) -> TextAdapter | ImageAdapter | FlowAdapter:
    """The input adapter of a configuration."""
    match config:
        case TextInput():
            return TextAdapter(config.vocab_size, config.max_seq_len, config.num_channels)
        case ImageInput():
            return ImageAdapter(config)
        case FlowInput():
            return FlowAdapter(config)


class PerceiverEncoder(nn.Module):
    """Input to latents: block i is self-attention, preceded by cross-attention to the input in the first few blocks.

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
        self.input_adapter = build_adapter(config.input)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.num_latent_channels))

        cross, within = shapes.encoder_cross_attention(config), shapes.encoder_self_attention(config)

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
        self.factored = isinstance(config.input, ImageInput)
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
        self.input_adapter.reset_buffers()

    def adapt(self, x: Tensor) -> Tensor | FactoredInput:
        """The input as keys and values are made from it."""
        if x.is_floating_point():
            x = x.to(self.latents.dtype)
        element_size = self.latents.element_size()
        if self.factored and factored_attention.is_cheaper(self.num_query_heads, self.cross_channels, element_size):
            norm = self.cross_attention_1.kv_norm
            return FactoredInput.of(x.flatten(1, 2), self.input_adapter.position_encoding, norm.eps)
        return self.input_adapter(x)

    def forward(self, adapted: Tensor | FactoredInput, pad_mask: Tensor | None = None) -> Tensor:
        """adapted input of N positions, pad_mask (B, N), True = padding -> latents (B, L, D).

        A row that is padding throughout attends to all of it: finite, and nothing that should be used.
        """
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
        queries: learned queries (Q, channels); None where the adapted input is the query (flow).
        output: linear map to logits; None where the token embedding is the output matrix (tied text).
        output_bias: bias per token of the tied output.
    """

    @initialized
    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.config = config
        decoder, queries = config.decoder, shapes.output_queries(config)
        learned, num_outputs = queries.num_learned, queries.num_outputs
        self.queries = nn.Parameter(torch.empty(learned, queries.num_channels)) if learned else None
        self.cross_attention = CrossAttentionLayer(
            shapes.decoder_cross_attention(config),
            num_heads=decoder.num_cross_attention_heads,
            widening_factor=decoder.cross_attention_widening_factor,
            dropout=decoder.dropout,
            attention_residual=decoder.cross_attention_residual,
        )
        self.output = None if queries.tied else nn.Linear(queries.num_channels, num_outputs)
        self.output_bias = nn.Parameter(torch.empty(num_outputs)) if queries.tied else None

    def init_weights(self, seed: int) -> None:
        """Draws all parameters, as in the whole model."""
        _initialize(self, self.config, seed, prefix="decoder")

    def forward(self, queries: Tensor, latents: Tensor, tied_matrix: Tensor | None = None) -> Tensor:
        """queries (B or 1, M, channels), latents (B, L, D) -> (B, M, outputs); tied_matrix (outputs, channels)."""
        x = self.cross_attention(queries, latents)
        return self.output(x) if self.output is not None else F.linear(x, tied_matrix, self.output_bias)


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
        self.encoder.reset_buffers()

    def encode(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """The latents (B, L, D) of an input as in `forward`."""
        with self._encoder_gradients():
            return self.encoder(self.encoder.adapt(x), pad_mask)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The model's output.

        Args:
            x: token ids (B, N); images (B, height, width, channels); pairs of frames (B, 2, features, height, width).
            pad_mask: for text: (B, N), True = padding.
            positions: for text output: only decode these query positions (B, M).

        Returns:
            Text: logits (B, N or M, vocabulary). Classes: logits (B, classes), or (B, queries, classes) if there are
            several queries. Flow: (B, height, width, 2).
        """
        with self._encoder_gradients():
            adapted = self.encoder.adapt(x)
            latents = self.encoder(adapted, pad_mask)
        match self.config.output:
            case TextOutput():
                learned = self.decoder.queries
                queries = learned[None, : x.shape[1]] if positions is None else learned[positions]
                return self.decoder(queries, latents, self.encoder.input_adapter.txt_embedding.weight)
            case ClassOutput():
                logits = self.decoder(self.decoder.queries[None], latents)
                # A copy, not a view: FSDP hangs its hook for the backward pass on what the model returns.
                return logits.squeeze(1).clone() if logits.shape[1] == 1 else logits
            case FlowOutput(rescale_factor=factor):
                flow = self.decoder(adapted, latents) / factor
                return flow.unflatten(1, self.config.input.image_shape)

    def _encoder_gradients(self) -> torch.set_grad_enabled:
        """A frozen encoder runs as in evaluation: no activation is kept for a backward pass that would change nothing."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.encoder.freeze)


def _initialize(module: nn.Module, config: PerceiverIOConfig, seed: int, prefix: str = "") -> None:
    """Draws the parameters of a model, or of its part called `prefix`."""
    if config.init == "local":
        initialize(module, config.init_scale, seed, LocalInit(config), prefix=prefix)
    else:
        initialize(module, config.init_scale, seed, prefix=prefix)
