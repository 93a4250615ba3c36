"""What the JSON files of a run's folder say of the run, read without PyTorch and whatever state they are in."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXPERIMENT = "experiment.json"
"""File that makes a folder a run: its resolved configuration, the hash of its data, its length, the version that started it."""
TAIL = 2**16
"""Bytes at the end of the metrics in which the last record is looked for."""


class DamagedRun(Exception):
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


def best_value(markers: Iterable[dict[str, Any]], metric: str) -> float | None:
    """The best value of a metric among checkpoints; None where none has a finite one.

    A marker says of which metrics more is better; those of version 0.1.0 do not, and then it is so for accuracies alone.
    """
    values, higher = [], False
    for marker in markers:
        value = marker["metrics"].get(metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values.append(value)
            higher = metric in marker.get("higher_is_better", [name for name in marker["metrics"] if name.partition("/")[0] == "val_acc"])
    return (max if higher else min)(values) if values else None


def last_step(folder: Path) -> int:
    """The step of a run's last record, found from the end of the file; 0 without any."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    return next((record["step"] for line in reversed(lines) if (record := _json(line)) is not None), 0)


def status(folder: Path) -> str:
    """Whether a run is finished, running, failed or stopped."""
    if (folder / "result.json").exists():
        return "finished"
    if is_held(folder):
        return "running"
    return "failed" if (folder / "failure.json").exists() else "stopped"


def is_held(folder: Path) -> bool:
    """Whether a driver holds the run's lock (as far as this machine can tell)."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _json(content: bytes) -> dict[str, Any] | None:
    """A JSON object that has a step; None for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None
