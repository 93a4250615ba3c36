"""A run's folder: what it holds, and how it is read.

A run is (storage, name): the folder of a training with its resolved configuration, checkpoints and records.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from perceiver.config import Experiment, UserError, load_tree
from perceiver.extensions import Code, check_trust

EXPERIMENT = "experiment.json"
"""File that makes a folder a run: its resolved configuration and the hash of its data."""
CODE = "code"
"""Folder of a run with a copy of the source files of the user's that it needs."""


def read_run(folder: Path, trust_code: bool = False, install_code: bool = True) -> tuple[Experiment, str]:
    """The experiment of a run's folder and the digest of its data. The code that it brings is importable afterwards.

    Args:
        trust_code: run the code that it brings although that was never run from this account.
        install_code: False where this process has its own version of that code.

    Raises:
        UserError: a damaged file; code that may not be run, or is imported already in another version.
    """
    content = read_json(folder / EXPERIMENT)
    if install_code:
        code = Code.load(folder / CODE)
        check_trust(code, f"run {folder.name}", folder / CODE, trust_code)
        code.install()
    what = f"{folder / EXPERIMENT} is damaged: it does not describe a run"
    if not isinstance(digest := content.get("data"), str):
        raise UserError(f"{what} (no digest of its data)")
    return load_tree(content.get("experiment"), Experiment, what), digest


def check_code(folder: Path, code: Code, allow_changed: bool = False) -> None:
    """Refuses to continue a run with other code than it began with.

    Args:
        code: what the experiment needs now.
        allow_changed: the user has said that the run shall continue with it.

    Raises:
        UserError: it has changed; names the files.
    """
    changed = Code.load(folder / CODE).differences(code) if (folder / EXPERIMENT).is_file() else []
    if changed and not allow_changed:
        raise UserError(
            f"{', '.join(changed)} changed since run {folder.name} began (its copy is in {folder / CODE}): give --allow-changed-code to "
            "continue with the new one, or another --run.name to start anew"
        )


def save_code(folder: Path, code: Code) -> None:
    """Puts the source files that a run needs into its folder. Where they differ from those there, these are kept beside them."""
    old = Code.load(folder / CODE)
    if old and old.digest != code.digest:
        os.replace(folder / CODE, _free(folder / f"{CODE}-before"))
    code.save(folder / CODE)


def _free(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: there is no such file, or it holds anything else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object)")
    return content
