"""Checks of configurations and weights from elsewhere: nothing is built and nothing is believed before it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver.config import ModelConfig, UserError, flatten, load_tree, to_dict, type_name
from perceiver.config.core import is_builtin
from perceiver.models import build_model, check_model

_MOST_BLOCKS = 4096
"""Self-attention blocks of a model from elsewhere: they can share one set of weights, whose number then sets no limit."""


_MOST_CONSTANTS = 2**30
"""Numbers in the constants of a model from elsewhere (features of positions), which no weight has the size of."""


@contextmanager
def in_one_sentence(file: Path) -> Iterator[None]:
    """Says of a file from elsewhere that it is none of ours where its content has another shape than it should have."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file} describes no model that can be read: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, RuntimeError) as error:
        raise UserError(f"{file} describes no model that can be read ({first_line(error)})") from None


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
        raise UserError(f"{file} does not hold the weights of its configuration ({first_line(error)})") from None
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


def first_line(error: Exception) -> str:
    """What an error says, in one line; of one that says nothing, its class."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
