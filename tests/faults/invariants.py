"""What must hold of a disturbed run: it ends as an undisturbed one, and leaves nothing behind."""

from collections import Counter
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from perceiver.checkpoints import list_checkpoints
from perceiver.disk import is_locked
from tests.support.jobs import losses, weights


def broken(run: Path, plain: Path, outputs: list[str], left: list[str]) -> list[str]:
    """The invariants that do not hold of a run on Ray, each in a sentence; none: all hold.

    Args:
        outputs: of its commands.
        left: what of it is left on its cluster.
    """
    found = [*differing(run, plain), *(f"{what} is left" for what in left)]
    if any("Traceback" in output for output in outputs):
        found.append("a traceback was printed")
    return found


def differing(run: Path, plain: Path) -> list[str]:
    """What a run's folder does not have as the undisturbed one has it, and what it has besides."""
    found = []
    one, other = (weights(list_checkpoints(folder / "checkpoints")[-1].path) for folder in (run, plain))
    if one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one):
        found.append("the final weights are not those of the undisturbed run")
    # A step's loss is that of its rows at its weights: equal losses are equal rows in an equal order, each once an epoch.
    if losses(run) != losses(plain):
        found.append("losses or steps on record are not those of the undisturbed run")
    if board(run) != board(plain):
        found.append("TensorBoard has other steps than the undisturbed run, or some twice")
    if left := [path.name for path in run.rglob("*.tmp")]:
        found.append(f"temporary files are left: {', '.join(left)}")
    if is_locked(run / ".lock"):
        found.append("the run is still locked")
    return found


def board(run: Path) -> Counter:
    """How often TensorBoard shows each loss: of steps that were taken again, only the last start's."""
    shown: dict[tuple[str, int], int] = Counter()
    for path in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                for key in [key for key in shown if key[1] >= event.step]:
                    del shown[key]
            for value in event.summary.value:
                if value.tag == "train/loss":
                    shown[value.tag, event.step] += 1
    return Counter(shown)
