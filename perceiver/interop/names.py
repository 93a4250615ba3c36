"""Renaming the entries of state dicts and the fields of configurations. All functions are pure."""

import re
from typing import Any

from torch import Tensor

from perceiver.config import Config, UserError

StateDict = dict[str, Tensor]
Rules = tuple[tuple[str, str | None], ...]
"""Pairs (pattern of a name's beginning, replacement): the first that fits is applied; None drops the entry."""


def rename(state_dict: StateDict, top: Rules, layer: Rules, origin: str) -> StateDict:
    """Renames the beginning of each name by `top`, and what is left of an attention layer's name by `layer`."""
    renamed: StateDict = {}
    for name, tensor in state_dict.items():
        match, replacement = _first_match(top, name)
        if match is None:
            raise UserError(f"weight {name!r} belongs to no Perceiver of {origin} that can be read")
        if replacement is None:
            continue
        rest = name[match.end() :]
        if "attention" in match.group() + replacement:
            inner, inner_replacement = _first_match(layer, rest)
            if inner is None or inner_replacement is None:
                raise UserError(f"weight {name!r} belongs to no attention layer of {origin} that can be read")
            rest = inner.expand(inner_replacement) + rest[inner.end() :]
        renamed[match.expand(replacement) + rest] = tensor
    return renamed


def _first_match(rules: Rules, name: str) -> tuple[re.Match[str] | None, str | None]:
    for pattern, replacement in rules:
        if match := re.match(pattern, name):
            return match, replacement
    return None, None


def take(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Moves the named values out of a dict, under new names; what is not there is left to its default."""
    return {new: values.pop(old) for old, new in names.items() if old in values}


def build(cls: type[Config], values: dict[str, Any]) -> Any:
    """A configuration of ours from the values of a reference's, whose lists are tuples here."""
    unknown = sorted(set(values) - set(cls.__dataclass_fields__))
    if unknown:
        raise UserError(f"a reference configuration for {cls.__name__} has an unknown field {', '.join(unknown)}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
