"""Checks of configurations: of whole trees, and those that many fields share."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from perceiver.config.core import Config, UserError, nodes, spelled
from perceiver.config.values import field_types, problem


def check_tree(config: Config) -> None:
    """Checks every node: numbers are finite and of a sane size, strings are not empty where None is meant, and `Config.check`.

    Raises:
        UserError: the first field that cannot be right.
    """
    for where, node in nodes(config):
        for f in dataclasses.fields(node):
            _check_value(spelled(f"{where}{f.name}"), getattr(node, f.name), f.default)
    check_nodes(config)


def check_values(config: Config) -> None:
    """Checks that every field's value can be saved with a run and read again.

    Raises:
        UserError: the first that cannot: names the field and what may be there.
    """
    for where, node in nodes(config):
        hints = field_types(type(node))
        for f in dataclasses.fields(node):
            if (why := problem(getattr(node, f.name), hints.get(f.name, Any), Config)) is not None:
                raise UserError(f"{type(node).__name__}: {spelled(where + f.name)} {why}")


def check_nodes(config: Config, where: str = "") -> None:
    """Calls `check` of all nodes, the parts of a node before itself: it may then rely on them.

    Raises:
        UserError: names the field, its value, and what would be right.
    """
    for place, node in reversed(list(nodes(config, where))):
        node.check(place)


def _check_value(name: str, value: Any, default: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value} and must be a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name} is {value} and must be below 2^63")
    if isinstance(value, str) and not value.strip() and default is None:
        raise UserError(f"--{name} is empty: give a value, or leave it out (is a variable of the shell not set?)")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} is {value!r:.80} and must hold no NUL character")
    if isinstance(value, tuple):
        for member in value:
            _check_value(name, member, dataclasses.MISSING)


def check_folder_name(field: str, name: str) -> None:
    """Checks the name of a folder that is made inside another one.

    Raises:
        UserError: it would lie elsewhere, or cannot be a name on every machine and in Ray.
    """
    if not re.fullmatch(r"[A-Za-z0-9_@+=,%~-][A-Za-z0-9_@+=,%~. -]{0,199}", name):
        raise UserError(
            f"{field} is {name!r} and must be a plain folder name: at most 200 letters (a-z), digits and ._- without / and "
            "no . at the beginning"
        )


def check_positive(node: Config, where: str, *names: str) -> None:
    """Raises UserError for the first of a node's fields that is a number below 1."""
    for name in names:
        value = getattr(node, name)
        if value is not None and value < 1:
            raise UserError(f"{spelled(where + name)} is {value} and must be at least 1")
