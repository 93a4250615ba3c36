"""What a command line changes of an experiment: fields by dotted names, classes of sections, callbacks; parsed by tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from perceiver.config import CallbackConfig, Experiment, UserError, flatten, from_dict, nearest, subclasses, to_dict, type_name
from perceiver.config.core import Config as Node
from perceiver.config.core import find_type, import_builtins, look_here, nodes
from perceiver.config.schema import field_documents
from perceiver.config.values import field_types, wanted
from ray_jobs.program import program

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry


SHORTCUTS = {
    "--workers": "--parallel.workers",
    "--name": "--run.name",
    "--storage": "--run.storage",
    "--source": "--data.source",
    "--init-from": "--training.init-from",
    "--init-encoder-from": "--training.init-encoder-from",
    "--init-checkpoint": "--training.init-checkpoint",
    "--fork": "--training.fork",
}


_CALLBACKS = "--callbacks"


FLAGS = {"--fork-weights-only": ("--training.fork-weights-only", "True")}
"""Shortcuts that take no value."""
UNDOTTED = frozenset({*SHORTCUTS, *FLAGS, *(f"--{field.name}" for field in dataclasses.fields(Experiment))})
"""Words of a command line about fields that have no dot."""


Config = TypeVar("Config")


def override(config: Config, args: Sequence[str], prog: str) -> Config:
    """An experiment (or another tree of dataclasses) with fields overridden by command-line arguments.

    Raises:
        UserError: an unknown field (offers the nearest) or a value that does not fit it.
    """
    config, args = _replace_nodes(config, _elastic([long for arg in args for long in _long(arg)]))
    fields = [name for name in flatten(to_dict(config)) if name.rpartition(".")[2] != "type" and name != "preset"]
    for arg in args:
        if re.match(r"--[a-zA-Z]", arg) and arg != "--help":
            name = arg[2:].partition("=")[0].replace("-", "_")
            if name not in fields:
                raise UserError(f"field {arg.partition('=')[0]} does not exist{nearest(name, fields, '--')}")
    _refuse_unset(flatten(to_dict(config)), args)
    # Here and not above: to import this module takes nothing that lists of runs and presets do not need.
    import tyro

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), _without_internal_fields(), _wide_enough():
            made = tyro.cli(
                tyro.conf.AvoidSubcommands[tyro.conf.FlagConversionOff[type(config)]],
                default=config,
                args=args,
                prog=program(prog),
                description="\n\n".join(
                    filter(None, [" ".join((type(config).__doc__ or "").split()), _BESIDES.get(prog.partition(" ")[0])])
                ),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        sentence = _first_sentence(output.getvalue()).removeprefix("Error parsing ")
        raise UserError(_of_field(sentence, config, args) or _of_stray_word(sentence, args) or sentence) from None
    return made


def _of_stray_word(sentence: str, args: Sequence[str]) -> str | None:
    """What is said of words that tyro could not assign: the field that they follow, which takes fewer; None: it is no such sentence."""
    begin, _, words = sentence.partition("nrecognized options: ")
    if begin != "U" or not words or words.startswith("--"):
        return None
    flag, values = "", 0
    for arg in args:
        if re.match(r"--[a-zA-Z]", arg):
            flag, values = arg.partition("=")[0], int("=" in arg)
            continue
        values += 1
        if (words == arg or words.startswith(f"{arg}, ")) and (not flag or values > 1):
            return (
                f"{arg!r} is one value too many for {flag}" if flag else f"{arg!r} is not a field: fields are written as --optim.lr 0.001"
            )
    return None


def _refuse_unset(fields: dict[str, Any], args: Sequence[str]) -> None:
    """Raises UserError for an empty value of a field that has none: it would say nothing, and a variable of the shell was meant.

    A field that has a value may be emptied: `--data.source ""` beside a mixture.
    """
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        given = value if equals else args[place + 1] if place + 1 < len(args) else "given"
        if name.startswith("--") and not given.strip() and fields.get(name[2:].replace("-", "_")) == "":
            raise UserError(f"{name} is empty: give a value, or leave it out (is a variable of the shell not set?)")


def _of_field(sentence: str, config: Any, args: Sequence[str]) -> str | None:
    """What tyro says of a field's value as other messages say it: the field, the value, and what it must be; None: it is no such sentence.

    Args:
        sentence: which names the field.
        config: the tree that is changed.
        args: the command line.
    """
    found = re.search(r"--([a-zA-Z0-9_.-]*[a-zA-Z0-9_])", sentence)
    if found is None or "unrecognized" in sentence.lower():
        return None
    *place, last = found[1].replace("-", "_").split(".")
    node: Any = config
    for step in place:
        node = node[int(step)] if isinstance(node, tuple) and step.isdigit() and int(step) < len(node) else getattr(node, step, None)
    hint = field_types(type(node)).get(last) if isinstance(node, Node) else None
    if hint is None:
        return None
    flags = [number for number, arg in enumerate(args) if arg.partition("=")[0].replace("_", "-") == f"--{found[1]}".replace("_", "-")]
    if not flags:
        return None
    first = args[flags[-1]].partition("=")
    given = [first[2]] if first[1] else list(takewhile(lambda arg: not re.match(r"--[a-zA-Z]", arg), args[flags[-1] + 1 :]))
    if not given:
        return f"--{found[1]} needs a value: {wanted(hint)}"
    return f"--{found[1]} is {' '.join(given)!r} and must be {wanted(hint)}"


_BESIDES = {
    "ray_jobs.train": "Options besides the fields: --seeds 5 or --seeds 0,1,7 (a run NAME-seed-N each, and a table that compares them); "
    "--fork RUN[@STEP] and --fork-weights-only (start from a checkpoint of another run); --write-config FILE.yaml (only write the "
    "experiment as a file); --allow-changed-code (continue although your code has changed); --trust-code (run a run's code); "
    "--verbose; --quiet. --workers 2..8 makes the run elastic. --callbacks earlystop divergence adds callbacks "
    "(your own as module:Class); "
    "their fields are --callbacks.0.patience, --callbacks.1.factor, ..., and --help after the names lists them."
}
"""What a job's help says of options that are no fields."""


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    """Columns to lay out help in, also on a terminal of fewer: tyro's layout does not end in a width of 1."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(40, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _without_internal_fields() -> ConstructorRegistry:
    """Rules for tyro: an experiment's `preset`, which says where it came from, is no argument, and fields are described by
    their docstrings without the line breaks that these have in the source.
    """
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not isinstance(info.default, Node):
            return None
        cls = type(info.default)
        types = get_type_hints(cls)
        fields = (
            StructFieldSpec(
                name=field.name,
                type=types[field.name],
                default=getattr(info.default, field.name),
                helptext=lambda name=field.name: field_documents(cls).get(name),  # type: ignore[misc]
            )
            for field in dataclasses.fields(cls)
            if not (cls is Experiment and field.name == "preset")
        )
        return StructConstructorSpec(instantiate=lambda **values: dataclasses.replace(info.default, **values), fields=tuple(fields))

    return registry


def _long(arg: str) -> tuple[str, ...]:
    if arg in FLAGS:
        return FLAGS[arg]
    name, equals, value = arg.partition("=")
    return (SHORTCUTS.get(name, name) + equals + value,)


def _elastic(args: list[str]) -> list[str]:
    """`--parallel.workers 2..8` as most and least workers."""
    result: list[str] = []
    for arg in args:
        if found := re.fullmatch(r"--parallel\.workers=(\d+)\.\.(\d+)", arg):
            result += [f"--parallel.workers={found[2]}", f"--parallel.min-workers={found[1]}"]
        elif result[-1:] == ["--parallel.workers"] and (found := re.fullmatch(r"(\d+)\.\.(\d+)", arg)):
            result += [found[2], "--parallel.min-workers", found[1]]
        else:
            result.append(arg)
    return result


def _replace_nodes(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """The tree with the sections that the arguments give another class: `--optim.optimizer adam`, `--task weather:Forecast`.

    Fields that the new class shares with the old one keep their values. Returns the tree and the other arguments.
    """
    places = {where[:-1]: node for where, node in nodes(config) if where}
    rest: list[str] = []
    words = iter(args)
    while (word := next(words, None)) is not None:
        flag, equals, value = word.partition("=")
        place = flag[2:].replace("-", "_")
        if flag == _CALLBACKS and isinstance(config, Experiment):
            names, following = [value] if equals else [], next(words, None)
            while not equals and following is not None and not following.startswith("--"):
                names.append(following)
                following = next(words, None)
            if following is not None:
                words = chain([following], words)
            config = _with_callbacks(config, names)
            places = {where[:-1]: node for where, node in nodes(config) if where}
            continue
        if not word.startswith("--") or place not in places:
            rest.append(word)
            continue
        name = value if equals else next(words, "")
        tree = to_dict(config)
        *parents, last = place.split(".")
        section = tree
        for part in parents:
            section = section[int(part)] if isinstance(section, list) else section[part]
        old = section[last]
        cls = _section_class(flag, name, places[place])
        section[last] = {k: v for k, v in old.items() if k in cls.__dataclass_fields__} | {"type": type_name(cls)}
        config = from_dict(tree)
        places = {where[:-1]: node for where, node in nodes(config) if where}
    return config, rest


def _with_callbacks(config: Config, names: Sequence[str]) -> Config:
    """The experiment with callbacks of these classes in place of its own; those that it has keep their fields.

    Raises:
        UserError: a name is that of none.
    """
    import_builtins()
    tree = to_dict(config)
    old = list(tree["callbacks"])
    tree["callbacks"] = []
    for name in names:
        cls = _named_class(_CALLBACKS, name, CallbackConfig)
        node = next((node for node in old if node["type"] == type_name(cls)), {"type": type_name(cls)})
        tree["callbacks"].append(node)
    try:
        return from_dict(tree)
    except UserError as error:
        raise UserError(f"{_CALLBACKS} {' '.join(names)}: {error}") from None


def _section_class(flag: str, name: str, old: Node) -> type[Node]:
    """The class that a section is given by its name.

    Raises:
        UserError: there is none of that name that could stand there.
    """
    base = next(cls for cls in reversed(type(old).__mro__) if issubclass(cls, Node) and cls is not Node)
    if base is type(old) and not subclasses(base):
        raise UserError(f"{flag} is {name!r} and must be one of its fields, {flag}.NAME")
    return _named_class(flag, name, base)


def _named_class(flag: str, name: str, base: type[Node]) -> type[Node]:
    """A subclass by the name that a command line gives it.

    Raises:
        UserError: there is none.
    """
    known = subclasses(base)
    if name in known:
        return known[name]
    if ":" in name:
        look_here()
        found = find_type(name)
        if issubclass(found, base):
            return found
        raise UserError(f"{flag} is {name}, which is no {base.__name__}")
    raise UserError(f"{flag} is {name!r} and must be one of {', '.join(known)}, or a class of yours as module:Class{nearest(name, known)}")


def _first_sentence(box: str) -> str:
    """What tyro's framed message says, without the frame and the help below it."""
    lines: list[str] = []
    for line in box.splitlines():
        text = line.strip("│ \t")
        if text.startswith("──") and lines:
            break
        if text and not text.startswith("╭"):
            lines.append(text)
    return " ".join(lines)
