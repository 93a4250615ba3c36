"""Experiments as files that people write: a preset and what differs from it, as YAML or JSON; mistakes are named with their lines."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver.config import Experiment, UserError, load_tree, nearest, to_dict
from perceiver.config.core import find_type, is_builtin, look_here
from perceiver.disk import read_json, whole_file

if TYPE_CHECKING:
    from yaml import MappingNode, Node

PRESET = "preset"
"""Key of what a file starts from."""
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
            whole = self._checked({"type": "Experiment", **self.content}, ())
        else:
            whole = self._merged(to_dict(base), changes, ())
        return load_tree(whole, Experiment, str(self.path))

    def _merged(self, tree: dict[str, Any], changes: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
        """A saved tree with some of its fields changed. A node of another "type" takes none of the old one's fields."""
        result = dict(tree)
        for key, value in changes.items():
            name, here = str(key).replace("-", "_"), (*place, str(key))
            if name not in tree and name != "type":
                raise self._unknown(here, [field for field in tree if field != "type"])
            old = tree.get(name)
            if isinstance(value, dict) and isinstance(old, dict) and _same_type(value.get("type", old["type"]), old["type"]):
                result[name] = self._merged(old, {k: v for k, v in value.items() if k != "type"}, here)
            else:
                result[name] = self._checked(value, here)
        return result

    def _checked(self, value: Any, place: tuple[str, ...]) -> Any:
        """A part of the file that stands for itself, with its keys as fields are spelled."""
        if isinstance(value, list):
            return [self._checked(member, (*place, str(number))) for number, member in enumerate(value)]
        if not isinstance(value, dict):
            return value
        plain = {str(key).replace("-", "_"): self._checked(member, (*place, str(key))) for key, member in value.items()}
        if isinstance(plain.get("type"), str):
            look_here()
            cls = find_type(plain["type"])
            fields = [field.name for field in dataclasses.fields(cls)]
            kept = cls.upgrade({name: member for name, member in plain.items() if name != "type"})  # without those that were renamed
            for key in value:
                name = str(key).replace("-", "_")
                if name != "type" and name not in fields and name in kept:
                    raise self._unknown((*place, str(key)), fields)
        return plain

    def _unknown(self, place: tuple[str, ...], known: list[str]) -> UserError:
        line = f", line {self.lines[place]}" if place in self.lines else ""
        name = place[-1].replace("-", "_")
        return UserError(f"{self.path}{line}: field {'.'.join(place)} does not exist{nearest(name, known)}")


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
        raise UserError(f"{path} needs a preset to start from (`preset: quickstart`), or task and model with their types")
    return ExperimentFile(path, content, lines)


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

    if path.suffix not in (".yaml", ".yml"):
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
