"""Finds workers that have stopped: they report what they do every few seconds, and the driver ends those that are silent or stand still.

Ray replaces a worker that dies. One that stands (stopped, cut off, waiting for ever) is not dead: the others would wait for its part
of a step without end, and accelerators would be held.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed

from perceiver.training.callbacks import Callback
from perceiver.training.loop import StepResult
from ray_jobs.mailbox import Beat

EVERY = 5.0
"""Seconds between two reports of a worker."""
SILENCE = 60.0
"""Seconds without a report after which a worker is ended."""
PROJECT = Path(__file__).resolve().parent.parent
COLLECTIVES = Path(torch.distributed.__file__).resolve().parent


class Steps(Callback):
    """Counts a worker's steps for its reports."""

    def __init__(self) -> None:
        self.taken = 0

    def on_start(self, training: Any) -> None:
        self.taken = training.step

    def after_step(self, step: int, result: StepResult) -> None:
        self.taken = step


@contextmanager
def reporting(send: Callable[[Beat], None], rank: int, node: str, host: str, steps: Steps, every: float = EVERY) -> Iterator[None]:
    """Reports from a thread what the calling thread does, until the body ends."""
    watched, over = threading.get_ident(), threading.Event()
    beat = Beat(rank, os.getpid(), node, host, steps.taken, "", False)

    def report() -> None:
        while not over.wait(every):
            place, together = where(watched)
            send(replace(beat, step=steps.taken, place=place, together=together))

    send(beat)
    thread = threading.Thread(target=report, name="reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        send(replace(beat, step=steps.taken, ended=True))


def where(thread: int) -> tuple[str, bool]:
    """The innermost line of this package that a thread is at, and whether it is in a collective operation there."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "", False
    together = False
    for inner in reversed(traceback.extract_stack(frame)):
        path = Path(inner.filename)
        together = together or COLLECTIVES in path.parents
        if PROJECT in path.parents and "site-packages" not in path.relative_to(PROJECT).parts:
            return f"{inner.name} ({path.name}, line {inner.lineno})", together
    return "", together


@dataclass
class _Seen:
    beat: Beat
    heard: float
    """When it reported last."""
    moved: float
    """When it last reported another place or step than before."""


class Watch:
    """What the driver knows of its workers.

    Args:
        stall: seconds at one line, in one step, after which a worker stands still.
        silence: seconds without a report after which it is silent.
    """

    def __init__(self, stall: float, silence: float = SILENCE) -> None:
        self._stall, self._silence = stall, silence
        self._seen: dict[int, _Seen] = {}

    def hear(self, beat: Beat, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if beat.ended:
            if beat.rank in self._seen and self._seen[beat.rank].beat.pid == beat.pid:
                del self._seen[beat.rank]
            return
        before = self._seen.get(beat.rank)
        moved = before.moved if before is not None and before.beat == beat else now
        self._seen[beat.rank] = _Seen(beat, now, moved)

    def pause(self, seconds: float) -> None:
        """Takes time off, in which no report could be heard."""
        for seen in self._seen.values():
            seen.heard += seconds
            seen.moved += seconds

    def overdue(self, now: float | None = None) -> tuple[Beat, str] | None:
        """A worker that must be ended, and why. None: all are well.

        It is then forgotten, and the others have their time anew: they cannot move before it is replaced.
        """
        now = time.monotonic() if now is None else now
        for seen in self._seen.values():
            if now - seen.heard > self._silence:
                self._forget(seen, now)
                return seen.beat, f"has not answered for {now - seen.heard:.0f} s (it was at {_at(seen.beat)})"
        standing = [seen for seen in self._seen.values() if now - seen.moved > self._stall]
        if not standing or len(standing) < len(self._seen):
            return None  # while one moves, the others may wait for it
        # Who waits for the others is not the one that they wait for; one that says nothing any more is.
        silent = {s.beat.rank for s in standing if now - s.heard > 4 * EVERY}
        seen = min(standing, key=lambda s: (s.beat.rank not in silent, s.beat.together, s.beat.step, s.beat.rank))
        self._forget(seen, now)
        others = "" if len(standing) == 1 else "; the others wait for it"
        if seen.beat.rank in silent:
            return seen.beat, f"has not answered for {now - seen.heard:.0f} s (it was at {_at(seen.beat)}){others}"
        return seen.beat, f"has stood for {now - seen.moved:.0f} s at {_at(seen.beat)}{others}"

    def _forget(self, ended: _Seen, now: float) -> None:
        del self._seen[ended.beat.rank]
        for seen in self._seen.values():
            seen.moved = now


def _at(beat: Beat) -> str:
    return f"step {beat.step:,}" + (f", in {beat.place}" if beat.place else "")


def end_process(pid: int, title: str = "ray::RayTrainWorker") -> bool:
    """Ends a worker on this machine, whatever state it is in. Whether there was one."""
    try:
        if not Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
            return False
        os.kill(pid, signal.SIGKILL)
    except (OSError, UnicodeDecodeError):
        return False
    return True
