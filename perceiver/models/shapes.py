"""Channels and counts that follow from a Perceiver IO configuration: one place for models, checks, FLOPs and import."""

from dataclasses import dataclass

from perceiver.models.configs import OutputQueries, PerceiverIOConfig


@dataclass(frozen=True, kw_only=True)
class AttentionChannels:
    """Channels of one attention layer: of its two inputs, of queries and keys, of values (all heads together)."""

    q_channels: int
    kv_channels: int
    qk_channels: int
    v_channels: int


def encoder_cross_attention(config: PerceiverIOConfig) -> AttentionChannels:
    encoder, kv = config.encoder, config.input.adapted_channels()
    default = config.input.qk_channels(config.num_latent_channels)
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


def output_queries(config: PerceiverIOConfig) -> OutputQueries:
    return config.output.queries(config)
