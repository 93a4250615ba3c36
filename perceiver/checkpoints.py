"""The checkpoints of a run: what their markers say, and which of them is meant. Read without PyTorch.

A checkpoint is a folder `step-00001234`. It counts when its marker, which is written last, is there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from perceiver.config import UserError
from perceiver.config.optimization import averaged_metric, averaged_of
from perceiver.disk import json_bytes

MARKER = "checkpoint.json"
"""Written into a checkpoint's folder when all else is there."""
STEPS = "step-*"
"""The folders of checkpoints among the names in a folder."""
Files = dict[str, tuple[int, str]]
"""Size and sha256 of files, by name."""


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, cut, changed, or not what a checkpoint holds."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint, as its marker describes it."""

    path: Path
    step: int
    metrics: dict[str, float]
    """Of a validation at this very step; empty where there was none."""
    higher_is_better: frozenset[str] = frozenset()
    """Names of those of the metrics of which higher values are better."""
    files: Files | None = None
    """All files but the marker; None: written before hashes were recorded."""


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder. Sorted by name, checkpoints are sorted by step."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int:
    """The step in a checkpoint's name.

    Raises:
        ValueError: it is no such name.
    """
    return int(name.removeprefix("step-"))


def damaged_name(name: str) -> str:
    """The name under which a damaged checkpoint does not count any more."""
    return f"damaged-{name}"


def plain_name(name: str) -> str:
    """A name of a file in the checkpoint's own folder."""
    if not isinstance(name, str) or not name or name != Path(name).name:
        raise ValueError(f"it names the file {name!r}")
    return name


# ----------------------------------------------------------------------------------------------------------------- markers


def marker_content(checkpoint: CheckpointInfo) -> bytes:
    """The content of a checkpoint's marker."""
    assert checkpoint.files is not None
    content = {
        "step": checkpoint.step,
        "metrics": checkpoint.metrics,
        "higher_is_better": sorted(checkpoint.higher_is_better),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in checkpoint.files.items()},
    }
    return json_bytes(content)


def parse_marker(path: Path, content: bytes) -> CheckpointInfo:
    """What a checkpoint's marker says.

    Args:
        path: the checkpoint's folder.

    Raises:
        DamagedCheckpoint: it is not what `marker_content` writes.
    """
    try:
        data = json.loads(content)
        step, metrics, files = data["step"], data["metrics"], data.get("files")
        # Checkpoints written before the direction was recorded know one metric of which more is better.
        higher = data.get("higher_is_better", [name for name in metrics if name.partition("/")[0] == "val_acc"])
        if type(step) is not int or path.name != checkpoint_name(step):
            raise ValueError(f"its step is {step!r}")
        if not all(isinstance(name, str) for name in higher):
            raise TypeError
        return CheckpointInfo(
            path,
            step,
            {name: math.nan if value is None else float(value) for name, value in metrics.items()},
            frozenset(higher),
            None if files is None else {plain_name(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f" ({error})" if type(error) is ValueError else ""
        raise DamagedCheckpoint(f"{path / MARKER} is damaged: it is no marker of a complete checkpoint{reason}") from error


def read_marker(path: Path) -> CheckpointInfo:
    """What the marker in a checkpoint's folder says.

    Raises:
        FileNotFoundError: there is none, so the checkpoint is not complete.
        DamagedCheckpoint: it is damaged.
    """
    try:
        content = (path / MARKER).read_bytes()
    except IsADirectoryError:
        content = b""
    return parse_marker(path, content)


def marked(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have a marker, be it damaged, oldest first."""
    return sorted(path.parent for path in folder.glob(f"{STEPS}/{MARKER}"))


# ------------------------------------------------------------------------------------------------------------------- choice


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """The complete checkpoints in a folder, oldest first, without those whose marker is damaged."""
    found = []
    for path in marked(Path(folder)):
        try:
            found.append(read_marker(path))
        except (FileNotFoundError, NotADirectoryError, DamagedCheckpoint):  # removed just now, or damaged
            continue
    return found


def best_of(checkpoints: list[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The checkpoint with the best value of a metric, of equal ones the earliest; None if none has it.

    What is no finite number is never the best.
    """
    return next(iter(best_first(checkpoints, metric)), None)


def best_first(checkpoints: list[CheckpointInfo], metric: str) -> list[CheckpointInfo]:
    """The checkpoints with a finite value of a metric, the best first, of equal ones the earliest."""
    having = [c for c in sorted(checkpoints, key=lambda c: c.step) if math.isfinite(c.metrics.get(metric, math.nan))]
    return sorted(having, key=lambda c: -c.metrics[metric] if metric in c.higher_is_better else c.metrics[metric])


def is_better(value: float, than: float, higher: bool) -> bool:
    """Whether a metric's value is better than another; equal ones and NaN are not."""
    return value > than if higher else value < than


def choose_checkpoint(folder: str | Path, which: str, metric: str) -> CheckpointInfo:
    """The checkpoint named "last", "best" (the last, where none has the metric) or by its step; with ":ema" after that, the best by the
    metric of averaged weights.

    Raises:
        UserError: there is none, or none of that step, or a damaged marker hides it; names the ones there are.
    """
    name, is_averaged = averaged_of(which)
    metric = averaged_metric(metric) if is_averaged and not metric.startswith("val_ema_") else metric
    checkpoints, damaged = [], {}
    for path in marked(Path(folder)):
        try:
            checkpoints.append(read_marker(path))
        except FileNotFoundError:  # removed just now
            continue
        except DamagedCheckpoint as error:
            damaged[_step_of(path.name)] = error
    steps = ", ".join(str(c.step) for c in checkpoints)
    wanted = _step_of(name)
    if name in ("last", "best"):
        if damaged:
            others = f"; choose one of the steps {steps}, or continue the training, which sets it aside" if steps else ""
            raise DamagedCheckpoint(f"{next(iter(damaged.values()))}{others}")
        if not checkpoints:
            raise UserError(f"{folder} holds no complete checkpoint")
        return (best_of(checkpoints, metric) if name == "best" else None) or checkpoints[-1]
    if wanted in damaged:
        raise damaged[wanted]
    for checkpoint in checkpoints:
        if wanted == str(checkpoint.step):
            return checkpoint
    if not checkpoints:
        raise UserError(f"{folder} holds no complete checkpoint")
    raise UserError(f"checkpoint {which!r} does not exist: say best, last or one of the steps {steps}")


def _step_of(name: str) -> str:
    """The step in a checkpoint's name, or in what a user wrote for it."""
    return name.removeprefix("step-").lstrip("0")
