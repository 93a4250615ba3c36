"""Command lines: `<preset> [--dotted.override value ...]`, parsed by tyro; mistakes are one sentence and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perceiver.config import Experiment, RunConfig, UserError
from perceiver.terminal import filled, print_anything
from ray_jobs.overrides import FLAGS, SHORTCUTS, override
from ray_jobs.program import program

if TYPE_CHECKING:
    pass

TRUST_CODE = "--trust-code"
"""Runs that an experiment is or starts from may run code of their own that was never run from this account."""
WRITE_CONFIG = "--write-config"
"""Writes the experiment of a command line as a YAML file, and does nothing else."""


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
        if prog == "ray_jobs.train":
            print(f"       {program(prog)} --fork RUN[@STEP] --name NAME [--field value ...]")
        own = "EXPERIMENT is a preset, or one of your own: FILE.py:FUNCTION, MODULE:FUNCTION, a run's folder, a .json or a .yaml file."
        print(f"\n{filled(own)}\n{filled(f'`{program(prog)} EXPERIMENT --help` lists its fields.')}\n")
        print(filled(f"presets: {names}", "  "))
        shortcuts = [*(f"{short} = {long}" for short, long in SHORTCUTS.items()), *FLAGS]
        print(filled(f"shortcuts: {', '.join(shortcuts)}; --workers 2..8 is elastic", "  "))
        if prog == "ray_jobs.train":
            seeds = "--seeds 5 (from --training.seed on) or --seeds 0,1,7; each is a run NAME-seed-N; a table compares them"
            print(filled(f"several seeds: {seeds}", "  "))
        written = f"EXPERIMENT [--field value ...] {WRITE_CONFIG} FILE.yaml only writes the file; {program(prog)} FILE.yaml uses it"
        print(filled(f"as a file: {written}", "  "))
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
    from perceiver.experiments import find_experiment, seen_from

    if name.startswith("--"):
        base, name = None, ""
    else:
        base = find_experiment(name)
    write_experiment_file(path, experiment, base, seen_from(name, path.parent))
    print(f"written to {path}; to use it: {program(prog)} {path}")


@contextlib.contextmanager
def naming_words(words: Sequence[str]) -> Iterator[None]:
    """Data that is not prepared is reported with the command in the user's own words, and not with all that follows from them."""
    from perceiver.datasets import NotPrepared

    try:
        yield
    except NotPrepared as error:
        raise error.by(shlex.join(["perceiver", "preprocess", *words])) from None


def main_entry(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs a job's main and ends the process.

    A user's mistake is printed as one line, exit status 2; a
    job that failed with its reason, exit status 1; an interruption has exit status 130; 141: nobody reads the output any more.
    """
    print_anything()
    try:
        words = sys.argv[1:] if argv is None else argv
        _check_text(words)
        with _of_paths(words):
            status = main(words)
    except UserError as error:
        print(f"error: {_located(str(error), words)}", file=sys.stderr)
        status = 2
    except JobFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as error:
        print(str(error) or "\nstopped; the same command continues", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # whoever reads the output has had enough: `perceiver runs --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it closes it
        status = 141
    sys.exit(status or 0)


PATH_ERRORS = frozenset(
    {
        errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR,
        errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENXIO, errno.EIO,
    }
)  # fmt: skip
"""What the system says of a path that cannot be used as it was meant."""


@contextlib.contextmanager
def _of_paths(words: Sequence[str]) -> Iterator[None]:
    """What the system says of a path, and no door has said before, as one sentence; its traceback is shown with --verbose.

    Raises:
        UserError: it is about a path on the command line.
        JobFailed: it is about another one.
    """
    try:
        yield
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        whose = next((word for word in words if word.rpartition("=")[2].startswith("~")), "$PERCEIVER_HOME")
        raise UserError(f"{whose} names the home of a user that does not exist here") from error
    except OSError as error:
        if error.errno not in PATH_ERRORS or isinstance(error, ConnectionError):
            raise
        logging.getLogger(__name__).debug("what was done with a path:", exc_info=True)
        place = str(error.filename or "")
        reason = error.strerror if place and error.strerror else (str(error).splitlines() or [""])[0]
        said = f"{place}: {reason}" if place else reason
        named = _word_of(words, f"{os.path.abspath(place)} {reason}")
        if named is not None:
            raise UserError(f"{named:.200} cannot be used ({said:.400})") from error
        raise JobFailed(said) from error


def _word_of(words: Sequence[str], text: str) -> str | None:
    """The path on a command line, with its option, that is the begin of one in a text; None: there is none."""
    option = ""
    for word in words:
        typed = word
        if word.startswith("--"):
            option, _, typed = word.partition("=")
        full = os.path.abspath(os.path.expanduser(typed))
        if typed.strip("./") and re.search(rf"{re.escape(full)}(?![\w.-])", text):
            return f"{option} {typed}".strip()
    return None


def _located(message: str, words: Sequence[str]) -> str:
    """A message with the line of the experiment's file that it is about."""
    if not any(word.endswith((".yaml", ".yml")) for word in words):
        return message
    from perceiver.config_files import with_line

    return with_line(message, words)


def _check_text(words: Sequence[str]) -> None:
    """Refuses arguments that are no text: files of such names cannot be named in tables, manifests and messages.

    Raises:
        UserError: names the argument, as far as it can be shown.
    """
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise UserError(f"{shown} is not UTF-8: rename the file")


def refuse_empty(args: argparse.Namespace, positional: Sequence[str] = ()) -> None:
    """Refuses empty arguments: most are a variable of the shell that is not set, and would be taken as not given.

    Raises:
        UserError: names the argument.
    """
    for name, value in vars(args).items():
        if any(isinstance(v, str) and not v.strip() for v in (value if isinstance(value, (list, tuple)) else [value])):
            shown = name.upper() if name in positional else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown} is empty: give a value (is a variable of the shell not set?)")
