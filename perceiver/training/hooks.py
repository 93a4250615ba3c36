"""Calls the callbacks of a training: finds those that fail or do not return, keeps their states in the checkpoints."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perceiver.checkpoints import DamagedCheckpoint
from perceiver.config import CallbackConfig, UserError, type_name
from perceiver.training.callbacks import Callback, TrainingView

logger = logging.getLogger(__name__)

STATES = "callbacks.state"
"""File of a checkpoint, in the safetensors format, with the states of the callbacks. Missing where none has a state."""
PATIENCE = 60.0
"""Seconds after which a hook that has not returned is reported, and reported again after twice as long."""
_TENSOR = "__tensor__"


class CallbackError(UserError):
    """An exception in a hook of a user's callback. It may be raised on one worker alone."""


class Callbacks:
    """All callbacks of a training.

    Args:
        training: what they see of it.
        own: those of the job that runs the training. Their exceptions pass as they are, and they have no state.
        configs: the experiment's.
    """

    def __init__(self, training: TrainingView, own: Sequence[Callback], configs: Sequence[CallbackConfig]) -> None:
        self._own = list(own)
        self._users: list[tuple[str, Callback]] = []
        self._running: tuple[str, float] | None = None
        self._closed = threading.Event()
        for config in configs:
            name = type_name(type(config))
            callback = self._guarded(name, type(config), "build", config.build)
            if not isinstance(callback, Callback):
                raise UserError(f"callback {name}: build() returned {type(callback).__name__}, which is no subclass of Callback")
            self._users.append((name, callback))
            for wrong, right in misspelt(callback) if training.world.rank == 0 else ():
                logger.warning("callback %s has a method %s, which is no hook and is never called: did you mean %s?", name, wrong, right)
        for callback in self._all():
            callback.training = training
        self._watch = threading.Thread(target=self._watch_hooks, name="callbacks", daemon=True)
        self._watch.start()

    def call(self, hook: str, *args: Any) -> None:
        """Calls a hook of all callbacks, the job's own last: what they pass on is then complete.

        Raises:
            CallbackError: a user's callback fails.
        """
        for name, callback in self._users:
            self._guarded(name, type(callback), hook, getattr(callback, hook), *args)
        for callback in self._own:
            self._timed(f"{type(callback).__name__}.{hook}", getattr(callback, hook), *args)

    def end(self, step: int, metrics: dict[str, float], error: BaseException | None) -> None:
        """Calls `on_end`, after which no hook is called any more. After an error it raises none of its own."""
        try:
            self.call("on_end", step, metrics, error)
        except Exception as other:
            if error is None:
                raise
            logger.warning("%s", other)
        finally:
            self._closed.set()

    def states(self) -> list[dict[str, Any]]:
        """Name and state of each callback that has one. Called on all workers."""
        states = []
        for name, callback in self._users:
            if state := self._guarded(name, type(callback), "state_dict", callback.state_dict):
                if not isinstance(state, dict):
                    raise CallbackError(f"callback {name}: state_dict() returned {type(state).__name__} instead of a dict")
                states.append({"type": name, "state": _whole(state, f"callback {name}: state_dict()")})
        return states

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Gives each callback its state: of several of a class in their order."""
        rest = list(states)
        for name, callback in self._users:
            saved = next((entry for entry in rest if entry["type"] == name), None)
            if saved is not None:
                rest.remove(saved)
                self._guarded(name, type(callback), "load_state_dict", callback.load_state_dict, saved["state"])

    def _all(self) -> list[Callback]:
        return [*(callback for _, callback in self._users), *self._own]

    def _guarded(self, name: str, cls: type, hook: str, function: Any, *args: Any) -> Any:
        try:
            return self._timed(f"{name}.{hook}", function, *args)
        except UserError:
            raise
        except Exception as error:
            if _is_of_the_group(error):
                raise
            raise CallbackError(f"callback {name} fails in {hook} ({_place(error, cls)}): {_first_line(error)}") from error

    def _timed(self, what: str, function: Any, *args: Any) -> Any:
        self._running = (what, time.monotonic())
        try:
            return function(*args)
        finally:
            self._running = None

    def _watch_hooks(self) -> None:
        reported: tuple[tuple[str, float], float] | None = None
        while not self._closed.wait(min(1.0, PATIENCE / 4)):
            running = self._running
            if running is None:
                continue
            patience = 2 * reported[1] if reported is not None and reported[0] == running else PATIENCE
            if time.monotonic() - running[1] > patience:
                logger.warning("callback %s has not returned for %.0f s: the training waits for it", running[0], patience)
                reported = (running, patience)


def misspelt(callback: Callback) -> list[tuple[str, str]]:
    """Methods of a user's callback that are named almost like a hook, each with that hook."""
    hooks = [name for name in vars(Callback) if not name.startswith("_") and callable(getattr(Callback, name))]
    own = {name for cls in type(callback).__mro__ if issubclass(cls, Callback) for name in vars(cls) if not name.startswith("_")}
    near = ((name, difflib.get_close_matches(name, hooks, n=1, cutoff=0.85)) for name in sorted(own - set(hooks)))
    return [(name, found[0]) for name, found in near if found]


def _place(error: Exception, cls: type) -> str:
    """File and line that an error comes from: in the file of the callback's class if it passed there, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    try:
        own = [frame for frame in frames if Path(frame.filename) == Path(inspect.getfile(cls))]
    except (TypeError, OSError):
        own = []
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _is_of_the_group(error: Exception) -> bool:
    """Whether it was raised by a collective operation, because another worker is lost: then the run restarts."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(torch.distributed.__file__).parent in Path(frame.filename).parents


# ---------------------------------------------------------------------------------------------------------------- states


def _whole(value: Any, what: str) -> Any:
    """A state with its tensors as whole copies on the CPU.

    Raises:
        CallbackError: something in it can be no part of a state.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        return value.cpu().clone()
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str) or key == _TENSOR]:
            raise CallbackError(f"{what} has the key {wrong[0]!r}: keys are strings")
        return {key: _whole(member, f"{what}[{key!r}]") for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(member, f"{what}[{number}]") for number, member in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CallbackError(f"{what} is a {type(value).__name__}: a state is made of dicts, lists, numbers, strings and tensors")


def pack(content: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, and a text with all else, for the file `STATES`."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name := f"{len(tensors):06d}"] = value
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {key: plain(member) for key, member in value.items()}
        return [plain(member) for member in value] if isinstance(value, list) else value

    text = json.dumps(plain(content))
    return tensors, {"state": text}


def read_states(checkpoint: Path) -> dict[str, Any]:
    """What `pack` made of a checkpoint's callbacks; empty where it has none.

    Raises:
        DamagedCheckpoint: the file is not what `pack` gives.
    """
    path = checkpoint / STATES
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            content = json.loads(file.metadata()["state"], object_hook=lambda node: tensors[node[_TENSOR]] if _TENSOR in node else node)
        if not all(isinstance(entry["type"], str) and isinstance(entry["state"], dict) for entry in content["callbacks"]):
            raise TypeError
        return content
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {checkpoint.name} is damaged: {path} holds no states of callbacks") from error
