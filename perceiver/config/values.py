"""Values of configuration fields: which there may be, as plain data, and back by the types of their fields.

A field holds numbers, texts, True or False, None, paths, members of an `Enum`, tuples or lists of these, or configurations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from functools import cache
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ALLOWED = "numbers, texts, True or False, None, paths, members of an Enum, tuples or lists of these, or classes derived from Config"


def field_types(cls: Any) -> dict[str, Any]:
    """The types of a class's fields; none where they name what cannot be found."""
    return _field_types(cls)


@cache
def _field_types(cls: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except Exception:  # annotations of a user's class may be anything
        return {}


def plain(value: Any) -> Any:
    """A single value as JSON-ready data: a path as its text, a member of an enum as its name; others as they are."""
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, PurePath) else value


def of_type(value: Any, hint: Any) -> Any:
    """A value of plain data as the field's type wants it; as it is where it does not fit.

    Args:
        value: numbers, texts, True or False, None, configurations, and tuples of these.
        hint: the field's annotation.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        # What fits as it is stays so: a text is no path where the field takes both.
        choices = [value, *(of_type(value, choice) for choice in args)]
        return next((made for made in choices if fits(made, hint)), value)
    if isinstance(value, tuple) and origin is list:
        return [of_type(member, args[0]) for member in value]
    if isinstance(value, tuple) and origin is tuple and args:
        if args[-1] is Ellipsis:
            return tuple(of_type(member, args[0]) for member in value)
        return tuple(map(of_type, value, args)) if len(args) == len(value) else value
    if hint is list and isinstance(value, tuple):
        return list(value)
    if isinstance(hint, type) and isinstance(value, str):
        if issubclass(hint, Enum):
            return hint.__members__.get(value, value)
        if issubclass(hint, PurePath):
            return hint(value)
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type, as far as types say what data may be there: whole numbers stand for fractions, too."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in args)
    if origin is list:
        return isinstance(value, list) and all(fits(member, args[0]) for member in value)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(member, args[0]) for member in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    if isinstance(hint, type) and (
        hint in (str, bool, list, tuple) or issubclass(hint, (Enum, PurePath)) or dataclasses.is_dataclass(hint)
    ):
        return isinstance(value, hint)
    return True


def wanted(hint: Any) -> str:
    """What a field's type allows, in words."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    if hint is bool:
        return "True or False"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        return " or ".join("None" if arg is type(None) else wanted(arg) for arg in args)
    if origin in (tuple, list) and args and (origin is list or args[-1] is Ellipsis):
        return f"a list of {wanted(args[0])}"
    if origin is tuple and args:
        return f"{len(args)} values ({', '.join(map(wanted, args))})"
    return getattr(hint, "__name__", None) or str(hint)


def short(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a number of many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def problem(value: Any, hint: Any, config: type) -> str | None:
    """Why a field's value cannot be saved and read again; None: it can.

    Args:
        hint: the field's annotation.
        config: the class of configurations, which are looked at by themselves.
    """
    if isinstance(value, type):
        return f"is the class {value.__name__} and must be an object of a class: {value.__name__}(...)"
    if (other := _not_plain(value, config)) is not None:
        return f"is {short(value)}, and an object of class {type(other).__name__} cannot be saved with a run: fields hold {ALLOWED}"
    read = value if isinstance(value, config) else of_type(_as_read(value), hint)
    if not fits(read, hint):
        in_python = wanted(hint).replace("a list of", "a tuple of") if get_origin(hint) is tuple else wanted(hint)
        return f"is {short(value)} and must be {in_python}"
    if isinstance(value, list) and isinstance(read, tuple):
        return f"is {short(value)}, a list, and must be a tuple"
    if read != value and value == value:  # NaN, which is refused by itself, is not equal to itself
        return f"is {short(value)}, which its annotation ({wanted(hint)}) does not say: annotate what it holds"
    return None


def _as_read(value: Any) -> Any:
    """A value as it comes back from a file: as plain data, sequences as tuples."""
    return tuple(map(_as_read, value)) if isinstance(value, (tuple, list)) else plain(value)


def _not_plain(value: Any, config: type) -> Any | None:
    """The first part of a value that no file of plain data can hold."""
    if isinstance(value, (tuple, list)):
        return next((found for found in (_not_plain(member, config) for member in value) if found is not None), None)
    fine = value is None or isinstance(value, (bool, int, float, str, Enum, Path, config))
    return None if fine else value


def words(value: Any) -> Sequence[str]:
    """A field's plain value as words of a command line; a sequence is as many as its members are, sequences in it, too."""
    if isinstance(value, (list, tuple)):
        return [word for member in value for word in words(member)]
    return [str(value)]
