"""Which checkpoints a run has, and which of them is meant."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from perceiver.config import UserError
from perceiver.runs import local_run
from perceiver.training.checkpoint_files import (
    MARKER,
    CheckpointInfo,
    parse_marker,
    read_marker,
)
from perceiver.training.damage import DamagedCheckpoint
from perceiver.training.mirror import Mirror, fetch_run

logger = logging.getLogger(__name__)


def find_run(source: str | Path, storage: str | Path | None = None) -> Path | None:
    """The folder of a run that is given by its path, its URI in an object store (then fetched), or its name among those of
    `storage` or $PERCEIVER_HOME; else None.
    """
    return fetch_run(str(source)) if "://" in str(source) else local_run(source, storage)


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """The complete checkpoints in a folder, oldest first, without those whose marker is damaged."""
    found = []
    for path in sorted(Path(folder).glob("step-*")):
        try:
            found.append(read_marker(path))
        except (FileNotFoundError, NotADirectoryError, DamagedCheckpoint):
            continue
    return found


def mirrored(mirror: Mirror) -> list[CheckpointInfo]:
    """The complete checkpoints of a run's mirror, oldest first, without those whose marker is damaged; their paths are names
    alone.
    """
    found = []
    for name, marker in mirror.markers().items():
        try:
            found.append(parse_marker(Path(name), marker))
        except DamagedCheckpoint:
            continue
    return found


def best_of(checkpoints: list[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The checkpoint with the best value of a metric, of equal ones the earliest; None if none has it.

    What is no finite number is never the best.
    """
    best = None
    for checkpoint in sorted(checkpoints, key=lambda c: c.step):
        value = checkpoint.metrics.get(metric, math.nan)
        higher = metric in checkpoint.higher_is_better
        if math.isfinite(value) and (best is None or is_better(value, best.metrics[metric], higher)):
            best = checkpoint
    return best


def is_better(value: float, than: float, higher: bool) -> bool:
    """Whether a metric's value is better than another; equal ones and NaN are not."""
    return value > than if higher else value < than


def choose_checkpoint(folder: str | Path, which: str, metric: str) -> CheckpointInfo:
    """The checkpoint named "last", "best" (the last, where none has the metric) or by its step.

    Raises:
        UserError: there is none, or none of that step, or a damaged marker hides it; names the ones there are.
    """
    checkpoints, damaged = [], {}
    for path in sorted(Path(folder).glob(f"step-*/{MARKER}")):
        try:
            checkpoints.append(read_marker(path.parent))
        except FileNotFoundError:  # removed just now
            continue
        except DamagedCheckpoint as error:
            damaged[path.parent.name.removeprefix("step-").lstrip("0")] = error
    steps = ", ".join(str(c.step) for c in checkpoints)
    wanted = which.removeprefix("step-").lstrip("0")
    if which in ("last", "best"):
        if damaged:
            others = f"; choose one of the steps {steps}, or continue the training, which sets it aside" if steps else ""
            raise DamagedCheckpoint(f"{next(iter(damaged.values()))}{others}")
        if not checkpoints:
            raise UserError(f"{folder} holds no complete checkpoint")
        return (best_of(checkpoints, metric) if which == "best" else None) or checkpoints[-1]
    if wanted in damaged:
        raise damaged[wanted]
    for checkpoint in checkpoints:
        if wanted == str(checkpoint.step):
            return checkpoint
    if not checkpoints:
        raise UserError(f"{folder} holds no complete checkpoint")
    raise UserError(f"checkpoint {which!r} does not exist: say best, last or one of the steps {steps}")
