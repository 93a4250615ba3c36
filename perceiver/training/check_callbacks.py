"""Whether callbacks of the user's keep their contracts, as far as that is known before a worker is held."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from perceiver.config import CallbackConfig, UserError, type_name
from perceiver.config.core import is_builtin
from perceiver.tasks.check_calls import call, name_of, shape_of
from perceiver.training.callbacks import Callback
from perceiver.training.hooks import whole_state

UNKNOWN = (AttributeError, TypeError)
"""What a state may raise before `on_start`, where it is of things that are made there: it says nothing."""


def check_callbacks(configs: Sequence[CallbackConfig]) -> None:
    """Builds each callback of the user's, looks at its hooks, and carries its first state from one to another.

    Raises:
        UserError: `build` fails or returns something else, a hook cannot take what it is called with, or the state is none or cannot be
            saved or restored.
    """
    for config in configs:
        if not is_builtin(type_name(type(config))):
            _check(config)


def _check(config: CallbackConfig) -> None:
    first, second = _built(config), _built(config)
    for hook, function in vars(Callback).items():
        if hook.startswith("_") or not inspect.isfunction(function):
            continue
        names = list(inspect.signature(function).parameters)[1:]
        try:
            inspect.signature(getattr(first, hook)).bind(*names)
        except TypeError:
            raise UserError(f"{name_of(first)}.{hook} must take ({', '.join(['self', *names])})") from None
        except ValueError:  # of a callable that has no signature
            continue
    state = _called(first, "state_dict")
    if state is None or (isinstance(state, dict) and not state):
        return
    if not isinstance(state, dict):
        raise UserError(f"{name_of(first)}.state_dict returned {shape_of(state)} and must return a dict")
    _called(second, "load_state_dict", whole_state(state, f"{name_of(first)}.state_dict()"))


def _built(config: CallbackConfig) -> Callback:
    built = call(config, "build")
    if not isinstance(built, Callback):
        raise UserError(f"{name_of(config)}.build returned {shape_of(built)} and must return a perceiver.training.callbacks.Callback")
    return built


def _called(callback: Callback, method: str, *args: Any) -> Any:
    try:
        return call(callback, method, *args)
    except UserError as error:
        if isinstance(error.__cause__, UNKNOWN):
            return None
        raise
