"""Symbolic audio: the next event of a performance. Its model can be built; it is not trainable yet."""

from __future__ import annotations

from typing import ClassVar

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.tasks.base import Task


class SymbolicAudioConfig(TaskConfig):
    """Next-event prediction on windows of MIDI events."""

    abilities: ClassVar[tuple[str, ...]] = ()

    min_seq_len: int | None = None
    """Windows are cut to a random length from here to max_seq_len in training; None: all of max_seq_len."""

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        raise UserError("symbolic audio is not trainable yet: its task comes with a later version (its model can be built)")
