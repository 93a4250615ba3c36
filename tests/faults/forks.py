"""Functions in forked processes: a start costs a moment, as all is imported."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from perceiver.data.manifest import DamagedData
from perceiver.training.not_finite import NotFinite

PATIENCE = 180.0
"""Seconds within which something must happen."""
STATUS = {NotFinite: 3, DamagedData: 4, OSError: 5}
"""Exit status of a process by what ended it."""


class Child:
    """A function in a forked process. Its lines come through a pipe: full disks and limits of files do not stop them."""

    def __init__(self, function: Callable[[], object], before: str = "") -> None:
        self.status: int | None = None
        self._output = before
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, written = os.pipe()
        os.set_blocking(self._pipe, False)
        self.pid = os.fork()
        if self.pid == 0:
            self._be(function, written)
        os.close(written)

    def _be(self, function: Callable[[], object], written: int) -> None:
        status = 1
        try:
            os.dup2(written, 1)
            os.dup2(written, 2)
            logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
            function()
            status = 0
        except BaseException as error:
            status = next((number for kind, number in STATUS.items() if isinstance(error, kind)), 1)
            logging.error("%s: %s", type(error).__name__, error, exc_info=error if status == 1 else None)
        finally:
            sys.stdout.flush()
            os._exit(status)

    @property
    def output(self) -> str:
        """What it has written, after what those before it have."""
        while self._pipe is not None:
            try:
                new = os.read(self._pipe, 2**16)
            except BlockingIOError:
                break
            if not new:
                os.close(self._pipe)
                self._pipe = None
            self._output += new.decode(errors="replace")
        return self._output

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            _ = self.output  # or it would wait for room in the pipe
        return self.status is not None

    def until(self, condition: Callable[[], bool], every: float = 0.03) -> bool:
        """Waits for a condition; whether it came before the process ended."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.ended():
                return condition()
            assert time.monotonic() < end, f"nothing within {PATIENCE:.0f} s: {self.output[-300:]}"
            time.sleep(every)
        return True

    def wait(self) -> int:
        self.until(self.ended)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
