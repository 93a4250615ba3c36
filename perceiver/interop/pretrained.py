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
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver.config import ModelConfig, UserError, flatten, load_tree, to_dict, type_name
from perceiver.config.core import is_builtin
from perceiver.interop import reference, transformers
from perceiver.interop.archives import check_unpacked
from perceiver.models import PerceiverARConfig, build_model, check_model

CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of files with weights in a folder, the preferred one first."""

_STAND_INS = ("perceiver.", "lightning.", "lightning_fabric.", "lightning_utilities.", "pytorch_lightning.", "jsonargparse.")
"""Beginnings of the names of classes whose objects may stand in a Lightning checkpoint: read as inert stand-ins."""

_MOST_BLOCKS = 4096
"""Self-attention blocks of a model from elsewhere: they can share one set of weights, whose number then sets no limit."""
_MOST_CONSTANTS = 2**30
"""Numbers in the constants of a model from elsewhere (features of positions), which no weight has the size of."""


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
        raise UserError(f"{path} is damaged ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {'null' if content is None else type(content).__name__}")
    return content


@contextmanager
def in_one_sentence(file: Path) -> Iterator[None]:
    """Says of a file from elsewhere that it is none of ours where its content has another shape than it should have."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file} describes no model that can be read: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, RuntimeError) as error:
        raise UserError(f"{file} describes no model that can be read ({_first_line(error)})") from None


# --------------------------------------------------------------------------------------------- configurations, weights


def read_model(data: Any, file: Path) -> ModelConfig:
    """The configuration of a model in a file in our format.

    Raises:
        UserError: it is none.
    """
    with in_one_sentence(file):
        config = load_tree(data, ModelConfig, f"{file} describes no model that can be read", foreign=True)
    check_config(config, file)
    return config


def check_config(config: ModelConfig, file: Path) -> None:
    """Checks that a model of a configuration from elsewhere can exist; builds nothing.

    Raises:
        UserError: names the file and the field.
    """
    _check_types(config, "model", file)
    try:
        check_model(config)
    except UserError as error:
        raise UserError(f"{file} describes no model that can be: {error}") from None


def _check_types(config: Any, name: str, file: Path) -> None:
    """Each field must be of the type of its default; a number that can be None is a whole one."""
    ours = is_builtin(type_name(type(config)))
    for field in fields(config):
        value, default, place = getattr(config, field.name), field.default, f"{name}.{field.name}"
        if not ours and (default is None or default is MISSING):
            continue  # of what type it is only its class knows
        if is_dataclass(default):
            if not is_dataclass(value) or isinstance(value, type):
                raise UserError(f"{file} describes no model that can be: {place} is {value!r:.60}")
            _check_types(value, place, file)
            continue
        if default == ():  # of any length, and of what only the class knows
            if not isinstance(value, tuple):
                raise UserError(f"{file} describes no model that can be: {place} is {value!r:.60}")
            for number, part in enumerate(value):
                if is_dataclass(part) and not isinstance(part, type):
                    _check_types(part, f"{place}.{number}", file)
            continue
        values, one = (value, default[0]) if isinstance(default, tuple) else ((value,), default)
        fits = isinstance(values, tuple) and (not isinstance(default, tuple) or len(values) == len(default))
        for v in values if fits else ():
            if one is None:
                fits &= v is None or type(v) is int
            elif isinstance(one, float):
                fits &= type(v) in (int, float) and math.isfinite(v)
            else:
                fits &= type(v) is type(one)
        if not fits:
            raise UserError(f"{file} describes no model that can be: {place} is {value!r:.60}")


def fitting_model(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], file: Path | str) -> Any:
    """The model of a configuration, without values, if it has exactly these weights.

    Whether it can is seen by numbers first: a configuration from elsewhere may name sizes that no machine can build.

    Raises:
        UserError: names a field or weights that differ.
    """
    elements = max(sum(map(math.prod, shapes.values())), 2**22)
    for name, value in flatten(to_dict(config)).items():
        most = len(shapes) if name.endswith(("attention_layers", "layers_per_block")) else elements
        if name.endswith(("blocks", "cross_attention_layers")):
            most = _MOST_BLOCKS
        if any(isinstance(v, int) and v > most for v in (value if isinstance(value, list) else [value])):
            raise UserError(f"{file} does not hold the weights of its configuration: model.{name} is {value}, more than they can be of")
    try:
        with torch.device("meta"):
            model = build_model(config)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not hold the weights of its configuration ({_first_line(error)})") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in wanted.keys() - shapes.keys()]
    wrong += [f"{name} is not of the model" for name in shapes.keys() - wanted.keys()]
    wrong += [f"{name} is {shapes[name]}, not {wanted[name]}" for name in wanted.keys() & shapes.keys() if shapes[name] != wanted[name]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} does not hold the weights of its configuration: {'; '.join(sorted(wrong)[:3])}{more}")
    if (constants := sum(buffer.numel() for buffer in model.buffers())) > _MOST_CONSTANTS:
        raise UserError(f"{file} is not loaded: the constants of its model are {constants:,} numbers, more than {_MOST_CONSTANTS:,}")
    return model


def check_weights(weights: Mapping[str, Tensor], file: Path | str) -> None:
    """Checks that weights are finite floating-point numbers.

    Raises:
        UserError: names the first that is not.
    """
    for name, tensor in weights.items():
        if name.endswith(".num_batches_tracked"):  # a count that batch normalisation keeps, of training alone
            continue
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"weight {name} of {file} has values of type {kind}, but weights are floating-point numbers")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"weight {name} of {file} has values that are not finite (NaN or infinite in float32)")


def header_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a .safetensors file; reads none of them.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file, or a damaged one ({_first_line(error)})") from None


# ------------------------------------------------------------------------------------------------------ tensors, the hub


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, by name: finite floating-point numbers.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    weights = _tensors(path)
    check_weights(weights, path)
    return weights


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, by name."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no safetensors file, or a damaged one ({_first_line(error)})") from None
    check_unpacked(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors, or is damaged: it is not loaded") from None
    except Exception as error:  # what a damaged pickle makes its reader raise can be anything
        raise UserError(f"{path} is no file of PyTorch weights, or a damaged one ({_first_line(error)})") from None
    return _by_name(content, path)


def _by_name(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
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
    check_unpacked(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # what a damaged pickle makes its reader raise can be anything
        raise UserError(f"{path} is no Lightning checkpoint, or a damaged one ({_first_line(error)})") from None
    if refused := sorted(name for name in unknown if not name.startswith(_STAND_INS)):
        raise UserError(f"{path} is not loaded: it names {', '.join(refused)}, which a checkpoint has no need of")
    stand_ins = [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in unknown]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not loaded: it holds what a checkpoint has no need of ({_first_line(error)})") from None
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UserError(f"{path} is no Lightning checkpoint of a model: it lacks state_dict or hyper_parameters")
    weights = _by_name(content["state_dict"], path)
    check_weights(weights, path)
    with in_one_sentence(path):
        config = reference.config_from_reference(_model_fields(_plain(content["hyper_parameters"]), path))
        check_config(config, path)
    return Pretrained(str(path), config, reference.from_reference(weights, config))


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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
