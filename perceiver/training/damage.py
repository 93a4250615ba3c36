"""Damaged checkpoints, and what a checkpoint may name."""

from __future__ import annotations

from pathlib import Path

from perceiver.config import UserError


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, cut, changed, or not what a checkpoint holds."""


def plain_name(name: str) -> str:
    """A name of a file in the checkpoint's own folder."""
    if not isinstance(name, str) or not name or name != Path(name).name:
        raise ValueError(f"it names the file {name!r}")
    return name
