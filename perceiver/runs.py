"""A run's folder: what it holds, and how it is read.

A run is (storage, name): the folder of a training with its resolved configuration, checkpoints and records.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from perceiver.config import Experiment, UserError, home, load_tree
from perceiver.disk import is_locked, locked
from perceiver.extensions import Code, check_trust

EXPERIMENT = "experiment.json"
"""File that makes a folder a run: its resolved configuration, the hash of its data, its length, the version that started it."""
LOCK = ".lock"
"""File of a run that the driver of its training holds."""
METRICS = "metrics.jsonl"
"""Records of a run, one JSON object a line."""
TAIL = 2**16
"""Bytes at the end of the metrics in which the last record is looked for."""
CODE = "code"
"""Folder of a run with a copy of the source files of the user's that it needs."""


class DamagedRun(UserError):
    """A run's folder whose files do not say what they must."""


def read_saved(folder: Path) -> dict[str, Any]:
    """The content of a run's `experiment.json`, checked to be an object that holds the sections of an experiment.

    Raises:
        DamagedRun: it cannot be read, or is something else.
    """
    try:
        content = json.loads((folder / EXPERIMENT).read_bytes())
    except OSError as error:
        raise DamagedRun(f"{EXPERIMENT} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedRun(f"{EXPERIMENT} is not JSON: {error}") from error
    experiment = content.get("experiment") if isinstance(content, dict) else None
    if not isinstance(experiment, dict) or not all(isinstance(experiment.get(name), dict) for name in ("task", "training", "run")):
        raise DamagedRun(f"{EXPERIMENT} holds no experiment")
    return content


def read_markers(folder: Path) -> list[dict[str, Any]]:
    """What the markers of a run's complete checkpoints say, by step; damaged ones are left out."""
    found = []
    for path in folder.glob("checkpoints/step-*/checkpoint.json"):
        marker = _json(path.read_bytes())
        if marker is not None and isinstance(marker.get("metrics"), dict):
            found.append(marker)
    return sorted(found, key=lambda marker: marker["step"])


def higher_is_better(markers: Iterable[dict[str, Any]], metric: str) -> bool:
    """Whether more of a metric is better, by the newest marker that has the metric.

    Those of version 0.1.0 do not say, and then it is so for accuracies alone.
    """
    accuracy = metric.partition("/")[0] == "val_acc"
    said = [metric in m["higher_is_better"] if "higher_is_better" in m else accuracy for m in markers if metric in m["metrics"]]
    return said[-1] if said else accuracy


def best_value(markers: Iterable[dict[str, Any]], metric: str) -> float | None:
    """The best value of a metric among checkpoints; None where none has a finite one."""
    markers = list(markers)
    values = [value for m in markers if isinstance(value := m["metrics"].get(metric), (int, float)) and math.isfinite(value)]
    return (max if higher_is_better(markers, metric) else min)(values) if values else None


def local_run(source: str | Path, storage: str | Path | None = None) -> Path | None:
    """The folder on this machine of a run that is given by its path or its name among those of `storage` or $PERCEIVER_HOME."""
    if not str(source).strip():
        raise UserError("the name of the run is empty: give its folder, its URI or its name")
    candidates = [Path(source).expanduser()]
    if not Path(source).is_absolute():
        candidates += [Path(folder).expanduser() / source for folder in (storage, home() / "runs") if folder]
    return next((folder.absolute() for folder in candidates if (folder / EXPERIMENT).is_file()), None)


def last_step(folder: Path) -> int:
    """The step of a run's last record, found from the end of the file; 0 without any."""
    try:
        with open(folder / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    return next((record["step"] for line in reversed(lines) if (record := _json(line)) is not None), 0)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far. Lines that are no records are left out: the last one may have been cut off by a crash."""
    path = folder / METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if type(record["step"]) is int:
                records.append({name: math.nan if value is None else value for name, value in record.items()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return records


def status(folder: Path) -> str:
    """Whether a run is finished, running, failed or stopped."""
    if (folder / "result.json").exists():
        return "finished"
    if is_held(folder):
        return "running"
    return "failed" if (folder / "failure.json").exists() else "stopped"


def held(folder: Path) -> AbstractContextManager[None]:
    """Holds a run, or a sweep, for this process: two drivers of one would write over each other.

    Raises:
        UserError: another process trains it.
    """
    return locked(folder / LOCK, f"{folder} is being trained by another process: wait for it or stop it")


def is_held(folder: Path) -> bool:
    """Whether a driver holds the run's lock (as far as this machine can tell)."""
    return is_locked(folder / LOCK)


def _json(content: bytes) -> dict[str, Any] | None:
    """A JSON object that has a step; None for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


# ------------------------------------------------------------------------------------------------- its experiment, its code


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
        allow_changed: whether the user lets the run continue with it.

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
