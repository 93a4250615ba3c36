"""Printing on terminals of any encoding."""

from __future__ import annotations

import argparse
import io
import sys


def print_anything() -> None:
    """Lets standard output show a character that its encoding has not as an escape (`\\xfc`) instead of raising, and standard
    input hand on bytes that are none of its characters.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def summary(documentation: str | None) -> str:
    """What a module's docstring says of its command: without the command line that it begins with, which `--help` shows itself."""
    text = documentation or ""
    if text.startswith("`"):
        text = text.partition(": ")[2]
    return text[:1].upper() + text[1:]


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--checkpoint`: which checkpoint of a run is used."""
    text = "best (default), last, or a step; best:ema and so on are averaged weights"
    parser.add_argument("--checkpoint", default="best", help=text)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust-code`, by which code that came with a run may be run."""
    text = "run the code saved with the run although it has never been run from this account"
    parser.add_argument("--trust-code", action="store_true", help=text)
