"""What two configurations of models have in common, whatever they leave to defaults."""

from typing import Any

from perceiver.config import ModelConfig, flatten, to_dict
from perceiver.models import (
    PerceiverIOConfig,
)


def resolved_architecture(config: ModelConfig) -> dict[str, Any]:
    """What of a configuration decides which function its weights are; flat. Two models with the same are interchangeable.

    All channels are numbers; dropout, initial weights and what is frozen are left out, and sharing where there is no second.
    """
    irrelevant = ("dropout", "init_scale", "init", "freeze")
    flat = {name: value for name, value in flatten(to_dict(config)).items() if not name.endswith(irrelevant)}
    if not isinstance(config, PerceiverIOConfig):
        return flat
    for name, channels in (
        ("encoder.num_cross_attention", config.encoder_cross_attention()),
        ("encoder.num_self_attention", config.encoder_self_attention()),
        ("decoder.num_cross_attention", config.decoder_cross_attention()),
    ):
        flat |= {f"{name}_qk_channels": channels.qk_channels, f"{name}_v_channels": channels.v_channels}
    if config.encoder.num_cross_attention_layers == 1:
        del flat["encoder.first_cross_attention_layer_shared"]
    if config.encoder.num_self_attention_blocks == 1:
        del flat["encoder.first_self_attention_block_shared"]
    return flat
