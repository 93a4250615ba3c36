"""Channels of attention layers."""

from dataclasses import dataclass

from perceiver.config import UserError


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


def check_heads(num_heads: int, num_channels: int, heads_field: str, channels_field: str) -> None:
    """Checks that heads share the channels evenly.

    Raises:
        UserError: names both fields and the numbers of heads that would do.
    """
    if num_channels % num_heads:
        possible = [n for n in range(1, min(num_channels, 64) + 1) if num_channels % n == 0]
        raise UserError(
            f"{heads_field} is {num_heads}, but must divide {channels_field}, {num_channels}: one of {', '.join(map(str, possible))}"
        )
