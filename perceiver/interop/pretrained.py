"""Finding and reading weights of other projects: hub names, folders and files, without running anything they contain.

What is read:

- official Perceivers of the Hugging Face hub (`deepmind/language-perceiver`, `deepmind/vision-perceiver-fourier`,
  `deepmind/optical-flow-perceiver`) and models saved by `transformers`: a folder with config.json and model.safetensors or
  pytorch_model.bin;
- models that this project exported: the same, with the configuration under "model";
- hub models of krasserm/perceiver-io: the same files, the configuration under "model_config";
- Lightning checkpoints of krasserm/perceiver-io: one .ckpt file, the configuration in its hyperparameters.

Neither transformers nor Lightning is needed. Names and configurations are converted by `perceiver.interop.reference` and
`perceiver.interop.transformers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from perceiver.config import ModelConfig, UserError
from perceiver.interop import reference, transformers
from perceiver.interop.foreign import check_config, first_line, in_one_sentence, read_model
from perceiver.interop.lightning import read_lightning
from perceiver.interop.tensors import read_tensors

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of files with weights in a folder, the preferred one first."""


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
    return Pretrained(str(path), *read_lightning(path)) if path.suffix == ".ckpt" else _with_config(path, str(path))


def _with_config(path: Path, origin: str) -> Pretrained:
    """A file of weights with the config.json beside it."""
    config_path = path.parent / CONFIG
    if not config_path.is_file():
        raise UserError(f"{path.parent} has no {CONFIG}, which tells the model of {path.name}")
    config = read_json(config_path)
    with in_one_sentence(config_path):
        if config.get("format") == "perceiver":
            model = read_model(config.get("model"), config_path)
            rename: Callable[[dict[str, Any], ModelConfig], dict[str, Any]] | None = None
        elif "model_config" in config:
            model, rename = reference.config_from_reference(config["model_config"]), reference.from_reference
        else:
            model, rename = transformers.config_from_transformers(config), transformers.from_transformers
        check_config(model, config_path)
    weights = read_tensors(path)
    return Pretrained(origin, model, weights if rename is None else rename(weights, model))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of anyone's.

    Raises:
        UserError: it cannot be read, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {'null' if content is None else type(content).__name__}")
    return content


# --------------------------------------------------------------------------------------------- configurations, weights


# ------------------------------------------------------------------------------------------------------ tensors, the hub


def _download(name: str) -> Path:
    """The folder of a hub model's configuration and weights in the local cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download

    # The weights are asked for one format at a time: official models come in several.
    for weights in WEIGHT_FILES:
        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, weights]))
        except (OSError, ValueError) as error:  # all of its errors are one or the other
            raise UserError(
                f"weights {name} could not be had from the hub ({first_line(error)}): without a network give a local folder "
                f"with {CONFIG} and {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]}"
            ) from error
        if (folder / weights).is_file():
            return folder
    raise UserError(f"{name} on the hub has no weights: none of {', '.join(WEIGHT_FILES)}")


# ------------------------------------------------------------------------------------------------- Lightning checkpoints
