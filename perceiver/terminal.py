"""Printing on terminals of any encoding."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Lets standard output show a character that its encoding has not as an escape (`\\xfc`) instead of raising, and standard
    input hand on bytes that are none of its characters.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
