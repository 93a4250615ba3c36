"""Channels of attention layers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AttentionChannels:
    """Channels of one attention layer: of its two inputs, of queries and keys, of values (all heads together)."""

    q_channels: int
    kv_channels: int
    qk_channels: int
    v_channels: int


def attention_channels(q_channels: int, kv_channels: int, qk_channels: int, v_channels: int | None) -> AttentionChannels:
    """Values have as many channels as keys where `v_channels` is None."""
    return AttentionChannels(q_channels=q_channels, kv_channels=kv_channels, qk_channels=qk_channels, v_channels=v_channels or qk_channels)
