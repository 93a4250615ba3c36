"""What all configuration is made of: keyword-only frozen dataclasses that register themselves, and plain data in and out.

A subclass of `Config` is a dataclass without a decorator, and is known by its name as soon as it is defined, wherever that is: nothing
lists the classes of a tree. The docstring under a field is its `--help` text.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

from perceiver.config.values import field_types, fits, of_type, plain, short, wanted

PACKAGE = "perceiver"
"""Modules of this package are imported for any configuration; others only for the user's own."""
_REGISTRY: dict[str, type[Config]] = {}
"""Classes by "module:Class"."""
T = TypeVar("T", bound="Config")


class UserError(Exception):
    """An error caused by the user, reported in one sentence: the field, the value, and what would be right. Exit status 2."""


class FieldError(UserError):
    """A field's value that does not fit it, with the field's place in the tree.

    Attributes:
        place: names of fields, and numbers in lists, from the root: ("callbacks", "0", "patience").
        value: what is there.
        hint: the field's annotation.
    """

    def __init__(self, message: str, place: tuple[str, ...], value: Any, hint: Any) -> None:
        super().__init__(message)
        self.place, self.value, self.hint = place, value, hint

    def inside(self, *place: str) -> FieldError:
        """The same seen from a node further up."""
        return FieldError(str(self), (*place, *self.place), self.value, self.hint)


def home() -> Path:
    """The folder for prepared data and runs by default: $PERCEIVER_HOME, or ~/perceiver."""
    return Path(os.environ.get("PERCEIVER_HOME") or "~/perceiver").expanduser()


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """A node of a configuration tree. Every subclass becomes a frozen, keyword-only dataclass and is registered."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_names(cls)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        _REGISTRY[type_name(cls)] = cls

    def check(self, where: str) -> None:
        """Checks the node's own values; called on every node of an experiment before anything starts.

        Args:
            where: the node's place in the tree with a dot at its end, "optim." say: a message names `f"{where}lr"`.

        Raises:
            UserError: names the field, its value and what would be right.
        """

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a saved node as this version has them. Overridden where a field was renamed or moved."""
        return values


def _check_names(cls: type) -> None:
    """Raises UserError where a class has a field that no file could hold, or a default that would not count."""
    annotated = cls.__dict__.get("__annotations__", {})
    if "type" in annotated:
        raise UserError(f"{cls.__name__} has a field type, which is what files call the class itself: give it another name")
    inherited = {f.name: f for base in cls.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    if silent := [name for name in cls.__dict__ if name in inherited and name not in annotated]:
        name = silent[0]
        raise UserError(
            f"{cls.__name__}.{name} is set without a type, so the field {name} of its base class would keep its own default: "
            f"write `{name}: {getattr(inherited[name].type, '__name__', inherited[name].type)} = ...`"
        )


def type_name(cls: type) -> str:
    """How a class is named in saved data: "module:Class". A script that is run goes by the name that others import it by."""
    module = cls.__module__
    if module == "__main__" and (file := getattr(sys.modules["__main__"], "__file__", None)):
        module = Path(file).stem
    return f"{module}:{cls.__qualname__}"


def is_builtin(name: str) -> bool:
    """Whether a "module:Class" is of this package."""
    return name.partition(":")[0].partition(".")[0] == PACKAGE


# ------------------------------------------------------------------------------------------------- to and from plain data


def to_dict(config: Any) -> Any:
    """A configuration tree as JSON-ready data; a node carries its class as "type": "module:Class"."""
    if isinstance(config, Config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type_name(type(config))} | fields
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return plain(config)


def from_dict(data: Any, *, foreign: bool = False) -> Any:
    """The inverse of `to_dict`. Unknown fields are refused, missing ones take their defaults.

    Args:
        foreign: the data came with downloaded weights or from anybody else: nothing outside this package is imported for it.
            Classes that the program has imported by itself are used.

    Raises:
        UserError: data of another shape, a class that cannot be found or may not be imported, an unknown field.
    """
    if isinstance(data, dict):
        values = dict(data)
        cls = find_type(values.pop("type", None), foreign=foreign)
        values = cls.upgrade(values)
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"{cls.__name__} has no field {', '.join(map(str, unknown))}{nearest(str(unknown[0]), known)} in this version")
        hints, made = field_types(cls), dict[str, Any]()
        for name, value in values.items():
            hint = hints.get(name, Any)
            try:
                made[name] = of_type(from_dict(value, foreign=foreign), hint)
            except FieldError as error:
                raise error.inside(name) from None
            if not fits(made[name], hint):
                message = f"{cls.__name__}.{name} is {short(made[name])} and must be {wanted(hint)}"
                raise FieldError(message, (name,), made[name], hint)
        try:
            return cls(**made)
        except TypeError as error:
            raise UserError(f"saved {cls.__name__} is incomplete or damaged ({error})") from None
    if isinstance(data, list):
        return tuple(_member(number, value, foreign) for number, value in enumerate(data))
    return data


def _member(number: int, value: Any, foreign: bool) -> Any:
    try:
        return from_dict(value, foreign=foreign)
    except FieldError as error:
        raise error.inside(str(number)) from None


