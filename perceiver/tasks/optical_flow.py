"""Optical flow: how the pixels of a frame move. Its model can be built; it is not trainable yet."""

from __future__ import annotations

from typing import ClassVar

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.tasks.base import Task


class OpticalFlowConfig(TaskConfig):
    """A flow vector per pixel of the first of two frames."""

    abilities: ClassVar[tuple[str, ...]] = ()

    patch_min_overlap: int = 20
    """Least overlap in pixels of the patches that a large image is cut into."""

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        raise UserError("optical flow is not trainable yet: its task comes with a later version (its model can be built)")
