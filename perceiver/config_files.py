"""Experiments as files that people write: a preset and what differs from it, as YAML or JSON; mistakes are named with their lines."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from perceiver.config import Config, Experiment, UserError, load_tree, nearest, to_dict
from perceiver.config.core import PACKAGE, FieldError, find_type, import_builtins, is_builtin, look_here, subclasses
from perceiver.config.values import field_types, short, wanted
from perceiver.disk import read_json, whole_file

if TYPE_CHECKING:
    from yaml import MappingNode, Node

PRESET = "preset"
"""Key of what a file starts from."""
YAML = (".yaml", ".yml")
"""Endings of such files."""
MOST_LISTED = 15
"""Fields that a message lists where none is spelled like the one that does not exist."""
Lines = dict[tuple[str, ...], int]
"""Lines of a file's keys, by their places in the tree."""


@dataclasses.dataclass(frozen=True)
class ExperimentFile:
    """A file that holds an experiment, or what differs from one."""

    path: Path
    content: dict[str, Any]
    lines: Lines

    @property
    def base(self) -> str | None:
        """What it starts from, as it is found by `find_experiment`; None: it holds a whole experiment."""
        base = self.content.get(PRESET)
        return base if "type" not in self.content and isinstance(base, str) and base else None

    @property
    def says_nothing_more(self) -> bool:
        """Whether it is its base and nothing else."""
        return not self.content.keys() - {PRESET}

    def experiment(self, base: Experiment | None) -> Experiment:
        """The experiment.

        Args:
            base: what the file starts from, where it names that.

        Raises:
            UserError: a key that is no field, with its line and the nearest name; a value that does not fit its field.
        """
        changes = {key: value for key, value in self.content.items() if key != PRESET}
        if base is None:
            whole = self._checked({"type": "Experiment", **self.content}, (), Experiment)
        else:
            whole = self._merged(to_dict(base), changes, ())
        try:
            return load_tree(whole, Experiment, str(self.path))
        except FieldError as error:
            raise self.error(error.place, f"is {short(error.value)} and must be {_expected(error.hint)}") from None

    def line(self, place: tuple[str, ...]) -> int | None:
        """The line of a field, or of the nearest node above it that the file has; None: it has neither, or is no YAML."""
        lines = {tuple(name.replace("-", "_") for name in where): line for where, line in self.lines.items()}
        return next((lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in lines), None)

    def error(self, place: tuple[str, ...], what: str) -> UserError:
        """A mistake in a field, with its line."""
        line = self.line(tuple(name.replace("-", "_") for name in place))
        return UserError(f"{self.path}{'' if line is None else f', line {line}'}: {'.'.join(place)} {what}")

    def _merged(self, tree: dict[str, Any], changes: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
        """A saved tree with some of its fields changed. A node of another "type" takes none of the old one's fields."""
        result, hints = dict(tree), field_types(find_type(tree["type"]))
        for key, value in changes.items():
            name, here = str(key).replace("-", "_"), (*place, str(key))
            if name not in tree and name != "type":
                raise self._unknown(here, [field for field in tree if field != "type"])
            old = tree.get(name)
            if isinstance(value, dict) and isinstance(old, dict) and _same_type(value.get("type", old["type"]), old["type"]):
                result[name] = self._merged(old, {k: v for k, v in value.items() if k != "type"}, here)
            else:
                result[name] = self._checked(value, here, hints.get(name, Any))
        return result

    def _checked(self, value: Any, place: tuple[str, ...], hint: Any) -> Any:
        """A part of the file that stands for itself, with its keys as fields are spelled. `hint`: annotation of its field."""
        if isinstance(value, list):
            member = next(iter(get_args(hint)), Any)
            return [self._checked(part, (*place, str(number)), member) for number, part in enumerate(value)]
        if not isinstance(value, dict):
            return value
        cls = self._type(value["type"], (*place, "type"), hint) if isinstance(value.get("type"), str) else None
        hints = {} if cls is None else field_types(cls)
        names = {key: str(key).replace("-", "_") for key in value}
        plain = {name: self._checked(value[key], (*place, str(key)), hints.get(name, Any)) for key, name in names.items()}
        if cls is not None:
            fields = [field.name for field in dataclasses.fields(cls)]
            kept = cls.upgrade({name: member for name, member in plain.items() if name != "type"})  # without those that were renamed
            for key, name in names.items():
                if name != "type" and name not in fields and name in kept:
                    raise self._unknown((*place, str(key)), fields)
        return plain

    def _type(self, name: str, place: tuple[str, ...], hint: Any) -> type[Config]:
        """The class of a "type" in the file."""
        look_here()
        try:
            return find_type(name)
        except UserError as error:
            if ":" in name:
                raise self.error(place, f"is {name!r}: {error}") from None
            kinds = _kinds(hint)
            close = [kind for kind in kinds if kind.lower() == name.lower()]
            near = f", did you mean {close[0]}?" if close else nearest(name, kinds)
            listed = f"; there are {', '.join(kinds)}" if kinds else ""
            raise self.error(place, f"is {name!r}, and there is no such class{near}{listed}, and yours as MODULE:CLASS") from None

    def _unknown(self, place: tuple[str, ...], known: list[str]) -> UserError:
        name = place[-1].replace("-", "_")
        line = f", line {self.lines[place]}" if place in self.lines else ""
        return UserError(f"{self.path}{line}: field {'.'.join(place)} does not exist{nearest(name, known) or _some(known)}")


def read_experiment_file(path: Path) -> ExperimentFile:
    """Reads a .json or .yaml file.

    Raises:
        UserError: it cannot be read, or holds no experiment and nothing to start from.
    """
    content, lines = (read_json(path), {}) if path.suffix == ".json" else _read_yaml(path)
    if "experiment" in content:  # as it lies in a run
        content, lines = content["experiment"], {place[1:]: line for place, line in lines.items()}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no experiment: a mapping with task, model, data, ... or preset is expected")
    if not {"type", "task", PRESET} & content.keys():
        fields = [PRESET, *(field.name for field in dataclasses.fields(Experiment) if field.name != PRESET)]
        for key in content:
            if str(key).replace("-", "_") not in fields and (near := nearest(str(key), fields)):
                line = f", line {lines[(str(key),)]}" if (str(key),) in lines else ""
                raise UserError(f"{path}{line}: field {key} does not exist{near}")
        raise UserError(f"{path} needs a preset to start from (`preset: quickstart`), or task and model with their types")
    return ExperimentFile(path, content, lines)


def with_line(message: str, words: Sequence[str]) -> str:
    """The message of an error with file and line before it, where it is about a field that a command line's YAML file sets.

    Args:
        message: of the error.
        words: the command line. Fields that it sets are not the file's any more.
    """
    name = next((word for word in words if word.endswith(YAML)), "")
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    if not name or message.startswith((f"{name}:", f"{name},", f"{name} ")):
        return message
    where = _place(Path(name), message, typed)
    return message if where is None else f"{where}: {message}"


def _place(path: Path, message: str, without: set[str]) -> str | None:
    """File and line of the first field of a message that a file, or the one that it starts from, sets; None: there is none."""
    try:
        file = read_experiment_file(path.expanduser())
    except UserError:
        return None
    lines = {tuple(name.replace("-", "_") for name in place): line for place, line in file.lines.items()}
    for found in re.findall(r"[a-z][a-z0-9_-]*(?:\.[a-z0-9_-]+)+", message):
        field = found.replace("-", "_")
        if field not in without and (line := lines.get(tuple(field.split(".")))) is not None:
            return f"{path}, line {line}"
    if file.base is None or not file.base.endswith(YAML):
        return None
    base = Path(file.base).expanduser()
    return _place(base if base.exists() else path.expanduser().parent / file.base, message, without)


def write_experiment_file(path: Path, experiment: Experiment, base: Experiment | None, base_name: str) -> None:
    """Writes an experiment as a YAML file that starts from another one and says only what differs.

    Args:
        path: of the file.
        experiment: what is written.
        base: what it starts from; None: all of it is written.
        base_name: how that is found.

    Raises:
        UserError: the file exists already, or cannot be written.
    """
    import yaml

    if path.suffix not in YAML:
        raise UserError(f"--write-config is {path} and must end in .yaml")
    if path.exists():
        raise UserError(f"--write-config is {path}, which exists already: name another file, or remove it")
    tree = to_dict(experiment)
    del tree[PRESET], tree["type"]
    if base is None:
        content = _short_types(tree)
    else:
        old = to_dict(base)
        content = {PRESET: base_name, **_different({k: v for k, v in old.items() if k in tree}, tree)}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    try:
        with whole_file(path) as file:
            file.write(f"# perceiver train {path.name}\n{text}".encode())
    except OSError as error:
        raise UserError(f"--write-config is {path}, which cannot be written ({error.strerror})") from None


def _different(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What of a tree differs from another of the same types."""
    result: dict[str, Any] = {}
    for name, value in new.items():
        before = old.get(name)
        if value == before or name == "type":
            continue
        if isinstance(value, dict) and isinstance(before, dict) and value.get("type") == before.get("type"):
            result[name] = _different(before, value)
        else:
            result[name] = _short_types(value)
    return result


def _some(fields: Sequence[str]) -> str:
    return f"; there are {', '.join(sorted(fields)[:MOST_LISTED])}{', ...' if len(fields) > MOST_LISTED else ''}"


def _expected(hint: Any) -> str:
    """What a field of a file may hold, in words."""
    if not (kinds := _kinds(hint)):
        return wanted(hint)
    many = get_origin(hint) in (tuple, list)
    return f"{'a list of mappings, each with its type' if many else 'a mapping of fields'} (type: {', '.join(kinds)})"


def _kinds(hint: Any) -> list[str]:
    """The classes of configurations that a field may hold, as files name them; empty: it holds none."""
    for choice in (hint, *get_args(hint)):
        if isinstance(choice, type) and issubclass(choice, Config):
            import_builtins()
            found = list(subclasses(choice).values()) or [choice]
            return sorted({cls.__name__ for cls in found if cls.__module__.partition(".")[0] == PACKAGE and not isabstract(cls)})
    return []


def _short_types(value: Any) -> Any:
    """Plain data with this package's classes by their bare names."""
    if isinstance(value, dict):
        return {
            name: member.partition(":")[2] if name == "type" and is_builtin(member) else _short_types(member)
            for name, member in value.items()
        }
    return [_short_types(member) for member in value] if isinstance(value, list) else value


def _same_type(name: Any, old: str) -> bool:
    """Whether a type that is written in a file is that of a saved node: by its whole or its bare name."""
    return name == old or (is_builtin(old) and name == old.partition(":")[2])


def _read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, as YAML 1.2 says and people write; PyYAML's own rule wants a point in it."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        loader = Loader(path.read_text())
        try:
            node = loader.get_single_node()
            lines = _lines(node, path) if node is not None else {}
            content = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where} is no YAML: {' '.join(str(error.problem or error.context).split())}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no experiment: a mapping with task, model, data, ... or preset is expected")
    return content, lines


def _lines(node: Node, path: Path, place: tuple[str, ...] = ()) -> Lines:
    """The line of each key.

    Raises:
        UserError: a mapping has a key twice, of which YAML would take the last.
    """
    import yaml

    found: Lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in _pairs(node):
            here = (*place, key.value)
            line = key.start_mark.line + 1
            if here in found:
                raise UserError(f"{path}, line {line}: {'.'.join(here)} is given twice, first in line {found[here]}")
            found[here] = line
            found |= _lines(value, path, here)
    elif isinstance(node, yaml.SequenceNode):
        for number, member in enumerate(node.value):
            found |= _lines(member, path, (*place, str(number)))
    return found


def _pairs(node: MappingNode) -> list[tuple[Any, Node]]:
    return [(key, value) for key, value in node.value if isinstance(key.value, str)]
