"""The models: plain PyTorch modules built from a configuration, that take and return plain tensors."""

from typing import Any

import torch

from perceiver.config import ModelConfig, UserError, spelled
from perceiver.config.core import check_nodes, nodes
from perceiver.models.array_input import ArrayInput
from perceiver.models.array_outputs import ArrayOutput, EmbeddingOutput, HeadsOutput
from perceiver.models.autoencoder_output import AutoencoderOutput
from perceiver.models.encoder_decoder import DecoderConfig, EncoderConfig
from perceiver.models.event_input import EventInput
from perceiver.models.feature_input import FeatureInput
from perceiver.models.grid_inputs import AudioInput, StemInput, VideoInput
from perceiver.models.inputs import FlowInput, ImageInput, InputConfig, TextInput
from perceiver.models.mel_input import LogMelInput
from perceiver.models.multimodal_input import ClassInput, MultimodalInput
from perceiver.models.outputs import ClassOutput, FlowOutput, ModelSizes, OutputConfig, OutputQueries, TextOutput, ValueOutput
from perceiver.models.perceiver_ar import PerceiverAR, PerceiverARCache, PerceiverARConfig
from perceiver.models.perceiver_io import PerceiverIO, PerceiverIOConfig
from perceiver.models.perceiver_io_parts import PerceiverEncoder
from perceiver.models.published_stems import ConvolutionInput, LearnedPositionInput
from perceiver.models.resampler import Resampler
from perceiver.models.table_input import Categories, TableInput

__all__ = [
    "ArrayInput",
    "ArrayOutput",
    "AudioInput",
    "AutoencoderOutput",
    "Categories",
    "ClassInput",
    "ClassOutput",
    "ConvolutionInput",
    "DecoderConfig",
    "EmbeddingOutput",
    "EncoderConfig",
    "EventInput",
    "FeatureInput",
    "FlowInput",
    "FlowOutput",
    "HeadsOutput",
    "ImageInput",
    "InputConfig",
    "LearnedPositionInput",
    "LogMelInput",
    "ModelSizes",
    "MultimodalInput",
    "OutputConfig",
    "OutputQueries",
    "PerceiverAR",
    "PerceiverARCache",
    "PerceiverARConfig",
    "PerceiverEncoder",
    "PerceiverIO",
    "PerceiverIOConfig",
    "Resampler",
    "StemInput",
    "TableInput",
    "TextInput",
    "TextOutput",
    "ValueOutput",
    "VideoInput",
    "build_model",
    "check_model",
]


OF_DATA = ("num_classes", "image_shape")
"""Fields of which 0 means what the data has."""


def check_model(config: ModelConfig) -> None:
    """Checks that a model of this configuration can exist; builds nothing.

    Raises:
        UserError: names the field, its value, and what would be right.
    """
    check_nodes(config, "model.")


def build_model(config: ModelConfig, seed: int = 0) -> Any:
    """The model of a configuration on the current default device, with the initial weights of `seed` (none on "meta").

    Raises:
        UserError: see `check_model`; or sizes that mean "as the data", where weights are to be made.
    """
    check_model(config)
    device = torch.get_default_device()
    with torch.device("meta"):
        model = config.build()
    if device.type != "meta":
        if empty := [name for name, parameter in model.named_parameters() if not parameter.numel()]:
            values = [(f"{place}{spelled(name)}", getattr(node, name, None)) for place, node in nodes(config, "model.") for name in OF_DATA]
            of_data = [name for name, value in values if value == 0 or isinstance(value, tuple) and 0 in value]
            why = (
                f"{' and '.join(of_data)} of 0 means what the data has, which is not known here" if of_data else "a size of the model is 0"
            )
            raise UserError(f"{empty[0]} would have no numbers: {why}")
        model.to_empty(device=device)
        model.reset_buffers()
        model.init_weights(seed)
    return model
