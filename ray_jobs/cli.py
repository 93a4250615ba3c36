"""Command lines: `<preset> [--dotted.override value ...]`, parsed by tyro; mistakes are one sentence and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from perceiver.config import Experiment, UserError, flatten, from_dict, nearest, subclasses, to_dict, type_name
from perceiver.config.core import Config as Node
from perceiver.config.core import find_type, nodes
from perceiver.terminal import print_anything

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
}
TRUST_CODE = "--trust-code"
"""Runs that an experiment is or starts from may run code of their own that was never run from this account."""

Config = TypeVar("Config")


class JobFailed(Exception):
    """A job that ended without a result, through no mistake that could be named before."""


class Interrupted(KeyboardInterrupt):
    """An interruption after which all is in order, which the message says."""


def parse_experiment(argv: Sequence[str], prog: str) -> Experiment:
    """The experiment of a command line: its name (see `find_experiment`) and overrides by dotted names.

    Raises:
        UserError: unknown experiment, field or value.
        SystemExit: after `--help`.
    """
    if not argv or argv[0] in ("-h", "--help"):
        from perceiver.catalog import CATALOG

        names = ", ".join(CATALOG)
        print(f"usage: {program(prog)} EXPERIMENT [--field value ...]\n\npresets: {names}")
        print("yours:   FILE.py:FUNCTION, MODULE:FUNCTION, a run's folder, a .json or a .yaml file")
        print(f"shortcuts: {', '.join(f'{short} = {long}' for short, long in SHORTCUTS.items())}; --workers 2..8 is elastic")
        print(f"fields of an experiment: {program(prog)} EXPERIMENT --help")
        raise SystemExit(0)
    # Here and not above: to parse nothing takes none of the models and tasks.
    from perceiver.experiments import find_experiment

    trust_code = TRUST_CODE in argv
    words = [word for word in argv if word != TRUST_CODE]
    if not words:
        raise UserError(f"{TRUST_CODE} needs the experiment that it is about: {program(prog)} EXPERIMENT {TRUST_CODE}")
    experiment = override(find_experiment(words[0], trust_code), words[1:], f"{prog} {words[0]}")
    if trust_code:
        from perceiver.training.init_from import trust_start

        trust_start(experiment)
    return experiment.task.completed(experiment)


@contextlib.contextmanager
def naming_words(words: Sequence[str]) -> Iterator[None]:
    """Data that is not prepared is reported with the command in the user's own words, and not with all that follows from them."""
    from perceiver.datasets import NotPrepared

    try:
        yield
    except NotPrepared as error:
        raise error.by(shlex.join(["perceiver", "preprocess", *words])) from None


def override(config: Config, args: Sequence[str], prog: str) -> Config:
    """An experiment (or another tree of dataclasses) with fields overridden by command-line arguments.

    Raises:
        UserError: an unknown field (offers the nearest) or a value that does not fit it.
    """
    config, args = _replace_nodes(config, _elastic([_long(arg) for arg in args]))
    fields = [name for name in flatten(to_dict(config)) if name.rpartition(".")[2] != "type" and name != "preset"]
    for arg in args:
        if re.match(r"--[a-zA-Z]", arg) and arg != "--help":
            name = arg[2:].partition("=")[0].replace("-", "_")
            if name not in fields:
                raise UserError(f"field {arg.partition('=')[0]} does not exist{nearest(name, fields, '--')}")
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
                description=type(config).__doc__,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_first_sentence(output.getvalue())) from None
    return made


def program(module: str) -> str:
    """How the job of a module is started here: `perceiver COMMAND` in a process that was, else `python -m MODULE`."""
    if Path(sys.argv[0]).name != "perceiver":
        return f"python -m {module}"
    name, _, rest = module.rpartition(".")[2].partition(" ")
    return " ".join(filter(None, ("perceiver", name.replace("_", "-").removeprefix("train-"), rest)))


def main_entry(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a job's main and ends the process.

    A user's mistake is printed as one line, exit status 2; a
    job that failed with its reason, exit status 1; an interruption has exit status 130.
    """
    print_anything()
    try:
        words = sys.argv[1:] if argv is None else argv
        _check_text(words)
        status = main(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except JobFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as error:
        print(str(error) or "\nstopped; the same command continues", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


def _check_text(words: Sequence[str]) -> None:
    """Refuses arguments that are no text: files of such names cannot be named in tables, manifests and messages.

    Raises:
        UserError: names the argument, as far as it can be shown.
    """
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise UserError(f"{shown} is not UTF-8: rename the file")


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
    """Rules for tyro by which an experiment's `preset` is no argument: it says where the experiment came from."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def experiment(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not Experiment:
            return None
        types = get_type_hints(Experiment)
        fields = (
            StructFieldSpec(name=field.name, type=types[field.name], default=getattr(info.default, field.name))
            for field in dataclasses.fields(Experiment)
            if field.name != "preset"
        )
        return StructConstructorSpec(instantiate=lambda **values: dataclasses.replace(info.default, **values), fields=tuple(fields))

    return registry


def refuse_empty(args: argparse.Namespace, positional: Sequence[str] = ()) -> None:
    """Refuses empty arguments: most are a variable of the shell that is not set, and would be taken as not given.

    Raises:
        UserError: names the argument.
    """
    for name, value in vars(args).items():
        if any(isinstance(v, str) and not v.strip() for v in (value if isinstance(value, (list, tuple)) else [value])):
            shown = name.upper() if name in positional else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown} is empty: give a value (is a variable of the shell not set?)")


def _long(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return SHORTCUTS.get(name, name) + equals + value


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
    for word in words:
        flag, equals, value = word.partition("=")
        place = flag[2:].replace("-", "_")
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


def _section_class(flag: str, name: str, old: Node) -> type[Node]:
    """The class that a section is given by its name.

    Raises:
        UserError: there is none of that name that could stand there.
    """
    base = next(cls for cls in reversed(type(old).__mro__) if issubclass(cls, Node) and cls is not Node)
    known = subclasses(base)
    if name in known:
        return known[name]
    if ":" in name:
        found = find_type(name)
        if issubclass(found, base):
            return found
        raise UserError(f"{flag} is {name}, which is no {base.__name__}")
    choices = ", ".join(known) if base is not type(old) or known else "its fields, " + f"{flag}.NAME"
    raise UserError(f"{flag} is {name!r}{nearest(name, known)} and must be one of {choices}, or a class of yours as module:Class")


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
