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
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from perceiver.config import CallbackConfig, Experiment, RunConfig, UserError, flatten, from_dict, nearest, subclasses, to_dict, type_name
from perceiver.config.core import Config as Node
from perceiver.config.core import find_type, import_builtins, nodes
from perceiver.config.schema import field_documents
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
    "--fork": "--training.fork",
}
_CALLBACKS = "--callbacks"
FLAGS = {"--fork-weights-only": ("--training.fork-weights-only", "True")}
"""Shortcuts that take no value."""
TRUST_CODE = "--trust-code"
"""Runs that an experiment is or starts from may run code of their own that was never run from this account."""
WRITE_CONFIG = "--write-config"
"""Writes the experiment of a command line as a YAML file, and does nothing else."""

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
        print(f"usage: {program(prog)} EXPERIMENT [--field value ...]")
        print(f"       {program(prog)} --fork RUN[@STEP] --name NAME [--field value ...]\n\npresets: {names}")
        print("yours:   FILE.py:FUNCTION, MODULE:FUNCTION, a run's folder, a .json or a .yaml file")
        shortcuts = [*(f"{short} = {long}" for short, long in SHORTCUTS.items()), *FLAGS]
        print(f"shortcuts: {', '.join(shortcuts)}; --workers 2..8 is elastic")
        if prog == "ray_jobs.train":
            print("several seeds: --seeds 5 (from --training.seed on) or --seeds 0,1,7; each is a run NAME-seed-N, and a table ends it")
        print(f"as a file: EXPERIMENT [--field value ...] {WRITE_CONFIG} FILE.yaml writes it and ends; then {program(prog)} FILE.yaml")
        print(f"fields of an experiment: {program(prog)} EXPERIMENT --help")
        raise SystemExit(0)
    # Here and not above: to parse nothing takes none of the models and tasks.
    from perceiver.experiments import find_experiment

    trust_code = TRUST_CODE in argv
    target, words = _taken(WRITE_CONFIG, [word for word in argv if word != TRUST_CODE])
    if not words:
        raise UserError(f"{TRUST_CODE} needs the experiment that it is about: {program(prog)} EXPERIMENT {TRUST_CODE}")
    if words[0].startswith("--") and (fork := _value(words, "--fork", "--training.fork")) is not None:
        experiment = override(_parent(fork, _value(words, "--storage", "--run.storage"), trust_code), words, prog)
        if not experiment.run.name:
            raise UserError("--fork makes a new run: give it a --name")
    else:
        experiment = override(find_experiment(words[0], trust_code), words[1:], f"{prog} {words[0]}")
    if trust_code:
        from perceiver.training.init_from import trust_start

        trust_start(experiment)
    if target is not None:
        _write_config(Path(target).expanduser(), experiment, words[0], prog)
        raise SystemExit(0)
    return experiment.task.completed(experiment)


def _parent(fork: str, storage: str | None, trust_code: bool) -> Experiment:
    """The experiment of the run that is forked, as that of a new run beside it."""
    from perceiver.experiments import find_experiment
    from perceiver.training.init_from import forked_run

    run, _ = forked_run(fork, RunConfig(storage=storage or "").storage_path)
    found = find_experiment(str(run.folder), trust_code)
    training = dataclasses.replace(found.training, fork=None, fork_weights_only=False, init_from=None, init_encoder_from=None)
    return dataclasses.replace(found, training=training, run=dataclasses.replace(found.run, name=""))


def _value(words: Sequence[str], *flags: str) -> str | None:
    """The value that one of these flags is given among words; None: it is not."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        flag, equals, value = word.partition("=")
        if flag in flags:
            return value if equals else following
    return None


def _taken(flag: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value that an option is given, or None, and the words without both.

    Raises:
        UserError: it has no value.
    """
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        rest = [*words[:number], *words[number + (1 if equals else 2) :]]
        value = value if equals else next(iter(words[number + 1 :]), "")
        if not value or value.startswith("--"):
            raise UserError(f"{flag} needs the file to write")
        return value, rest
    return None, list(words)


def _write_config(path: Path, experiment: Experiment, name: str, prog: str) -> None:
    """Writes what a command line says as a file."""
    from perceiver.config_files import write_experiment_file
    from perceiver.experiments import find_experiment

    if name.startswith("--"):
        base, name = None, ""
    else:
        base = find_experiment(name)
    write_experiment_file(path, experiment, base, name)
    print(f"written to {path}; to use it: {program(prog)} {path}")


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
    config, args = _replace_nodes(config, _elastic([long for arg in args for long in _long(arg)]))
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
                description="\n\n".join(filter(None, [type(config).__doc__, _BESIDES.get(prog.partition(" ")[0])])),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_first_sentence(output.getvalue()).removeprefix("Error parsing ")) from None
    return made


_BESIDES = {
    "ray_jobs.train": "Besides the fields: --seeds 5 or --seeds 0,1,7 (each seed is a run of its own, NAME-seed-N, and a table ends it); "
    "--fork RUN[@STEP] and --fork-weights-only (a new run that begins as another was); --write-config FILE.yaml (writes the "
    "experiment as a file, and ends); --allow-changed-code; --trust-code; --verbose; "
    "--quiet. --workers 2..8 is elastic. --callbacks earlystop divergence adds callbacks (or yours, module:Class), whose fields are then "
    "--callbacks.0.patience, --callbacks.1.factor, ...: with --help after them all are listed."
}
"""What a job's help says of options that are no fields."""


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


def refuse_empty(args: argparse.Namespace, positional: Sequence[str] = ()) -> None:
    """Refuses empty arguments: most are a variable of the shell that is not set, and would be taken as not given.

    Raises:
        UserError: names the argument.
    """
    for name, value in vars(args).items():
        if any(isinstance(v, str) and not v.strip() for v in (value if isinstance(value, (list, tuple)) else [value])):
            shown = name.upper() if name in positional else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown} is empty: give a value (is a variable of the shell not set?)")


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
        found = find_type(name)
        if issubclass(found, base):
            return found
        raise UserError(f"{flag} is {name}, which is no {base.__name__}")
    raise UserError(f"{flag} is {name!r}{nearest(name, known)} and must be one of {', '.join(known)}, or a class of yours as module:Class")


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
