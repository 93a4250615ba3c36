"""What lies in a run's folder, read without PyTorch: the names of its files, its metrics, its complete checkpoints, its state."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERIMENT = "experiment.json"
"""File that makes a folder a run: its resolved configuration, the hash of its data, its length, the version that started it."""
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""
MARKER = "checkpoint.json"
"""Written into a checkpoint's folder when all else is there."""
METRICS = "metrics.jsonl"
"""One JSON object a line: the metrics of a step."""
RESULT = "result.json"
"""The last metrics of a finished run."""
FAILURE = "failure.json"
"""Why a run's last start failed for good; workers that are started again find it and end at once."""
TAIL = 2**16
"""Bytes at the end of the metrics in which the last record is looked for."""
LOCK = ".lock"
"""File that the driver of a run holds locked."""


class DamagedRun(Exception):
    """A run's folder whose files do not say what they must."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    metrics: dict[str, float]


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """The complete checkpoints in a folder, oldest first."""
    found = []
    for marker in sorted(Path(folder).glob(f"step-*/{MARKER}")):
        data = json.loads(marker.read_text())
        found.append(CheckpointInfo(marker.parent, data["step"], data["metrics"]))
    return found


def best_of(checkpoints: list[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The checkpoint with the best value of a metric (accuracies: the highest, others: the lowest); None if none has it."""
    having = [c for c in checkpoints if metric in c.metrics]
    sign = -1 if metric.endswith("acc") else 1
    return min(having, key=lambda c: (sign * c.metrics[metric], -c.step), default=None)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a line that is damaged, as the last one is after a crash, costs itself alone."""
    path = folder / METRICS
    return [record for line in path.read_bytes().splitlines() if (record := _record(line))] if path.exists() else []


def last_step(folder: Path) -> int:
    """The step of a run's last record, found from the end of the file; 0 without any."""
    try:
        with open(folder / METRICS, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            for line in reversed(file.read().splitlines()):
                if record := _record(line):
                    return record["step"]
    except FileNotFoundError:
        pass
    return 0


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's `experiment.json`, checked to be an object with an experiment of sections in it.

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


def status(folder: Path) -> str:
    """Whether a run is finished, running, failed or stopped."""
    if (folder / RESULT).exists():
        return "finished"
    if is_held(folder):
        return "running"
    return "failed" if (folder / FAILURE).exists() else "stopped"


def is_held(folder: Path) -> bool:
    """Whether a driver holds the run's lock (as far as this machine can tell)."""
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
