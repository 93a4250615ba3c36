"""JSON Schema of experiment files, from the classes of the configuration: editors complete and check by it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from enum import Enum
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from perceiver.config.core import Config, import_builtins, is_builtin, subclasses, to_dict, type_name
from perceiver.config.experiment import Experiment

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def experiment_schema(presets: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema of a file that holds an experiment, or a preset and what differs from it.

    Args:
        presets: names that are offered for `preset`; any other is allowed, too.
    """
    import_builtins()
    definitions: dict[str, Any] = {}
    schema = _node(Experiment, definitions)
    preset = {
        "type": "string",
        "description": "What the file starts from: a preset, FILE.py:FUNCTION, MODULE:FUNCTION, a run's folder, or another such file.",
        "anyOf": [{"enum": list(presets)}, {"type": "string"}],
    }
    return {
        "$schema": DIALECT,
        "title": "An experiment, or a preset and what differs from it",
        **schema,
        "properties": {**schema["properties"], "preset": preset},
        "anyOf": [{"required": ["preset"]}, {"required": ["task", "model"]}],
        "$defs": definitions,
    }


def _node(cls: type[Config], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class's own fields. None is required: a file may say only what differs."""
    hints, documents = get_type_hints(cls), field_documents(cls)
    properties: dict[str, Any] = {"type": {"enum": _names(cls), "description": (cls.__doc__ or "").partition("\n")[0]}}
    for field in dataclasses.fields(cls):
        found = _of_type(hints[field.name], definitions)
        if text := documents.get(field.name):
            found = {**found, "description": text}
        if field.default is not dataclasses.MISSING and not isinstance(field.default, Config):
            found = {**found, "default": to_dict(field.default)}
        properties[field.name] = found
        if "_" in field.name:
            properties[field.name.replace("_", "-")] = {**found, "deprecated": True}  # allowed, and not what is offered
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _of_type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field's values."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, UnionType):
        return {"anyOf": [_of_type(arg, definitions) for arg in args]}
    if origin in (tuple, list):
        if len(args) == 2 and args[1] is Ellipsis or origin is list and args:
            return {"type": "array", "items": _of_type(args[0], definitions)}
        members = [_of_type(arg, definitions) for arg in args]
        return (
            {"type": "array", "prefixItems": members, "minItems": len(members), "maxItems": len(members)} if members else {"type": "array"}
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": list(hint.__members__)}
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return {"type": "string"}
    if isinstance(hint, type) and issubclass(hint, Config):
        return {"$ref": f"#/$defs/{_define(hint, definitions)}"}
    return {"type": _PLAIN[hint]} if hint in _PLAIN else {}


def _define(cls: type[Config], definitions: dict[str, Any]) -> str:
    """Defines what may stand where a class is asked for: itself or any subclass, by its "type"; returns its name there."""
    name = cls.__name__
    if name in definitions:
        return name
    definitions[name] = {}  # known before its parts, which may hold it again
    kinds = [sub for sub in subclasses(cls).values() if not inspect.isabstract(sub)]
    if not kinds:
        definitions[name] = _node(cls, definitions)
        return name
    if dataclasses.fields(cls) and cls not in kinds:
        kinds = [cls, *kinds]
    # A class of a user's is not known here: any mapping with its "type" is allowed.
    own = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string", "pattern": "^(?!perceiver\\.).+:.+$"}}}
    definitions[name] = {"anyOf": [*(_node(kind, definitions) for kind in kinds), own]}
    return name


def _names(cls: type[Config]) -> list[str]:
    """How a class may be named in a file."""
    name = type_name(cls)
    return [name.partition(":")[2], name] if is_builtin(name) else [name]


def field_documents(cls: type[Config]) -> dict[str, str]:
    """The docstrings that stand under the fields of a class and of those that it is made from."""
    found: dict[str, str] = {}
    bases: list[Any] = [base for base in reversed(cls.__mro__) if issubclass(base, Config) and base is not Config]
    for base in bases:
        found.update(_own_documents(base))
    return found


@functools.cache
def _own_documents(cls: type[Any]) -> dict[str, str]:
    """The docstrings under the fields that a class itself defines. Kept, as finding a class's source parses its whole file."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # typed in, or its file has gone
        return {}
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                found[field.target.id] = " ".join(text.value.value.split())
    return found
