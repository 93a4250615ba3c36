"""Where lines of progress go: the terminal, a run's log file, and from workers to the driver. All of them are logged by the modules
that have something to say (`logging.getLogger(__name__)`).
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOGGERS = ("perceiver", "ray_jobs", "tuning")
"""The packages of this project, whose modules log."""


def show_progress(argv: Sequence[str]) -> list[str]:
    """Shows progress on standard output: all of it, with `--verbose` details besides, with `--quiet` warnings alone.

    Returns:
        The other arguments.
    """
    level = logging.DEBUG if "--verbose" in argv else logging.WARNING if "--quiet" in argv else logging.INFO
    handler = _Terminal()
    handler.setLevel(level)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [other for other in logger.handlers if not isinstance(other, _Terminal)] + [handler]
        logger.setLevel(min(level, logging.INFO))  # a log file has all that is usual, whatever is shown
        logger.propagate = False
    return [word for word in argv if word not in ("--verbose", "--quiet")]


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Writes what is logged meanwhile to the end of a file, each line with its time."""
    handler = _File(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


def send_progress(send: Callable[[tuple[int, str]], None]) -> None:
    """Gives what this process logs from now on, as level and text, to a function."""
    handler = _Sender(send)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [other for other in logger.handlers if not isinstance(other, _Sender)] + [handler]
        logger.setLevel(logging.INFO)


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stdout, flush=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            # Output goes to a file on a disk that is full: what it says is no reason to end what it is about. Python tries it again.


class _Sender(logging.Handler):
    def __init__(self, send: Callable[[tuple[int, str]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send((record.levelno, self.format(record)))


class _File(logging.FileHandler):
    """A log file that may fail to be written (the disk is full): nothing else fails with it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening it; errors of writing are handled below
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            print(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
        self._failed = True

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what it still held cannot be written either
            pass