def load_tree(data: Any, cls: type[T], what: str, *, foreign: bool = False) -> T:
    """`from_dict` for data from a file, which may be anything.

    Args:
        what: how messages call the file.

    Raises:
        UserError: it does not hold a `cls`; see `from_dict`.
    """
    try:
        config = from_dict(data, foreign=foreign)
    except FieldError as error:
        raise FieldError(f"{what}: {error}", error.place, error.value, error.hint) from None
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except RecursionError:
        raise UserError(f"{what}: it is nested too deep for a configuration") from None
    if not isinstance(config, cls):
        raise UserError(f"{what}: it holds no {cls.__name__}")
    return config


def find_type(name: Any, *, foreign: bool = False) -> type[Config]:
    """The class of a saved node: "module:Class", or the bare name of one of this package's classes (as version 0.1 wrote them).

    Raises:
        UserError: there is no such class, or it may not be imported.
    """
    if not isinstance(name, str):
        raise UserError(f"a configuration needs a type, not {name!r}")
    if name in _REGISTRY:
        return _REGISTRY[name]
    module, colon, short = name.partition(":")
    if not colon or is_builtin(name):
        # A class of this package may have moved since: its bare name is what counts.
        return _builtin(short or module, name)
    if foreign:
        raise UserError(
            f"configuration of type {name!r} is not part of {PACKAGE}, and nothing is imported for a configuration that comes "
            f"with foreign weights: import {module} first if you trust it"
        )
    try:
        importlib.import_module(module)
    except Exception as error:  # the user's module may fail in any way
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(f"configuration of type {name!r} cannot be loaded: {kind}{error}") from None
    if name not in _REGISTRY:
        raise UserError(f"module {module} has no configuration class {short}")
    return _REGISTRY[name]


def look_here() -> None:
    """Lets modules be found in the working folder, as `python -m` does and a console script does not; last, so that they hide nothing."""
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _builtin(short: str, name: str) -> type[Config]:
    found = [cls for key, cls in _REGISTRY.items() if is_builtin(key) and cls.__name__ == short]
    if not found:
        import_builtins()
        found = [cls for key, cls in _REGISTRY.items() if is_builtin(key) and cls.__name__ == short]
    if not found:
        raise UserError(f"configuration of type {name!r} is not known to this version")
    return found[0]


def import_builtins() -> None:
    """Imports all modules of this package that define tasks, models and their parts, and callbacks, so that they are registered."""
    for room in ("tasks", "models"):
        package = importlib.import_module(f"{PACKAGE}.{room}")
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{PACKAGE}.{room}.{found.name}")
    for module in ("callbacks", "mlflow_tracker", "wandb_tracker"):
        importlib.import_module(f"{PACKAGE}.training.{module}")


def subclasses(base: type[T]) -> dict[str, type[T]]:
    """All registered subclasses of a class: this package's by bare name in lower case ("adamw"), others by "module:Class"."""
    return {
        cls.__name__.lower() if is_builtin(name) else name: cls
        for name, cls in sorted(_REGISTRY.items())
        if issubclass(cls, base) and cls is not base
    }


# -------------------------------------------------------------------------------------------------------- trees as a whole


def nodes(config: Any, where: str = "") -> Iterator[tuple[str, Config]]:
    """All nodes of a tree with their places ("", "model.", "model.encoder.", "callbacks.0.", ...), parents first."""
    if isinstance(config, Config):
        yield where, config
        for f in dataclasses.fields(config):
            yield from nodes(getattr(config, f.name), f"{where}{f.name}.")
    elif isinstance(config, (tuple, list)):
        for number, value in enumerate(config):
            yield from nodes(value, f"{where}{number}.")


def spelled(name: str) -> str:
    """A dotted field name as the user types it after `--`."""
    return name.replace("_", "-")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts, and lists of dicts, as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat |= flatten({str(number): item for number, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(data: Any, length: int = 12) -> str:
    """A short stable hash of JSON-ready data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `field: old -> new` for two flat dicts."""
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]


def _shortens(short: str, name: str) -> bool:
    """Whether the letters of a name are, in their order, among those of another."""
    letters = iter(name)
    return all(letter in letters for letter in short)


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The words ", did you mean ...?" for a name that is not among `names`; a dotted name may be near in its last part alone."""
    known = list(names)
    own = name.rpartition(".")[2]
    initials = "".join(word[0] for word in re.split("[_-]", own) if word)
    found = [n for n in known if len(initials) > 1 and n.rpartition(".")[2] == initials]  # learning_rate: lr
    if not found:
        # Shortened names before others that are less than one letter off: val_acuracy is val_acc, not val_auroc.
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
        found = difflib.get_close_matches(name, close, n=1, cutoff=0.9) or sorted(close, key=lambda n: not _shortens(n, name))
    if not found:
        last = {n.rpartition(".")[2]: n for n in known}
        found = [last[n] for n in difflib.get_close_matches(own, list(last), n=1, cutoff=0.6)]
    return f", did you mean {prefix}{spelled(found[0]) if prefix else found[0]}?" if found else ""
