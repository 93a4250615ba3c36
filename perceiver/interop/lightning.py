"""Lightning checkpoints of krasserm/perceiver-io."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver.config import ModelConfig, UserError
from perceiver.interop import reference
from perceiver.interop.archives import check_unpacked
from perceiver.interop.foreign import check_config, check_weights, first_line, in_one_sentence
from perceiver.interop.tensors import by_name
from perceiver.models import PerceiverARConfig

_STAND_INS = ("perceiver.", "lightning.", "lightning_fabric.", "lightning_utilities.", "pytorch_lightning.", "jsonargparse.")
"""Beginnings of the names of classes whose objects may stand in a Lightning checkpoint: read as inert stand-ins."""


class StandIn:
    """What an object of a class that is not installed leaves: its fields, as attributes. Runs nothing."""

    def __init__(self, *ignored: Any) -> None:
        """Whatever the file gives to the class's constructor."""


def read_lightning(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and, under our names, the weights of a Lightning checkpoint of krasserm/perceiver-io.

    Its hyperparameters hold objects of classes of that project. They are read by PyTorch's restricted unpickler, with an inert
    stand-in in place of each such class; a file that names anything else is refused as a whole.

    Raises:
        UserError: not such a file, or one that must not be loaded.
    """
    check_unpacked(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # what a damaged pickle makes its reader raise can be anything
        raise UserError(f"{path} is no Lightning checkpoint, or a damaged one ({first_line(error)})") from None
    if refused := sorted(name for name in unknown if not name.startswith(_STAND_INS)):
        raise UserError(f"{path} is not loaded: it names {', '.join(refused)}, which a checkpoint has no need of")
    stand_ins = [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in unknown]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not loaded: it holds what a checkpoint has no need of ({first_line(error)})") from None
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UserError(f"{path} is no Lightning checkpoint of a model: it lacks state_dict or hyper_parameters")
    weights = by_name(content["state_dict"], path)
    check_weights(weights, path)
    with in_one_sentence(path):
        config = reference.config_from_reference(_model_fields(_plain(content["hyper_parameters"]), path))
        check_config(config, path)
    return config, reference.from_reference(weights, config)


def _plain(value: Any) -> Any:
    """Stand-ins and dicts as dicts, all the way down."""
    if isinstance(value, StandIn):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    return value


def _model_fields(hyper_parameters: Any, path: Path) -> dict[str, Any]:
    """Of a Lightning module's hyperparameters those of its model; others (prompts of samples, say) do not matter to it."""
    if not isinstance(hyper_parameters, dict):
        raise UserError(f"{path} is no Lightning checkpoint of a model: its hyperparameters are {type(hyper_parameters).__name__}")
    if "max_latents" in hyper_parameters:
        known = {f.name for f in fields(PerceiverARConfig)}
        return {name: value for name, value in hyper_parameters.items() if name in known}
    missing = {"encoder", "decoder", "num_latents", "num_latent_channels"} - hyper_parameters.keys()
    if missing:
        raise UserError(f"the checkpoint's hyperparameters are no Perceiver's: {', '.join(sorted(missing))} missing")
    return hyper_parameters
