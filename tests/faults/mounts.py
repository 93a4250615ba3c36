"""Small and read-only file systems, mounted over folders: what a full disk and read-only storage are to a run. They need root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def mounted(folder: Path, *options: str) -> bool:
    """Mounts something over a folder; whether this process may."""
    return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    """Also where something still has files open there."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


@contextmanager
def small(folder: Path, size: str) -> Iterator[bool]:
    """A folder on a file system of its own of this number of bytes; False: it cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    there = mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield there
    finally:
        if there:
            unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """A folder in which nothing can be made or changed; False: it cannot be had."""
    there = mounted(folder, "--bind", str(folder))
    try:
        yield there and mounted(folder, "-o", "remount,bind,ro")
    finally:
        if there:
            unmount(folder)


def fill(folder: Path) -> Path:
    """A file that takes what is left of a folder's file system, also what was freed since it was filled before."""
    path = folder / "fill"
    with open(path, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path
