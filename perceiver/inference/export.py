"""Trained models as folders of files that last: config.json, model.safetensors and the tokenizer; and the hub.

A folder in our format has `config.json` with the model's and the task's configuration, `model.safetensors` with our
weight names, and the tokenizer's `tokenizer.model` (SentencePiece) or `tokenizer.json`, if it has one. Nothing in it is pickled. The format
of transformers has its own config.json and weight names, for those models that it has too. In both, `export.json` lists
the files with their hashes: only what it lists is ever replaced by a later export. All have a model card, README.md.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from perceiver.config import UserError, to_dict
from perceiver.data.tokenizer_base import TOKENIZER_FILES, Tokenizer
from perceiver.data.tokenizers import ByteTokenizer, keep_tokenizer
from perceiver.disk import to_disk
from perceiver.inference.card import CARD, card
from perceiver.inference.graph import GRAPHS, write_graph
from perceiver.interop import transformers
from perceiver.interop.foreign import check_weights

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel

CONFIG, WEIGHTS, LISTING = "config.json", "model.safetensors", "export.json"
FORMAT, FORMAT_VERSION = "perceiver", 1
FORMATS = ("perceiver", "transformers", "onnx")
_LISTING_FORMAT, _TOKENIZER_CONFIG = "perceiver export", "tokenizer_config.json"


def export(trained: TrainedModel, folder: str | Path, format: str = "perceiver", license: str | None = None) -> Path:
    """Writes a model to a folder, which appears whole or not at all.

    Args:
        folder: must not exist yet, be empty, or hold an earlier export (unchanged, and nothing else), which is replaced:
            in one step where the file system can exchange two folders.
        format: "perceiver" (loads with `perceiver.load`), "transformers" (loads with its `from_pretrained`), or "onnx": as "perceiver",
            and besides a graph for ONNX runtimes, whose outputs have been compared (`perceiver.inference.graph`).
        license: of the weights, for the card (README.md), as the Hugging Face hub names it; None: the card states none.

    Returns:
        The folder.

    Raises:
        UserError: an unknown format, a folder with something else in it, a model that transformers has not.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r} and must be one of {', '.join(FORMATS)}")
    if not str(folder).strip():
        raise UserError("the folder to export to is empty: give its path")
    try:
        target = Path(folder).expanduser().resolve()
        _check_target(target)
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, of a user that is not there, a circle of links
        raise UserError(f"{folder} cannot be an exported folder ({_reason(error)}): choose another path") from error
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
    check_weights(weights, trained.name)
    if format == "transformers":
        config = _transformers_config(trained)
        weights = transformers.to_transformers(weights, trained.config)
    else:
        config = our_config(trained)
    described = card(trained, license)
    try:
        with _staged(target) as staged:
            (staged / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(weights, staged / WEIGHTS, metadata={"format": "pt"})
            os.chmod(staged / WEIGHTS, (staged / CONFIG).stat().st_mode)  # save_file lets the owner alone read it
            _write_tokenizer(trained.tokenizer, staged, format, config)
            (staged / CARD).write_text(described)
            if format == "onnx":
                write_graph(trained, staged)
            _write_listing(staged)
            for path in staged.iterdir():
                to_disk(path)
            _put_in_place(staged, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({_reason(error)})") from error
    return target


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked as long as an export is at work on it. What exports that were killed have left is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".export.{uuid.uuid4().hex[:8]}.tmp")
    with ExitStack() as stack:
        with ExitStack() as beginning:
            # While one begins, no other one looks: it would find a folder that is not locked yet.
            if _lock(target.parent, beginning, wait=True):
                for left in target.parent.glob(".export.*.tmp"):
                    with ExitStack() as looking:
                        if _lock(left, looking, wait=False):
                            _remove_own(left)
            staged.mkdir()
            _lock(staged, stack, wait=True)
        stack.callback(_remove_own, staged)
        yield staged


def _lock(folder: Path, stack: ExitStack, wait: bool) -> bool:
    """Locks a folder until the stack is left; False: another process has it, or the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _check_target(target: Path) -> None:
    """Refuses a folder that holds anything but an earlier export.

    Raises:
        UserError: names what is not ours.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{target} exists and is no folder: choose another one")
    if foreign := _foreign(target):
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise UserError(f"{target} holds what is not from an export, or has been changed since ({shown}): choose another folder")


def _foreign(folder: Path) -> list[str]:
    """Names in a folder that no export wrote as they are now."""
    listed = _listed(folder)
    return sorted(path.name for path in folder.iterdir() if not _is_own(path, listed))


def _is_own(path: Path, listed: dict[str, Any]) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if path.name == LISTING:
        return bool(listed)
    entry = listed.get(path.name)
    return isinstance(entry, dict) and entry.get("bytes") == path.stat().st_size and entry.get("sha256") == _sha256(path)


def _listed(folder: Path) -> dict[str, Any]:
    """The files that an export wrote, by name; none where there is no list that can be read."""
    try:
        content = json.loads((folder / LISTING).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    files = content.get("files") if isinstance(content, dict) and content.get("format") == _LISTING_FORMAT else None
    return files if isinstance(files, dict) else {}


def _write_listing(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / LISTING).write_text(json.dumps({"format": _LISTING_FORMAT, "files": files}, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put_in_place(staged: Path, target: Path) -> None:
    """Makes a written export the content of a folder that has been checked."""
    if not target.exists():
        staged.rename(target)
    elif _exchange(staged, target):
        os.chmod(target, staged.stat().st_mode)
    else:
        # File by file. Without a config.json a folder is no model to anyone: what a crash leaves is never half of each.
        listed = _listed(target)
        for name in [CONFIG, *listed]:
            if _is_own(target / name, listed):
                (target / name).unlink()
        for path in sorted(staged.iterdir(), key=lambda path: (path.name == CONFIG) - (path.name == LISTING)):
            copy = target / f".{path.name}.tmp"
            shutil.copy2(path, copy)
            to_disk(copy)
            os.replace(copy, target / path.name)
    for folder in (target, target.parent):
        to_disk(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where the system or the file system has no such operation."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove_own(folder: Path) -> None:
    """Removes a folder of which all was written by an export: its files by name, and never what someone else put there."""
    if not folder.is_dir():
        return
    listed = _listed(folder)
    # Of an export that did not get so far as to list its files.
    unlisted = {CONFIG, WEIGHTS, *TOKENIZER_FILES, _TOKENIZER_CONFIG, LISTING, CARD, *GRAPHS} if not listed else set()
    for path in list(folder.iterdir()):
        if _is_own(path, listed) or path.name in unlisted:
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def our_config(trained: TrainedModel) -> dict[str, Any]:
    """The config.json of our format."""
    tokenizer = trained.tokenizer
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": to_dict(trained.config),
        "task": to_dict(trained.task),
        "tokenizer": None if tokenizer is None else tokenizer.file or "bytes",
        **({} if trained.data.special_tokens == "text" else {"special_tokens": trained.data.special_tokens}),
        "photos": trained.photos,
        "name": trained.name,
        "provenance": trained.provenance,
    }


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder in our format; None where it is none.

    Raises:
        UserError: a version of the format that this version does not know, or a config.json that lacks something.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        return None
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {config.get('format_version')}, this version reads {FORMAT_VERSION}")
    for name, kind in (("model", dict), ("task", dict), ("photos", bool), ("name", str), ("provenance", dict)):
        if not isinstance(config.get(name), kind):
            raise UserError(f"{folder / CONFIG} is damaged: {name!r} must be {_JSON_TYPES[kind]}, not {_shown(config.get(name))}")
    if config.get("tokenizer") not in (None, "bytes", *TOKENIZER_FILES):
        known = " or ".join(TOKENIZER_FILES)
        raise UserError(f"{folder / CONFIG} is damaged: 'tokenizer' must be null, bytes, {known}, not {_shown(config['tokenizer'])}")
    if config.get("special_tokens", "text") not in ("text", "tokens"):
        raise UserError(f"{folder / CONFIG} is damaged: 'special_tokens' must be text or tokens, not {_shown(config['special_tokens'])}")
    return config


_JSON_TYPES = {dict: "an object", bool: "true or false", str: "text"}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def upload(folder: str | Path, name: str, private: bool = True) -> str:
    """Uploads an exported folder to the Hugging Face hub, and returns its address. Makes the repository if need be.

    Args:
        name: "OWNER/NAME".
        private: whether a new repository is seen by its owner alone.

    Raises:
        UserError: the folder holds no exported model, or the hub refuses or cannot be reached.
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
    except Exception as error:
        # Without a network, the errors are those of the library that the hub's own uses for HTTP.
        unreached = any(cls.__name__ in ("TransportError", "RequestException") for cls in type(error).__mro__)
        if not unreached and not isinstance(error, (HfHubHTTPError, HFValidationError, OSError)):
            raise
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
        (folder / _TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    else:
        keep_tokenizer(tokenizer, folder)


def _transformers_config(trained: TrainedModel) -> dict[str, Any]:
    config = transformers.config_to_transformers(trained.config)
    if trained.config.picture_shape() is not None:
        config["id2label"] = {str(i): name for i, name in enumerate(trained.class_names)}
        config["label2id"] = {name: i for i, name in enumerate(trained.class_names)}
    config["torch_dtype"] = str(next(trained.model.parameters()).dtype).removeprefix("torch.")
    return config


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
