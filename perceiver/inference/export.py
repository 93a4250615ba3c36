"""Trained models as folders of files that last: config.json, model.safetensors and the tokenizer; and the hub.

A folder in our format has `config.json` with the model's and the task's configuration, `model.safetensors` with our
weight names, and `tokenizer.model` where the tokenizer is a SentencePiece model. Nothing in it is pickled. The format
of transformers has its own config.json and weight names, for those models that it has too.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from perceiver import hub
from perceiver.config import UserError, to_dict
from perceiver.data.tokenizers import TOKENIZER, ByteTokenizer, SentencePieceTokenizer, Tokenizer
from perceiver.models.configs import ImageInput

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "perceiver", 1
FORMATS = ("perceiver", "transformers")


def export(trained: TrainedModel, folder: str | Path, format: str = "perceiver") -> Path:
    """Writes a model to a folder, which appears whole or not at all.

    Args:
        folder: must not exist yet, or hold an earlier export, which is replaced.
        format: "perceiver" (loads with `perceiver.load`), or "transformers" (loads with its `from_pretrained`).

    Returns:
        The folder.

    Raises:
        UserError: an unknown format, a folder with something else in it, a model that transformers has not.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r} and must be one of {', '.join(FORMATS)}")
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file())):
        raise UserError(f"{folder} exists and is no exported model: choose another folder")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
    if format == "transformers":
        config = _transformers_config(trained)
        weights = hub.to_transformers(weights, trained.config)
    else:
        config = our_config(trained)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_tokenizer(trained.tokenizer, temporary, format, config)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def our_config(trained: TrainedModel) -> dict[str, Any]:
    """The config.json of our format."""
    tokenizer = trained.tokenizer
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": to_dict(trained.config),
        "task": to_dict(trained.task),
        "tokenizer": None if tokenizer is None else "bytes" if isinstance(tokenizer, ByteTokenizer) else TOKENIZER,
        "photos": trained.photos,
        "name": trained.name,
        "provenance": trained.provenance,
    }


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder in our format; None where it is none.

    Raises:
        UserError: a version of the format that this version does not know.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {config.get('format_version')}, this version reads {FORMAT_VERSION}")
    return config


def upload(folder: str | Path, name: str, private: bool = True) -> str:
    """Uploads an exported folder to the Hugging Face hub, and returns its address. Makes the repository if need be.

    Args:
        name: "OWNER/NAME".
        private: whether a new repository is seen by its owner alone.

    Raises:
        UserError: the folder holds no exported model, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no exported model: it must have {CONFIG} and {WEIGHTS}")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=str(path)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"the hub did not take {name} ({_reason(error)})") from error


def download(name: str, files: list[str]) -> Path:
    """The folder with these files of a model on the Hugging Face hub: downloaded, or where an earlier download put it.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise UserError(f"the hub cannot be reached, and {name} was not downloaded before ({_reason(error)})") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"no model {name!r} here or on the hub ({_reason(error)})") from error


def _write_tokenizer(tokenizer: Tokenizer | None, folder: Path, format: str, config: dict[str, Any]) -> None:
    if format == "transformers" and isinstance(tokenizer, ByteTokenizer):
        settings = {"tokenizer_class": "PerceiverTokenizer", "model_max_length": config["max_position_embeddings"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / TOKENIZER).write_bytes(tokenizer.model)


def _transformers_config(trained: TrainedModel) -> dict[str, Any]:
    config = hub.config_to_transformers(trained.config)
    if isinstance(trained.config.input, ImageInput):
        config["id2label"] = {str(i): name for i, name in enumerate(trained.class_names)}
        config["label2id"] = {name: i for i, name in enumerate(trained.class_names)}
    config["torch_dtype"] = str(next(trained.model.parameters()).dtype).removeprefix("torch.")
    return config


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
