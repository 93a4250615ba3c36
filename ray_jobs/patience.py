"""How long an answer of Ray is waited for: one that starves on a machine with too much to do is not taken for dead."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

LOST_AFTER = 60.0
"""Seconds without an answer of Ray after which the cluster is lost."""
STARVED_AFTER = 900.0
"""The same where Ray's own processes are on this machine, which is overloaded, and work."""
OVERLOADED = 2.0
"""Processes that want a core, for each core."""
SAY_AFTER = 30.0
"""Seconds between two lines that say that Ray is waited for."""


@dataclass(frozen=True)
class Work:
    """What a process has done."""

    seconds: float
    """Of processor time."""
    wants: bool
    """It runs, or would if it had a core."""


def work_of(pid: int) -> Work | None:
    """What a process of this machine has done; None: it is not there, it was stopped, or the system does not tell (Linux does)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    if fields[0] in "TtZX":
        return None
    return Work((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] in "RD")


class Patience:
    """Counts the seconds that an answer has not come in, and says when they are too many.

    Args:
        pids: Ray's own processes on this machine that the answer comes from; none where the cluster is elsewhere.
        say: takes the lines about a long wait.
        look: what a process has done.
        load: how many processes of this machine want a core, for each core.
    """

    def __init__(
        self, pids: Iterable[int], say: Callable[[str], None], look: Callable[[int], Work | None] = work_of,
        load: Callable[[], float] = lambda: os.getloadavg()[0] / (os.cpu_count() or 1), clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._pids, self._say, self._look, self._load, self._clock = list(pids), say, look, load, clock
        self._start = self._worked = self._said = clock()
        self._before = self._works()

    def is_lost(self) -> str | None:
        """Why the cluster counts as lost; None: it may answer yet. To be asked every second or so."""
        now, works = self._clock(), self._works()
        # A process that was stopped does not work, and one that hangs uses no processor time and wants none.
        alive = [(work, before) for work, before in zip(works, self._before, strict=True) if work is not None]
        works_still = any(work.wants or before is None or work.seconds > before.seconds for work, before in alive)
        if works_still and len(alive) == len(works) and self._load() > OVERLOADED:
            self._worked = now
        self._before = works
        waited = now - self._start
        if now - self._worked > LOST_AFTER or waited > STARVED_AFTER:
            return f"Ray has not answered for {waited:.0f} s"
        if waited > SAY_AFTER and now - self._said > SAY_AFTER:
            self._said = now
            self._say(f"Ray has not answered for {waited:.0f} s{self._why()}; waiting")
        return None

    def _works(self) -> list[Work | None]:
        return [self._look(pid) for pid in self._pids]

    def _why(self) -> str:
        return f": for each core of this machine there are {load:.0f} processes that want it" if (load := self._load()) > OVERLOADED else ""
