"""How a user's methods are called to be tried: what they raise, and results of the wrong kind, become one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from perceiver.config import UserError, type_name
from perceiver.config.core import is_builtin
from perceiver.extensions import place_of
from perceiver.models.tensor_shapes import WrongTensor


def call(owner: Any, method: str, *args: Any) -> Any:
    """What a method of the user's returns.

    Raises:
        UserError: there is no such method, or it fails: with file and line, and the shapes of a batch that it was given.
    """
    function: Callable[..., Any] | None = getattr(owner, method, None)
    if function is None:
        raise UserError(f"{name_of(owner)} needs a method {method}")
    try:
        return function(*args)
    except WrongTensor as error:
        raise UserError(f"{name_of(owner)}.{method} fails: {error}") from error
    except UserError:
        raise
    except Exception as error:
        if (lacks := _lacks(error)) is not None:
            raise UserError(lacks) from error
        shapes = f" (batch: {_shapes(args)})" if _shapes(args) else ""
        raise UserError(f"{name_of(owner)}.{method} fails: {_first_line(place_of(error))}{shapes}") from error


def tried(owner: Any, method: str, *args: Any) -> Any:
    """The same of an object that may be of this package: faults of its own are no mistakes of the user's and pass as they are."""
    return getattr(owner, method)(*args) if is_builtin(type_name(type(owner))) else call(owner, method, *args)


def _lacks(error: Exception) -> str | None:
    """The sentence for a class that lacks a method of its base class; None: the error is another one."""
    if isinstance(error, NotImplementedError) and " needs a method " in str(error):
        return str(error)
    found = re.search(r"abstract class '?(\w+)'? (?:with|without an implementation for) abstract methods? (.+)", str(error))
    if found is None or not isinstance(error, TypeError):
        return None
    methods = found[2].replace("'", "").split(", ")
    return f"{found[1]} needs a method {methods[0]}" if len(methods) == 1 else f"{found[1]} needs the methods {', '.join(methods)}"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _shapes(args: tuple[Any, ...]) -> str:
    batches = [arg for arg in args if isinstance(arg, dict)]
    return ", ".join(f"{name} {tuple(value.shape)}" for batch in batches for name, value in batch.items() if isinstance(value, Tensor))


def shape_of(value: Any) -> str:
    """A value as a message describes it: "a tensor of shape (2, 3) and type torch.float32", "an int"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return "None" if value is None else with_article(name_of(value))


def with_article(word: str) -> str:
    """A word with "a" or "an" before it."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def name_of(value: Any) -> str:
    """The name of a value's class."""
    return type(value).__name__
