"""Tensors in files of others, by name: .safetensors, and PyTorch's by its restricted reader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver.config import UserError
from perceiver.interop.archives import check_unpacked
from perceiver.interop.foreign import check_weights, first_line


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
        raise UserError(f"{path} is no safetensors file, or a damaged one ({first_line(error)})") from None


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
            raise UserError(f"{path} is no safetensors file, or a damaged one ({first_line(error)})") from None
    check_unpacked(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors, or is damaged: it is not loaded") from None
    except Exception as error:  # what a damaged pickle makes its reader raise can be anything
        raise UserError(f"{path} is no file of PyTorch weights, or a damaged one ({first_line(error)})") from None
    return by_name(content, path)


def by_name(content: Any, path: Path) -> dict[str, Tensor]:
    """What was read from a file, if that is tensors by name.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise UserError(f"{path} holds more than weights by name")
    return content
