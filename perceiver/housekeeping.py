"""Order among runs: tags and notes, and what may be removed of them. Needs no PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from perceiver.checkpoints import best_of, damaged_name
from perceiver.config import UserError
from perceiver.disk import to_disk, write_json
from perceiver.runs import Run, held


@dataclass(frozen=True)
class Labels:
    """What a person says of a run."""

    tags: tuple[str, ...] = ()
    """In alphabetical order."""
    note: str = ""


def read_labels(run: Run) -> Labels:
    """A run's tags and note; none where they were never given, or their file is damaged."""
    try:
        content = json.loads(run.labels_file.read_bytes())
        return Labels(tuple(sorted(map(str, content["tags"]))), str(content["note"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Labels()


def save_labels(run: Run, labels: Labels) -> None:
    """Writes a run's tags and note."""
    write_json(run.labels_file, {"tags": sorted(set(labels.tags)), "note": labels.note})


# ------------------------------------------------------------------------------------------------------------------ sizes


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files and folders; what a link points at is not counted."""
    total = 0
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            total += size_of(path.iterdir())
        else:
            total += path.lstat().st_size
    return total


def readable_size(size: float) -> str:
    """Bytes as a person reads them: 1.2 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# --------------------------------------------------------------------------------------------------------------- removal


def own_files(run: Run) -> list[Path]:
    """What in a run's folder is provably the run's: what has a name that only this package gives there."""
    names = run.own_names
    return [path for path in sorted(run.folder.iterdir()) if any(path.match(name) for name in names)]


def foreign_files(run: Run) -> list[Path]:
    """What else lies in a run's folder."""
    own = set(own_files(run))
    return [path for path in sorted(run.folder.iterdir()) if path not in own]


@contextmanager
def unused(runs: Sequence[Run]) -> Iterator[None]:
    """Holds runs that are to be changed, so that none of them is trained meanwhile.

    Raises:
        UserError: one is being trained, or is a trial of a sweep that runs; or is a link to a folder elsewhere.
    """
    with ExitStack() as stack:
        for run in runs:
            if run.folder.is_symlink():
                raise UserError(f"{run.folder} is a link: name the folder that it leads to")
            if run.is_trial_of_running_sweep:
                raise UserError(f"{run.folder} is a trial of a sweep that is running: wait for it or stop it")
            stack.enter_context(held(run.folder))
        yield


def remove(run: Run) -> list[Path]:
    """Removes a run. Call it within `unused`.

    Returns:
        What was left in its folder, as it is not the run's. Without such files the folder itself is gone.
    """
    for path in own_files(run):
        _remove(path)
    left = sorted(run.folder.iterdir())
    if not left:
        run.folder.rmdir()
    return left


def archive(run: Run, target: Path) -> None:
    """Packs a run, with all that lies in its folder, into a tar file, and checks that it is all there. The run stays.

    Raises:
        UserError: the file exists already, or does not hold what was packed.
    """
    if target.exists():
        raise UserError(f"{target} exists already: name another folder by --to, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(temporary, "w") as file:
            file.add(run.folder, run.name, filter=lambda member: None if run.is_lock(member.name) else member)
        with tarfile.open(temporary) as file:
            packed = {member.name: member.size for member in file if member.isfile()}
        wanted = {
            str(Path(run.name) / path.relative_to(run.folder)): path.stat().st_size
            for path in run.folder.rglob("*")
            if path.is_file() and not path.is_symlink() and not run.is_lock(path.name)
        }
        if packed != wanted:
            raise UserError(f"{run.folder} changed while it was packed: try again")
        to_disk(temporary)
        os.replace(temporary, target)
        to_disk(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def losers(runs: Sequence[Run], metric: str, keep: int) -> tuple[list[Run], list[Run]]:
    """Runs whose best checkpoint is among the best `keep` by a metric, best first; and the others."""
    found = {run: best_of(run.checkpoints(), metric) for run in runs}
    having = {run: best for run, best in found.items() if best is not None}
    sign = -1 if any(metric in best.higher_is_better for best in having.values()) else 1
    order = sorted(having, key=lambda run: sign * having[run].metrics[metric])
    return order[:keep], [*order[keep:], *(run for run in runs if run not in having)]


def superfluous(run: Run, metric: str, winner: bool) -> list[Path]:
    """Checkpoints of a run that may go: of a winner all but the best and the last; of others all. Damaged ones go, too."""
    checkpoints = run.checkpoints()
    kept = set()
    if winner and checkpoints:
        kept.add(checkpoints[-1].path)
        if (best := best_of(checkpoints, metric)) is not None:
            kept.add(best.path)
    folders = sorted({each.path for each in checkpoints} | set(run.checkpoints_folder.glob(damaged_name("*"))))
    return [path for path in folders if path not in kept and not path.is_symlink()]


def remove_checkpoints(paths: Iterable[Path]) -> None:
    """Removes checkpoints. Call it within `unused`."""
    for path in paths:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
