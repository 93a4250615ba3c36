"""Configurations and state dicts of krasserm/perceiver-io 0.11 as ours. All functions are pure: dicts in, configurations and dicts out."""

from typing import Any

from perceiver.config import ModelConfig
from perceiver.interop.names import Rules, StateDict, build, rename, take
from perceiver.models import (
    ClassOutput,
    DecoderConfig,
    EncoderConfig,
    FlowInput,
    FlowOutput,
    ImageInput,
    PerceiverARConfig,
    PerceiverIOConfig,
    TextInput,
    TextOutput,
)

_REFERENCE_LAYER: Rules = (
    (r"0\.(?:module\.)?(q_norm|kv_norm|norm|attention)\.", r"\1."),
    (r"1\.(?:module\.)?0\.", "mlp.norm."),
    (r"1\.(?:module\.)?1\.", "mlp.widen."),
    (r"1\.(?:module\.)?3\.", "mlp.narrow."),
)
_REFERENCE_IO: Rules = (
    (r"0\.input_adapter\.position_encoding\.position_encoding$", None),  # a constant
    (r"0\.latent_provider\._query$", "encoder.latents"),
    (r"0\.input_adapter\.", "encoder.input_adapter."),
    (r"0\.cross_attn_(1|n)\.", r"encoder.cross_attention_\1."),
    (r"0\.self_attn_(1|n)\.(\d+)\.", r"encoder.self_attention_\1.\2."),
    (r"1\.output_query_provider\._query$", "decoder.queries"),
    (r"1\.cross_attn\.", "decoder.cross_attention."),
    (r"1\.output_adapter\.linear\.", "decoder.output."),
    (r"1\.output_adapter\.bias$", "decoder.output_bias"),
)
_REFERENCE_AR: Rules = (
    (r"input_adapter\.frq_pos_encoding\.inv_freq$", None),  # a constant
    (r"input_adapter\.", "input_adapter."),
    (r"cross_attention\.", "cross_attention."),
    (r"self_attention\.(\d+)\.", r"self_attention.\1."),
    (r"out_norm\.", "output_norm."),
    (r"output_adapter\.bias$", "output_bias"),
)
_NO_MODEL_FIELDS = {"activation_checkpointing", "activation_offloading", "max_heads_parallel", "params"}
"""Fields of the reference's configurations that do not change what a model computes."""


def from_reference(state_dict: StateDict, config: ModelConfig) -> StateDict:
    """Weights of krasserm/perceiver-io under our names.

    Args:
        state_dict: names as of a `PerceiverIO` or `PerceiverAR` there, also with a Lightning module's prefix "model." or a
            hub model's "backend_model.".
        config: the model's configuration, see `config_from_reference`.

    Raises:
        UserError: a name that such a model does not have.
    """
    for prefix in ("model.", "backend_model."):
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    top = _REFERENCE_AR if isinstance(config, PerceiverARConfig) else _REFERENCE_IO
    return rename(state_dict, top, _REFERENCE_LAYER, "krasserm/perceiver-io")


def config_from_reference(config: dict[str, Any]) -> ModelConfig:
    """The model configuration of krasserm/perceiver-io ("model_config" of its hub models) as ours.

    Raises:
        UserError: a field that its models do not have.
    """
    config = {name: value for name, value in config.items() if name not in _NO_MODEL_FIELDS}
    if "max_latents" in config:
        return build(PerceiverARConfig, config)
    encoder = {name: value for name, value in config.pop("encoder").items() if name not in _NO_MODEL_FIELDS}
    decoder = dict(config.pop("decoder"))
    input_config: TextInput | ImageInput | FlowInput
    if "vocab_size" in encoder:
        names = {"vocab_size": "vocab_size", "max_seq_len": "max_seq_len", "num_input_channels": "num_channels"}
        input_config = build(TextInput, take(encoder, names))
    elif "num_patch_input_channels" in encoder:
        fields = ["image_shape", "num_patch_input_channels", "num_patch_hidden_channels", "num_frequency_bands"]
        input_config = build(FlowInput, take(encoder, dict(zip(fields, fields, strict=True))))
    else:
        fields = ["image_shape", "num_frequency_bands"]
        input_config = build(ImageInput, take(encoder, dict(zip(fields, fields, strict=True))))
    query_channels = decoder.pop("num_output_query_channels", None)
    output: TextOutput | ClassOutput | FlowOutput
    if "num_classes" in decoder:
        names = {"num_classes": "num_classes", "num_output_queries": "num_queries"}
        output = build(ClassOutput, take(decoder, names) | {"num_query_channels": query_channels})
    elif "rescale_factor" in decoder:
        output = FlowOutput(rescale_factor=decoder.pop("rescale_factor"))
        decoder.pop("image_shape", None)  # the encoder's
    else:
        output = TextOutput(num_query_channels=query_channels)
        take(decoder, {"vocab_size": "", "max_seq_len": ""})  # the encoder's
    scale = {"init_scale": encoder.pop("init_scale")} if "init_scale" in encoder else {}
    decoder = {name: value for name, value in decoder.items() if name not in ("init_scale", "freeze")}
    return PerceiverIOConfig(
        num_latents=config["num_latents"],
        num_latent_channels=config["num_latent_channels"],
        input=input_config,
        encoder=build(EncoderConfig, encoder),
        decoder=build(DecoderConfig, decoder),
        output=output,
        **scale,
    )
