"""Settings of the documentation site: `sphinx-build -W -b html docs docs/_build/html` (with the extra `docs`)."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "Perceivers on Ray"
author = "The authors of perceiver-ray"
release = next(line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
default_role = "code"
add_module_names = False


def plain_underscores(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escapes the underscore at the end of a name like val_, which would be a reference, outside of code."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part) for part in parts[::2]]
        lines[number] = "`".join(parts)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain_underscores)


def write_commands() -> str:
    """A Markdown table of the commands, from the list that the program itself has."""
    from ray_jobs.main import COMMANDS

    rows = [
        f"| `perceiver {name}` | {command.summary} | `{command.module.removesuffix('.__main__')}` |" for name, command in COMMANDS.items()
    ]
    return "\n".join(["| command | what it does | module |", "|---|---|---|", *rows])


myst_enable_extensions = ["substitution"]
myst_substitutions = {"commands": write_commands()}
