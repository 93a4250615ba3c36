"""Configurations and state dicts of transformers' Perceivers as ours, and ours as theirs. All functions are pure."""

import re
from typing import Any

from perceiver.config import ModelConfig, UserError, differences
from perceiver.interop.comparison import resolved_architecture
from perceiver.interop.names import Rules, StateDict, rename
from perceiver.interop.stems import FROM_TRANSFORMERS, TO_TRANSFORMERS, with_kernels, with_norm, without_norm
from perceiver.models import (
    AudioInput,
    AutoencoderOutput,
    ClassInput,
    ClassOutput,
    ConvolutionInput,
    DecoderConfig,
    EncoderConfig,
    FlowInput,
    FlowOutput,
    ImageInput,
    LearnedPositionInput,
    MultimodalInput,
    PerceiverIOConfig,
    TextInput,
    TextOutput,
    VideoInput,
)

_TRANSFORMERS_LAYER: Rules = (
    (r"attention\.self\.layernorm1\.", "q_norm."),
    (r"attention\.self\.layernorm2\.", "kv_norm."),
    (r"attention\.self\.query\.", "attention.q_proj."),
    (r"attention\.self\.key\.", "attention.k_proj."),
    (r"attention\.self\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"layernorm\.", "mlp.norm."),
    (r"mlp\.dense1\.", "mlp.widen."),
    (r"mlp\.dense2\.", "mlp.narrow."),
)
_PARTS = (("image", "video"), ("audio", "audio"), ("label", "label"))
"""Their names of the parts of a multimodal model, and ours."""
_MULTIMODAL: Rules = (
    *((rf"perceiver\.input_preprocessor\.padding\.{their}$", f"encoder.input_adapter.own.{ours}") for their, ours in _PARTS),
    *((rf"perceiver\.input_preprocessor\.mask\.{their}$", f"encoder.input_adapter.hidden.{ours}") for their, ours in _PARTS),
    *((rf"perceiver\.decoder\.padding\.{their}$", f"decoder.queries.own.{ours}") for their, ours in _PARTS),
    *(
        (rf"perceiver\.output_postprocessor\.modalities\.{their}\.classifier\.", f"decoder.output.outputs.{ours}.")
        for their, ours in _PARTS
    ),
    (r"perceiver\.decoder\.modalities\.label\.decoder\.output_position_encodings\.position_embeddings$", "decoder.queries.label"),
    (r"perceiver\.decoder\.decoder\.final_layer\.", "decoder.output.shared."),
)
_TRANSFORMERS: Rules = (
    *FROM_TRANSFORMERS,
    (r"perceiver\.embeddings\.latents$", "encoder.latents"),
    (r"perceiver\.input_preprocessor\.embeddings\.", "encoder.input_adapter.txt_embedding."),
    (r"perceiver\.input_preprocessor\.position_embeddings\.", "encoder.input_adapter.pos_embedding."),
    (r"perceiver\.input_preprocessor\.conv_after_patches\.", "encoder.input_adapter.linear."),
    (r"perceiver\.encoder\.cross_attention\.", "encoder.cross_attention_1."),
    (r"perceiver\.encoder\.self_attends\.(\d+)\.", r"encoder.self_attention_1.\1."),
    (r"perceiver\.decoder\.(?:decoder\.)?decoding_cross_attention\.", "decoder.cross_attention."),
    (r"perceiver\.decoder\.(?:decoder\.)?output_position_encodings\.position_embeddings$", "decoder.queries"),
    (r"perceiver\.decoder\.(?:decoder\.)?final_layer\.", "decoder.output."),
    (r"embedding_decoder\.bias$", "decoder.output_bias"),
)
_TRANSFORMERS_DEFAULTS: dict[str, Any] = {
    "num_latents": 256, "d_latents": 1280, "d_model": 768, "num_blocks": 1, "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8, "num_cross_attention_heads": 8, "qk_channels": None, "v_channels": None,
    "cross_attention_shape_for_attention": "kv", "self_attention_widening_factor": 1, "cross_attention_widening_factor": 1,
    "hidden_act": "gelu", "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02, "use_query_residual": True,
    "vocab_size": 262, "max_position_embeddings": 2048, "train_size": (368, 496), "num_labels": 2, "num_frames": 16, "image_size": 56,
    "audio_samples_per_frame": 1920, "samples_per_patch": 16, "output_shape": (1, 16, 224, 224), "output_num_channels": 512,
    "_label_trainable_num_channels": 1024,
}  # fmt: skip
"""What a config.json leaves out (transformers writes only what differs from these)."""


def from_transformers(state_dict: StateDict, config: ModelConfig) -> StateDict:
    """Weights of a transformers Perceiver under our names. For the configuration see `config_from_transformers`.

    Raises:
        UserError: a name that such a model does not have.
    """
    several = isinstance(config, PerceiverIOConfig) and isinstance(config.output, AutoencoderOutput)
    rules = (*_MULTIMODAL, *_TRANSFORMERS) if several else _TRANSFORMERS
    renamed = rename(without_norm(state_dict), rules, _TRANSFORMERS_LAYER, "transformers")
    is_self_attention = re.compile(r"(encoder\.self_attention_1\.\d+\.)q_norm\.")
    return {is_self_attention.sub(r"\1norm.", name): tensor for name, tensor in renamed.items()}


def config_from_transformers(config: dict[str, Any], architecture: str | None = None) -> PerceiverIOConfig:
    """A transformers PerceiverConfig (its config.json) as our model configuration.

    Args:
        architecture: class of the model, one of PerceiverForMaskedLM, PerceiverForImageClassificationFourier, ...Learned and
            ...ConvProcessing, PerceiverForOpticalFlow and PerceiverForMultimodalAutoencoding; None: what the config says.

    Raises:
        UserError: another architecture, or settings that these models do not have.
    """
    architecture = architecture or (config.get("architectures") or ["none"])[0]
    if "id2label" in config:
        config = {"num_labels": len(config["id2label"])} | config
    c = _TRANSFORMERS_DEFAULTS | config
    if c["hidden_act"] != "gelu" or c["cross_attention_shape_for_attention"] != "kv" or not c["use_query_residual"]:
        raise UserError("a transformers Perceiver must have hidden_act gelu, query residuals and attention shaped by kv")
    output: TextOutput | ClassOutput | FlowOutput | AutoencoderOutput
    input_config: TextInput | ImageInput | FlowInput | MultimodalInput
    dropout, d_latents = c["attention_probs_dropout_prob"], c["d_latents"]
    decoder: dict[str, Any] = {"num_cross_attention_heads": 1}
    # These models fix what their configuration does not say: image sizes and bands, the heads and widths of decoders.
    match architecture:
        case "PerceiverForMaskedLM":
            d_model = c["d_model"]
            input_config = TextInput(vocab_size=c["vocab_size"], max_seq_len=c["max_position_embeddings"], num_channels=d_model)
            kv_channels, output = d_model, TextOutput()
            decoder = {"num_cross_attention_heads": 8, "num_cross_attention_qk_channels": 256}
            decoder |= {"num_cross_attention_v_channels": d_model, "cross_attention_residual": False}
        case "PerceiverForImageClassificationFourier":
            input_config = ImageInput(image_shape=(224, 224, 3), num_frequency_bands=64)
            kv_channels, output = 261, ClassOutput(num_classes=c["num_labels"], num_query_channels=d_latents)
        case "PerceiverForImageClassificationLearned":
            input_config = LearnedPositionInput(image_shape=(c["image_size"], c["image_size"], 3))
            kv_channels, output = 512, ClassOutput(num_classes=c["num_labels"], num_query_channels=d_latents)
        case "PerceiverForImageClassificationConvProcessing":
            input_config = ConvolutionInput(image_shape=(224, 224, 3))
            kv_channels, output = 322, ClassOutput(num_classes=c["num_labels"], num_query_channels=d_latents)
        case "PerceiverForOpticalFlow":
            input_config = FlowInput(image_shape=tuple(c["train_size"]))
            kv_channels, output = 322, FlowOutput()
            decoder |= {"num_cross_attention_qk_channels": d_latents, "num_cross_attention_v_channels": d_latents}
            decoder |= {"cross_attention_residual": False}
        case "PerceiverForMultimodalAutoencoding":
            input_config, output = _multimodal(c)
            kv_channels = input_config.adapted_channels()
            decoder |= {"num_cross_attention_qk_channels": d_latents, "cross_attention_residual": False}
        case _:
            raise UserError(
                f"a transformers Perceiver of class {architecture} cannot be read: only PerceiverForMaskedLM, "
                "PerceiverForImageClassificationFourier, ...Learned and ...ConvProcessing, PerceiverForOpticalFlow and "
                "PerceiverForMultimodalAutoencoding"
            )
    return PerceiverIOConfig(
        num_latents=c["num_latents"],
        num_latent_channels=d_latents,
        input=input_config,
        encoder=EncoderConfig(
            num_cross_attention_heads=c["num_cross_attention_heads"],
            num_cross_attention_qk_channels=c["qk_channels"] or kv_channels,
            num_cross_attention_v_channels=c["v_channels"],
            cross_attention_widening_factor=c["cross_attention_widening_factor"],
            num_self_attention_heads=c["num_self_attention_heads"],
            num_self_attention_qk_channels=c["qk_channels"],
            num_self_attention_v_channels=c["v_channels"],
            num_self_attention_layers_per_block=c["num_self_attends_per_block"],
            num_self_attention_blocks=c["num_blocks"],
            self_attention_widening_factor=c["self_attention_widening_factor"],
            dropout=dropout,
        ),
        decoder=DecoderConfig(cross_attention_widening_factor=c["cross_attention_widening_factor"], dropout=dropout, **decoder),
        output=output,
        init_scale=c["initializer_range"],
    )


def _multimodal(c: dict[str, Any]) -> tuple[MultimodalInput, AutoencoderOutput]:
    """Input and output of a multimodal model.

    Raises:
        UserError: videos that are not 4 times as high and wide as image_size says.
    """
    frames, side, samples = c["num_frames"], c["image_size"], c["num_frames"] * c["audio_samples_per_frame"]
    shape = tuple(c["output_shape"])[1:]
    if shape != (frames, 4 * side, 4 * side):
        raise UserError(f"output_shape is {list(c['output_shape'])} and must be {[1, frames, 4 * side, 4 * side]} for image_size {side}")
    classes, group = c["num_labels"], c["samples_per_patch"]
    given = MultimodalInput(
        names=("audio", "video", "label"),
        inputs=(
            AudioInput(num_samples=samples, group=group, resolution=samples),
            VideoInput(video_shape=(*shape, 3)),
            ClassInput(num_classes=classes),
        ),
        masked=(0.0, 0.0, 1.0),
    )
    output = AutoencoderOutput(
        video_shape=(*shape, 3),
        video_resolution=(frames, side, side),
        num_samples=samples,
        group=group,
        audio_resolution=samples,
        num_classes=classes,
        num_label_channels=c["_label_trainable_num_channels"],
        num_decoded_channels=c["output_num_channels"],
    )
    return given, output


_TO_TRANSFORMERS_LAYER: Rules = (
    (r"(?:q_)?norm\.", "attention.self.layernorm1."),
    (r"kv_norm\.", "attention.self.layernorm2."),
    (r"attention\.q_proj\.", "attention.self.query."),
    (r"attention\.k_proj\.", "attention.self.key."),
    (r"attention\.v_proj\.", "attention.self.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.norm\.", "layernorm."),
    (r"mlp\.widen\.", "mlp.dense1."),
    (r"mlp\.narrow\.", "mlp.dense2."),
)


def to_transformers(state_dict: StateDict, config: ModelConfig) -> StateDict:
    """The inverse of `from_transformers`: our weights under the names of transformers, of a model with a `config_to_transformers`."""
    assert isinstance(config, PerceiverIOConfig)  # as that has seen
    decoder = "perceiver.decoder." if isinstance(config.output, TextOutput) else "perceiver.decoder.decoder."
    several: Rules = (
        *((rf"encoder\.input_adapter\.own\.{ours}$", f"perceiver.input_preprocessor.padding.{their}") for their, ours in _PARTS),
        *((rf"encoder\.input_adapter\.hidden\.{ours}$", f"perceiver.input_preprocessor.mask.{their}") for their, ours in _PARTS),
        *((rf"decoder\.queries\.own\.{ours}$", f"perceiver.decoder.padding.{their}") for their, ours in _PARTS),
        *(
            (rf"decoder\.output\.outputs\.{ours}\.", f"perceiver.output_postprocessor.modalities.{their}.classifier.")
            for their, ours in _PARTS
        ),
        (r"decoder\.queries\.label$", "perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings"),
        (r"decoder\.output\.shared\.", "perceiver.decoder.decoder.final_layer."),
    )
    rules: Rules = (
        *(several if isinstance(config.output, AutoencoderOutput) else ()),
        *TO_TRANSFORMERS,
        (r"encoder\.latents$", "perceiver.embeddings.latents"),
        (r"encoder\.input_adapter\.txt_embedding\.", "perceiver.input_preprocessor.embeddings."),
        (r"encoder\.input_adapter\.pos_embedding\.", "perceiver.input_preprocessor.position_embeddings."),
        (r"encoder\.input_adapter\.linear\.", "perceiver.input_preprocessor.conv_after_patches."),
        (r"encoder\.cross_attention_1\.", "perceiver.encoder.cross_attention."),
        (r"encoder\.self_attention_1\.(\d+)\.", r"perceiver.encoder.self_attends.\1."),
        (r"decoder\.cross_attention\.", f"{decoder}decoding_cross_attention."),
        (r"decoder\.queries$", f"{decoder}output_position_encodings.position_embeddings"),
        (r"decoder\.output\.", f"{decoder}final_layer."),
        (r"decoder\.output_bias$", "embedding_decoder.bias"),
    )
    renamed = with_norm(rename(state_dict, rules, _TO_TRANSFORMERS_LAYER, "this project"))
    return with_kernels(renamed) if isinstance(config.input, LearnedPositionInput) else renamed


def config_to_transformers(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `config_from_transformers`: a config.json, with the class of the model under "architectures".

    Raises:
        UserError: transformers has no such model; names a field that differs from what its models have.
    """
    if not isinstance(config, PerceiverIOConfig):
        raise UserError("transformers has no Perceiver AR: only Perceiver IO models can be exported to its format")
    encoder, within = config.encoder, config.encoder_self_attention()
    common: dict[str, Any] = {
        "model_type": "perceiver",
        "num_latents": config.num_latents,
        "d_latents": config.num_latent_channels,
        "num_blocks": encoder.num_self_attention_blocks,
        "num_self_attends_per_block": encoder.num_self_attention_layers_per_block,
        "num_self_attention_heads": encoder.num_self_attention_heads,
        "num_cross_attention_heads": encoder.num_cross_attention_heads,
        "self_attention_widening_factor": encoder.self_attention_widening_factor,
        "cross_attention_widening_factor": encoder.cross_attention_widening_factor,
        "attention_probs_dropout_prob": encoder.dropout,
        "initializer_range": config.init_scale,
        "d_model": config.input.adapted_channels(),
    }
    match config.input, config.output:
        case TextInput(vocab_size=vocab_size, max_seq_len=max_seq_len), TextOutput():
            architecture = "PerceiverForMaskedLM"
            common |= {"vocab_size": vocab_size, "max_position_embeddings": max_seq_len}
        case ImageInput(image_shape=image_shape), ClassOutput(num_classes=num_classes):
            suffix = {LearnedPositionInput: "Learned", ConvolutionInput: "ConvProcessing"}.get(type(config.input), "Fourier")
            architecture = f"PerceiverForImageClassification{suffix}"
            if suffix == "Learned":
                common["image_size"] = image_shape[0]
            common["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_classes)}
            common["label2id"] = {f"LABEL_{i}": i for i in range(num_classes)}
        case FlowInput(image_shape=image_shape), FlowOutput():
            architecture = "PerceiverForOpticalFlow"
            common["train_size"] = list(image_shape)
        case MultimodalInput(), AutoencoderOutput() as output:
            architecture = "PerceiverForMultimodalAutoencoding"
            frames = output.video_shape[0]
            common |= {
                "num_frames": frames,
                "image_size": output.video_resolution[1],
                "audio_samples_per_frame": output.num_samples // frames,
                "samples_per_patch": output.group,
                "output_shape": [1, *output.video_shape[:3]],
                "output_num_channels": output.num_decoded_channels,
                "_label_trainable_num_channels": output.num_label_channels,
                "id2label": {str(i): f"LABEL_{i}" for i in range(output.num_classes)},
                "label2id": {f"LABEL_{i}": i for i in range(output.num_classes)},
            }
        case _:
            raise UserError(
                f"transformers has no Perceiver from {type(config.input).__name__} to {type(config.output).__name__} that is built as ours"
            )
    common["architectures"] = [architecture]
    # Whether its models can be the same is seen by reading each candidate back.
    changes: list[str] = []
    for qk_channels in (within.qk_channels, None):
        for v_channels in (within.v_channels, None):
            candidate = common | {"qk_channels": qk_channels, "v_channels": v_channels}
            there = config_from_transformers(candidate)
            changes = differences(resolved_architecture(config), resolved_architecture(there))
            if not changes:
                return candidate
    raise UserError(f"{architecture} of transformers cannot be this model ({'; '.join(changes)})")
