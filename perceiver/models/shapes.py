"""Channels and counts that follow from a Perceiver IO configuration: one place for models, checks, FLOPs and import."""

from dataclasses import dataclass

from perceiver.config import ClassOutput, FlowInput, FlowOutput, ImageInput, PerceiverIOConfig, TextInput, TextOutput


@dataclass(frozen=True, kw_only=True)
class AttentionChannels:
    """Channels of one attention layer: of its two inputs, of queries and keys, of values (all heads together)."""

    q_channels: int
    kv_channels: int
    qk_channels: int
    v_channels: int


def adapted_channels(config: TextInput | ImageInput | FlowInput) -> int:
    """Channels of the sequence that an input becomes."""
    match config:
        case TextInput():
            return config.num_channels
        case ImageInput(image_shape=(*axes, num_pixel_channels)):
            return num_pixel_channels + len(axes) * (2 * config.num_frequency_bands + 1)
        case FlowInput(image_shape=axes):
            return config.num_patch_hidden_channels + len(axes) * (2 * config.num_frequency_bands + 1)


def encoder_cross_attention(config: PerceiverIOConfig) -> AttentionChannels:
    encoder, kv = config.encoder, adapted_channels(config.input)
    default = config.num_latent_channels if isinstance(config.input, TextInput) else kv
    return _channels(
        config.num_latent_channels, kv, encoder.num_cross_attention_qk_channels or default,
        encoder.num_cross_attention_v_channels,
    )  # fmt: skip


def encoder_self_attention(config: PerceiverIOConfig) -> AttentionChannels:
    encoder, channels = config.encoder, config.num_latent_channels
    return _channels(channels, channels, encoder.num_self_attention_qk_channels or channels, encoder.num_self_attention_v_channels)


def decoder_cross_attention(config: PerceiverIOConfig) -> AttentionChannels:
    decoder, queries = config.decoder, output_queries(config).num_channels
    return _channels(
        queries, config.num_latent_channels, decoder.num_cross_attention_qk_channels or queries,
        decoder.num_cross_attention_v_channels,
    )  # fmt: skip


def _channels(q: int, kv: int, qk: int, v: int | None) -> AttentionChannels:
    return AttentionChannels(q_channels=q, kv_channels=kv, qk_channels=qk, v_channels=v or qk)


@dataclass(frozen=True, kw_only=True)
class OutputQueries:
    """Output queries and what becomes of them."""

    num_learned: int
    """Learned queries; 0: the adapted input is the query."""
    num_channels: int
    """Channels of the queries."""
    num_outputs: int
    """Channels of the output: classes, vocabulary or flow."""
    tied: bool = False
    """Whether the output matrix is the token embedding."""


def output_queries(config: PerceiverIOConfig) -> OutputQueries:
    match config.output:
        case TextOutput(num_query_channels=channels):
            return OutputQueries(
                num_learned=config.input.max_seq_len,
                num_channels=channels or config.input.num_channels,
                num_outputs=config.input.vocab_size,
                tied=channels is None,
            )
        case ClassOutput(num_classes=num_classes, num_queries=num_queries, num_query_channels=channels):
            return OutputQueries(num_learned=num_queries, num_channels=channels, num_outputs=num_classes)
        case FlowOutput():
            return OutputQueries(num_learned=0, num_channels=adapted_channels(config.input), num_outputs=2)
