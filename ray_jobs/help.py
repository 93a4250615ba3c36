"""`--help` of a preset, kept from the first time: to make it takes all models and tasks, and so seconds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from perceiver.config import home
from perceiver.disk import whole_file

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("perceiver", "ray_jobs", "tuning")


def show_help(command: str, preset: str, make: Callable[[], object]) -> None:
    """Prints the help of a command with a preset: as it was kept, or made and then kept.

    Args:
        command: of `perceiver`.
        preset: of the package: experiments of others may change in ways that are not seen here.
        make: prints the help.
    """
    folder = home() / "cache" / "help"
    path = folder / f"{command}-{preset}-{_state()}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = _made(make)
        with contextlib.suppress(OSError):  # a home that cannot be written costs the seconds again
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f"{command}-{preset}-*.txt"):
                old.unlink(missing_ok=True)
            with whole_file(path) as file:
                file.write(text.encode("utf-8"))
    sys.stdout.write(text)


def _made(make: Callable[[], object]) -> str:
    output = _Captured(sys.stdout.isatty(), sys.stdout.encoding)
    try:
        with contextlib.redirect_stdout(output):
            make()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise
    return output.getvalue()


class _Captured(io.StringIO):
    """What is printed, by a program that asks whether a person will see it and which letters can be shown."""

    def __init__(self, terminal: bool, encoding: str) -> None:
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


def _state() -> str:
    """Hash of all that the text depends on: this package's files, the library that lays it out, the terminal, how it is started."""
    try:
        library = version("tyro")
    except PackageNotFoundError:
        library = ""
    parts = [
        library,
        sys.version,
        Path(sys.argv[0]).name,
        str(sys.stdout.isatty()),
        sys.stdout.encoding,
        str(shutil.get_terminal_size().columns),
    ]
    parts += [os.environ.get(name, "") for name in ("TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR")]
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            status = path.stat()
            parts.append(f"{path} {status.st_mtime_ns} {status.st_size}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
