"""Parameters and FLOPs of a model from its configuration alone.

Counted is what tensor cores would do: 2 per multiply-add of every matrix product with weights and of the two products
of attention (of a whole rectangle of queries and keys: what causality masks is counted, as kernels that count
themselves do). Not counted: norms, softmax, activations, embeddings, rotation. The backward pass counts twice the
forward pass, without that of a frozen encoder; recomputation by activation checkpointing does not count, so that
utilisation compares models and not settings.

The count is that of the plain computation: the factored cross-attention of small-channel images takes less than
it says.
"""

from dataclasses import dataclass, fields

import torch

from perceiver.config import ModelConfig
from perceiver.models import PerceiverARConfig, PerceiverIOConfig, build_model
from perceiver.models.shapes import AttentionChannels


def num_parameters(config: ModelConfig) -> int:
    """The exact number of parameters, tied ones counted once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of one forward pass of one example, by part."""

    inputs: float
    """What is done per input (Perceiver IO) or prefix position (Perceiver AR): projection, keys and values."""
    cross_attention: float
    """Encoder cross-attention: queries, products of attention, output projection, MLP."""
    self_attention: float
    """All self-attention layers on the latents."""
    queries: float
    """Decoder cross-attention, with keys and values of the latents (Perceiver IO)."""
    output: float
    """The output matrix."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def forward_flops(
    config: PerceiverARConfig | PerceiverIOConfig,
    *,
    seq_len: int | None = None,
    prefix_len: int | None = None,
    num_queries: int | None = None,
) -> ForwardFlops:
    """FLOPs of a forward pass per example.

    Args:
        seq_len: input length in tokens of a text model; None: max_seq_len.
        prefix_len: Perceiver AR: positions of the prefix that are attended, without those dropped; None: seq_len -
            max_latents, as in evaluation. The other positions are max_latents latents at most.
        num_queries: decoded positions of a text output; None: all of seq_len.
    """
    if isinstance(config, PerceiverARConfig):
        seq_len = seq_len or config.max_seq_len
        num_latents = min(config.max_latents, seq_len)
        return _forward_ar(config, seq_len - num_latents if prefix_len is None else prefix_len, num_latents)
    return _forward_io(config, seq_len, num_queries)


def training_flops(config: PerceiverARConfig | PerceiverIOConfig, *, seq_len: int | None = None, num_queries: int | None = None) -> float:
    """FLOPs of a training step per example: forward and backward, with prefix dropout and frozen parts as configured.

    Arguments: see `forward_flops`.
    """
    if isinstance(config, PerceiverARConfig):
        seq_len = seq_len or config.max_seq_len
        prefix_len = seq_len - min(config.max_latents, seq_len)
        kept = num_kept(prefix_len, config.cross_attention_dropout)
        return 3 * forward_flops(config, seq_len=seq_len, prefix_len=kept).total
    forward = forward_flops(config, seq_len=seq_len, num_queries=num_queries)
    if config.encoder.freeze:
        return forward.total + 2 * (forward.queries + forward.output)
    return 3 * forward.total


def num_kept(prefix_len: int, dropout: float) -> int:
    """Prefix positions that prefix dropout keeps."""
    return prefix_len - int(prefix_len * dropout)


def _linear(num_positions: float, num_in: int, num_out: int) -> float:
    return 2.0 * num_positions * num_in * num_out


def _keys_and_values(num_keys: float, c: AttentionChannels) -> float:
    return _linear(num_keys, c.kv_channels, c.qk_channels + c.v_channels)


def _attention(num_queries: float, num_keys: float, c: AttentionChannels, widening_factor: int) -> float:
    """Query and output projections, scores, weighted sum, MLP: all but keys and values."""
    projections = _linear(num_queries, c.q_channels, c.qk_channels) + _linear(num_queries, c.v_channels, c.q_channels)
    products = 2.0 * num_queries * num_keys * (c.qk_channels + c.v_channels)
    return projections + products + 2 * _linear(num_queries, c.q_channels, widening_factor * c.q_channels)


def _forward_ar(config: PerceiverARConfig, prefix_len: int, num_latents: int) -> ForwardFlops:
    width = config.num_channels
    c = AttentionChannels(q_channels=width, kv_channels=width, qk_channels=width, v_channels=width)
    within = _keys_and_values(num_latents, c)
    layer = within + _attention(num_latents, num_latents, c, config.self_attention_widening_factor)
    cross = within + _attention(num_latents, prefix_len + num_latents, c, config.cross_attention_widening_factor)
    return ForwardFlops(
        inputs=_keys_and_values(prefix_len, c),
        cross_attention=cross,
        self_attention=config.num_self_attention_layers * layer,
        queries=0.0,
        output=_linear(num_latents, width, config.vocab_size),
    )


def _forward_io(config: PerceiverIOConfig, seq_len: int | None, num_queries: int | None) -> ForwardFlops:
    encoder, num_latents = config.encoder, config.num_latents
    num_inputs = config.input.num_positions() if seq_len is None else seq_len
    adapting = config.input.adapting_flops(num_inputs)

    cross, within = config.encoder_cross_attention(), config.encoder_self_attention()
    num_cross = encoder.num_cross_attention_layers
    num_layers = encoder.num_self_attention_blocks * encoder.num_self_attention_layers_per_block
    layer = _keys_and_values(num_latents, within)
    layer += _attention(num_latents, num_latents, within, encoder.self_attention_widening_factor)

    output, decoding = config.output_queries(), config.decoder_cross_attention()
    if num_queries is None:
        num_queries = num_inputs if output.per_position else output.num_learned or num_inputs
    queries = _keys_and_values(num_latents, decoding)
    queries += _attention(num_queries, num_latents, decoding, config.decoder.cross_attention_widening_factor)
    return ForwardFlops(
        inputs=adapting + num_cross * _keys_and_values(num_inputs, cross),
        cross_attention=num_cross * _attention(num_latents, num_inputs, cross, encoder.cross_attention_widening_factor),
        self_attention=num_layers * layer,
        queries=queries,
        output=_linear(num_queries, output.num_channels, output.num_outputs),
    )
