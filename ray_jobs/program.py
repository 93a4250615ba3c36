"""How the commands of this package are spelled where they are printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def program(module: str) -> str:
    """How the job of a module is started here: `perceiver COMMAND` in a process that was, else `python -m MODULE`."""
    if Path(sys.argv[0]).name != "perceiver":
        return f"python -m {module}"
    name, _, rest = module.rpartition(".")[2].partition(" ")
    return " ".join(filter(None, ("perceiver", name.replace("_", "-").removeprefix("train-"), rest)))
