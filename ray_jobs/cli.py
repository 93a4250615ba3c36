"""Command lines: `<preset> [--dotted.override value ...]`, parsed by tyro; mistakes are one sentence and exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from perceiver.config import Experiment, UserError, flatten, to_dict
from perceiver.presets import PRESETS

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


Config = TypeVar("Config")


class JobFailed(Exception):
    """A job that ended without a result, through no mistake that could be named before."""


def parse_experiment(argv: Sequence[str], prog: str) -> Experiment:
    """The experiment of a command line: a preset's name and overrides by dotted names.

    Raises:
        UserError: unknown preset, field or value.
        SystemExit: after `--help`.
    """
    if not argv or argv[0] in ("-h", "--help"):
        names = ", ".join(PRESETS)
        print(f"usage: {program(prog)} PRESET [--field value ...]\n\npresets: {names}")
        print(f"shortcuts: {', '.join(f'{short} = {long}' for short, long in SHORTCUTS.items())}; --workers 2..8 is elastic")
        print(f"fields of a preset: {program(prog)} PRESET --help")
        raise SystemExit(0)
    return override(preset(argv[0]), argv[1:], f"{prog} {argv[0]}")


def preset(name: str) -> Experiment:
    """The experiment of a preset.

    Raises:
        UserError: there is none of that name; offers the nearest.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} does not exist{nearest(name, PRESETS)}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]()


def override(config: Config, args: Sequence[str], prog: str) -> Config:
    """An experiment (or another tree of dataclasses) with fields overridden by command-line arguments.

    Raises:
        UserError: an unknown field (offers the nearest) or a value that does not fit it.
    """
    args = _elastic([_long(arg) for arg in args])
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
        with contextlib.redirect_stderr(output), _without_internal_fields():
            return tyro.cli(
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


def program(module: str) -> str:
    """How the job of a module is started here: `perceiver COMMAND` in a process that was, else `python -m MODULE`."""
    if Path(sys.argv[0]).name != "perceiver":
        return f"python -m {module}"
    name, _, rest = module.rpartition(".")[2].partition(" ")
    return " ".join(filter(None, ("perceiver", name.replace("_", "-").removeprefix("train-"), rest)))


def main_entry(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a job's main and ends the process.

    A user's mistake is printed as one line, exit status 2; a job that failed with its reason, exit status 1; an interruption
    has exit status 130.
    """
    try:
        status = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except JobFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


def _without_internal_fields() -> ConstructorRegistry:
    """Rules for tyro by which an experiment's `preset` is no argument: it says where the experiment came from."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def experiment(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not Experiment:
            return None
        fields = (
            StructFieldSpec(name=field.name, type=cast(type, field.type), default=getattr(info.default, field.name))
            for field in dataclasses.fields(Experiment)
            if field.name != "preset"
        )
        return StructConstructorSpec(instantiate=lambda **values: dataclasses.replace(info.default, **values), fields=tuple(fields))

    return registry


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


def nearest(name: str, names: Sequence[str] | dict, prefix: str = "") -> str:
    """ ", did you mean ...?" for a name that is not among `names`; a dotted name may be near in its last part alone."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    if not found:
        last = {n.rpartition(".")[2]: n for n in names}
        close = difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1, cutoff=0.6)
        found = [last[n] for n in close]
    return f", did you mean {prefix}{found[0].replace('_', '-') if prefix else found[0]}?" if found else ""


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
