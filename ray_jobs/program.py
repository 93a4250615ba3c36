"""How the commands of this package are spelled where they are printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

STARTED_AS = "PERCEIVER_STARTED_AS"
"""Environment variable of processes that a command starts: the program that the user typed."""


def started_as() -> str:
    """Name of the program that the user started: "perceiver", or the file of a module."""
    return os.environ.get(STARTED_AS) or Path(sys.argv[0]).name


def program(module: str) -> str:
    """The command line that starts a module's job, spelled as the user spelled it: `perceiver COMMAND` or `python -m MODULE`.

    After a space there may be arguments, which stay as they are.
    """
    if started_as() != "perceiver":
        return f"python -m {module}"
    path, _, rest = module.partition(" ")
    name = path.rpartition(".")[2]
    return " ".join(filter(None, ("perceiver", name.replace("_", "-").removeprefix("train-"), rest)))
