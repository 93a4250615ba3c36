"""What commands have in common: printing on terminals of any encoding, the parser of their arguments, and options of several."""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from perceiver.config import nearest

_MISSING = "the following arguments are required: "
_KINDS = {"int": "a whole number", "float": "a number", "Path": "a path"}
_SENTENCES = (
    (r"argument (?P<name>.+?): invalid (?P<kind>\w+) value: (?P<value>.+)", "{name} is {value} and must be {kind}"),
    (
        r"argument (?P<name>.+?): invalid choice: (?P<value>.+?) \(choose from (?P<choices>.+)\)",
        "{name} is {value} and must be one of {choices}",
    ),
    (r"argument (?P<name>.+?): expected one argument", "{name} needs a value"),
    (r"argument (?P<name>.+?): expected at least one argument", "{name} needs at least one value"),
    (r"argument (?P<name>.+?): ignored explicit argument (?P<value>.+)", "{name} takes no value, and is given {value}"),
    (r"argument (?P<name>.+?): not allowed with argument (?P<value>.+)", "{name} cannot be given together with {value}"),
)
"""What argparse says of a mistake, and the sentence it becomes."""


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's arguments. A mistake is printed as one sentence without the usage, exit status 2."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses the arguments that it has; returns what is found, and the other words."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses the arguments; one that does not exist is reported with the name of the nearest option."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            self.error(f"argument {unknown[0]!r} is one too many" if option is None else self._no_option(option))
        return found

    def parse_with_fields(self, args: Sequence[str], others: Collection[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses the arguments that it has; returns what is found, and the other words, which are fields of an experiment.

        A word without a dot that is none of `others` and near one of its own options is reported with that option's name.
        """
        found, rest = self.parse_known_args(args)
        for word in rest:
            option = word.partition("=")[0]
            if (
                option.startswith("--")
                and option != "--help"
                and "." not in option
                and option not in others
                and (said := self._no_option(option)).endswith("?")
            ):
                self.error(said)
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong and where the help is, and ends the process with status 2."""
        missing = message.removeprefix(_MISSING)
        if missing == message:
            text = _sentence(message)
        elif misspelled := next((said for word in self._words if (said := self._no_option(word.partition("=")[0])).endswith("?")), ""):
            text = misspelled
        else:
            any_number = {action.metavar or action.dest for action in self._actions if action.nargs == "*"}
            names = [name for name in missing.split(", ") if name not in any_number]
            text = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        end = "" if text.endswith("?") else ";"
        self.exit(2, f"error: {text}{end} {self.prog} --help lists what can be given\n")

    def _no_option(self, word: str) -> str:
        """What is wrong with an option that does not exist; empty: the word is none, or exists."""
        known = self._option_string_actions
        return "" if word in known or not word.startswith("-") else f"option {word} does not exist{nearest(word, known)}"


def _sentence(message: str) -> str:
    """A message of argparse in the words of this project."""
    for pattern, sentence in _SENTENCES:
        if found := re.fullmatch(pattern, message, re.DOTALL):
            parts = found.groupdict()
            parts["name"] = parts["name"].rpartition("/")[2]  # of -q/--quiet the long name
            parts["kind"] = _KINDS.get(parts.get("kind", ""), "another")
            parts["choices"] = parts.get("choices", "").replace("'", "")
            return sentence.format(**parts)
    return message


def number_of(count: float, thing: str, plural: str = "") -> str:
    """A number of things in words: "1 worker", "1,200 rows", "0.5 CPUs".

    Args:
        count: whole or not.
        thing: what is counted, in the singular.
        plural: its plural where that is not `thing` with an s.
    """
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {thing if count == 1 else plural or thing + 's'}"


def print_anything() -> None:
    """Lets standard output show a character that its encoding has not as an escape (`\\xfc`) instead of raising, and standard
    input hand on bytes that are none of its characters.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def summary(documentation: str | None) -> str:
    """What a module's docstring says of its command, its paragraphs filled to the width of the terminal: without the command line that it
    begins with, which `--help` shows itself.
    """
    text = documentation or ""
    if text.startswith("`"):
        text = text.partition(": ")[2]
    return filled(text[:1].upper() + text[1:])


def filled(text: str, indent: str = "") -> str:
    """Paragraphs filled to the width of the terminal.

    Args:
        indent: before all lines of a paragraph but its first.
    """
    width = max(40, shutil.get_terminal_size().columns - 2)
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
    return "\n\n".join(textwrap.fill(paragraph, width, subsequent_indent=indent, break_on_hyphens=False) for paragraph in paragraphs)


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--checkpoint`: which checkpoint of a run is used."""
    text = "best (default), last, or a step; best:ema and so on are averaged weights"
    parser.add_argument("--checkpoint", default="best", help=text)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust-code`, by which code that came with a run may be run."""
    text = "run the code saved with the run although it has never been run from this account"
    parser.add_argument("--trust-code", action="store_true", help=text)
