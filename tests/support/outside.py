"""A folder outside the project with the example files of docs/extending.md, and experiments from it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "examples"
MODULES = ("weather", "transformer", "weather_sweep", "tagging", "spans", "machines", "mine", "chance")


def copy_examples(folder: Path) -> Path:
    """The example files in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def forget() -> None:
    """Makes this process forget modules of users: the next import reads them anew."""
    for name in MODULES:
        sys.modules.pop(name, None)
