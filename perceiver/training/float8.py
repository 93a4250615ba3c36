"""Products of linear layers in float8, by torchao (arXiv 2209.05433): inputs, weights and gradients are scaled as whole tensors and rounded
to 8 bits where they are multiplied; all else is as in bf16. Weights stay what they are, and keep their names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from perceiver.config import UserError

PACKAGE = "torchao"
MULTIPLE = 16
"""Channels in and out of a layer whose products the units of GPUs take."""
CAPABILITY = (8, 9)
"""The least compute capability with units for float8 (L4, L40S, H100 and later)."""


def check_package(field: str) -> None:
    """Raises UserError where torchao is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(f"{field} is 'float8', which needs torchao: pip install 'perceiver-ray[float8]'")


def use_float8(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Makes linear modules inside of layers multiply in float8; of others, such as an output over a vocabulary, and of those whose channels
    are no multiples of 16, it makes nothing. On a CPU the same rounding is done in other types, which is slow: for tests, and to evaluate
    what was trained on GPUs.

    Raises:
        UserError: torchao is missing, or the device has no units for it.
    """
    check_package("--training.precision")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(f"--training.precision is 'float8', for which {torch.cuda.get_device_name(device)} has no units: use bf16")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig(), emulate=device.type == "cpu")
    for layer in layers:
        convert_to_float8_training(layer, config=config, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
