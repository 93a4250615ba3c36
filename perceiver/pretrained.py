"""Finding and reading weights of other projects: hub names, folders and files, without running anything they contain.

What is read:

- official Perceivers of the Hugging Face hub (`deepmind/language-perceiver`, `deepmind/vision-perceiver-fourier`,
  `deepmind/optical-flow-perceiver`) and models saved by `transformers`: a folder with config.json and model.safetensors or
  pytorch_model.bin;
- models that this project exported: the same, with the configuration under "model";
- hub models of krasserm/perceiver-io: the same files, the configuration under "model_config";
- Lightning checkpoints of krasserm/perceiver-io: one .ckpt file, the configuration in its hyperparameters.

Neither transformers nor Lightning is needed. Names and configurations are converted by `perceiver.hub`.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver import hub
from perceiver.config import ModelConfig, UserError, from_dict
from perceiver.models.configs import PerceiverARConfig

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of files with weights in a folder, the preferred one first."""

_STAND_INS = ("perceiver.", "lightning.", "lightning_fabric.", "lightning_utilities.", "pytorch_lightning.", "jsonargparse.")
"""Beginnings of the names of classes whose objects may stand in a Lightning checkpoint: read as inert stand-ins."""


@dataclass(frozen=True)
class Pretrained:
    """Weights under our names and the configuration of their model."""

    origin: str
    """Where they come from, for people."""
    config: ModelConfig
    weights: dict[str, Tensor]


def read_pretrained(source: str | Path) -> Pretrained:
    """Reads weights from a file or folder, or from the hub by name ("owner/name").

    Raises:
        UserError: there is nothing of that name, its format is not known, or it holds what must not be loaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, str(source))
    if path.is_file():
        return _read_file(path)
    if is_hub_name(str(source)):
        return _read_folder(_download(str(source)), str(source))
    raise UserError(f"no weights {str(source)!r}: neither a file or folder nor a name on the hub (owner/name)")


def is_hub_name(source: str) -> bool:
    """Whether a text could name a model on the hub."""
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None


# -------------------------------------------------------------------------------------------------- folders, files, the hub


def _read_folder(folder: Path, origin: str) -> Pretrained:
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    return _with_config(path, origin)


def _read_file(path: Path) -> Pretrained:
    return read_lightning(path) if path.suffix == ".ckpt" else _with_config(path, str(path))


def _with_config(path: Path, origin: str) -> Pretrained:
    """A file of weights with the config.json beside it."""
    config_path = path.parent / CONFIG
    if not config_path.is_file():
        raise UserError(f"{path.parent} has no {CONFIG}, which tells the model of {path.name}")
    try:
        config = json.loads(config_path.read_text())
    except ValueError as error:
        raise UserError(f"{config_path} is damaged ({error})") from None
    weights = _tensors(path)
    if config.get("format") == "perceiver":
        return Pretrained(origin, from_dict(config["model"]), weights)
    if "model_config" in config:
        model = hub.config_from_reference(config["model_config"])
        return Pretrained(origin, model, hub.from_reference(weights, model))
    model = hub.config_from_transformers(config)
    return Pretrained(origin, model, hub.from_transformers(weights, model))


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, by name."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file, or a damaged one ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors, or is damaged: it is not loaded") from None
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{path} is no file of PyTorch weights, or a damaged one ({_first_line(error)})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds more than weights by name")
    return content


def _download(name: str) -> Path:
    """The folder of a hub model's configuration and weights in the local cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download

    # The weights are asked for one format at a time: official models come in several.
    for weights in WEIGHT_FILES:
        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, weights]))
        except (OSError, ValueError) as error:  # all of its errors are one or the other
            raise UserError(
                f"weights {name} could not be had from the hub ({_first_line(error)}): without a network give a local folder "
                f"with {CONFIG} and {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]}"
            ) from error
        if (folder / weights).is_file():
            return folder
    raise UserError(f"{name} on the hub has no weights: none of {', '.join(WEIGHT_FILES)}")


# ------------------------------------------------------------------------------------------------- Lightning checkpoints


class StandIn:
    """What an object of a class that is not installed leaves: its fields, as attributes. Runs nothing."""

    def __init__(self, *ignored: Any) -> None:
        """Whatever the file gives to the class's constructor."""


def read_lightning(path: Path) -> Pretrained:
    """A Lightning checkpoint of krasserm/perceiver-io.

    Its hyperparameters hold objects of classes of that project. They are read by PyTorch's restricted unpickler, with an inert
    stand-in in place of each such class; a file that names anything else is refused as a whole.

    Raises:
        UserError: not such a file, or one that must not be loaded.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is no Lightning checkpoint, or a damaged one ({_first_line(error)})") from None
    if refused := sorted(name for name in unknown if not name.startswith(_STAND_INS)):
        raise UserError(f"{path} is not loaded: it names {', '.join(refused)}, which a checkpoint has no need of")
    stand_ins = [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in unknown]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not loaded: it holds what a checkpoint has no need of ({_first_line(error)})") from None
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UserError(f"{path} is no Lightning checkpoint of a model: it lacks state_dict or hyper_parameters")
    config = hub.config_from_reference(_model_fields(_plain(content["hyper_parameters"])))
    return Pretrained(str(path), config, hub.from_reference(content["state_dict"], config))


def _plain(value: Any) -> Any:
    """Stand-ins and dicts as dicts, all the way down."""
    if isinstance(value, StandIn):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    return value


def _model_fields(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """Of a Lightning module's hyperparameters those of its model; others (prompts of samples, say) do not matter to it."""
    if "max_latents" in hyper_parameters:
        known = {f.name for f in fields(PerceiverARConfig)}
        return {name: value for name, value in hyper_parameters.items() if name in known}
    missing = {"encoder", "decoder", "num_latents", "num_latent_channels"} - hyper_parameters.keys()
    if missing:
        raise UserError(f"the checkpoint's hyperparameters are no Perceiver's: {', '.join(sorted(missing))} missing")
    return hyper_parameters


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
