"""Encoder and decoder of Perceiver IO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver.config import UserError
from perceiver.models import factored_attention
from perceiver.models.attention import CrossAttentionLayer, SelfAttentionLayer
from perceiver.models.factored_attention import FactoredInput
from perceiver.models.initialize import initialize, initialized
from perceiver.models.outputs import PartedQueries
from perceiver.models.tensor_shapes import check_tensor

if TYPE_CHECKING:
    from perceiver.models.perceiver_io import PerceiverIOConfig


def reset_parts(module: nn.Module) -> None:
    """Computes the constants of all parts of a module that have some."""
    for part in module.modules():
        if part is not module and not isinstance(part, PerceiverEncoder) and hasattr(part, "reset_buffers"):
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
        if not isinstance(self.input_adapter, nn.Module):
            part = type(config.input).__name__
            raise UserError(f"{part}.build returned {self.input_adapter!r:.80} and must return a torch.nn.Module, the input adapter")
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
        initialize_part(self, self.config, seed, prefix="encoder")

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
        initialize_part(self, self.config, seed, prefix="decoder")

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


def initialize_part(module: nn.Module, config: PerceiverIOConfig, seed: int, prefix: str = "") -> None:
    """Draws the parameters of a model, or of its part called `prefix`."""
    if config.init == "local":
        initialize(module, config.init_scale, seed, config.local_init(), prefix=prefix)
    else:
        initialize(module, config.init_scale, seed, prefix=prefix)
