"""Checks of model configurations, before anything is built."""

from typing import Any

from perceiver.config import ModelConfig, UserError, nodes, spelled
from perceiver.models import shapes
from perceiver.models.configs import PerceiverARConfig, PerceiverIOConfig
from perceiver.models.local_init import check_local_init


def check_model(config: ModelConfig) -> None:
    """Checks that a model of this configuration can exist; builds nothing.

    Raises:
        UserError: names the field, its value, and what would be right.
    """
    for where, node in nodes(config, "model."):
        node.check(where)


def check_ar(config: PerceiverARConfig) -> None:
    _positive_counts(config, "model", except_for="num_self_attention_rotary_layers")
    _heads(config.num_heads, config.num_channels, "model.num-heads", "model.num-channels")
    if config.num_channels // config.num_heads < 2:
        raise UserError(
            f"model.num-heads is {config.num_heads} for {config.num_channels} channels, but rotary embedding needs "
            f"heads of at least 2 channels: at most {config.num_channels // 2} heads"
        )
    if config.max_latents > config.max_seq_len:
        raise UserError(f"model.max-latents is {config.max_latents}, but must be at most model.max-seq-len, {config.max_seq_len}")
    if not -1 <= config.num_self_attention_rotary_layers <= config.num_self_attention_layers:
        raise UserError(
            f"model.num-self-attention-rotary-layers is {config.num_self_attention_rotary_layers}, but must be -1 "
            f"(all) or 0 to model.num-self-attention-layers, {config.num_self_attention_layers}"
        )


def check_io(config: PerceiverIOConfig) -> None:
    _positive_counts(config, "model")
    for section in ("input", "encoder", "decoder", "output"):
        _positive_counts(getattr(config, section), f"model.{section}")
    config.output.check_model(config)
    encoder = config.encoder
    if encoder.num_cross_attention_layers > encoder.num_self_attention_blocks:
        raise UserError(
            f"model.encoder.num-cross-attention-layers is {encoder.num_cross_attention_layers}, but each precedes a "
            "self-attention block: at most model.encoder.num-self-attention-blocks, "
            f"{encoder.num_self_attention_blocks}"
        )
    for field, heads, channels in (
        ("encoder.num-cross-attention", encoder.num_cross_attention_heads, shapes.encoder_cross_attention(config)),
        ("encoder.num-self-attention", encoder.num_self_attention_heads, shapes.encoder_self_attention(config)),
        (
            "decoder.num-cross-attention",
            config.decoder.num_cross_attention_heads,
            shapes.decoder_cross_attention(config),
        ),
    ):
        _heads(heads, channels.qk_channels, f"model.{field}-heads", f"model.{field}-qk-channels")
        _heads(heads, channels.v_channels, f"model.{field}-heads", f"model.{field}-v-channels")
    if config.init == "local":
        check_local_init(config)


def _positive_counts(config: Any, section: str, except_for: str = "") -> None:
    """Counts and sizes are at least 1, probabilities at least 0 and below 1."""
    for name, value in vars(config).items():
        if name == except_for or value is None or isinstance(value, bool):
            continue
        if isinstance(value, int) and value < 1:
            raise UserError(f"{spelled(f'{section}.{name}')} is {value}, but must be at least 1")
        if name.endswith("dropout") and not 0 <= value < 1:
            raise UserError(f"{spelled(f'{section}.{name}')} is {value}, but must be at least 0 and less than 1")
        if name in ("init_scale", "rescale_factor") and value <= 0:
            raise UserError(f"{spelled(f'{section}.{name}')} is {value}, but must be more than 0")


def _heads(num_heads: int, num_channels: int, heads_field: str, channels_field: str) -> None:
    if num_channels % num_heads:
        possible = [n for n in range(1, min(num_channels, 64) + 1) if num_channels % n == 0]
        raise UserError(
            f"{heads_field} is {num_heads}, but must divide {channels_field}, {num_channels}: one of {', '.join(map(str, possible))}"
        )
