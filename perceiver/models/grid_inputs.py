"""Audio, video and images in patches: inputs that are vectors over a fixed grid, with Fourier features of the grid.

Cross-attention to all but patches of images may be factored (`factored_attention.py`), as that to pixels.

Shapes: B batch, N input positions, P numbers of a position.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.inputs import GridAdapter, ImageInput, InputConfig
from perceiver.models.tensor_shapes import Shape

FULL_SCALE = 32767.0
"""Value of a 16-bit sample of 1."""


class AudioInput(InputConfig):
    """Raw samples in groups: each group is an input position. A batch holds (B, samples), floats from -1 to 1 or int16."""

    has_cost_formulas: ClassVar[bool] = False

    num_samples: int = 30720
    """Samples of an example."""
    group: int = 16
    """Samples of an input position."""
    num_frequency_bands: int = 192
    """Fourier bands of the time."""
    resolution: int | None = None
    """Points of time that have features of their own: the highest frequency is half of it; None: the input positions."""

    def build(self) -> nn.Module:
        return AudioAdapter(self)

    def adapted_channels(self) -> int:
        return self.group + 2 * self.num_frequency_bands + 1

    def num_positions(self) -> int:
        return self.num_samples // self.group

    def batch_shape(self) -> Shape:
        return "B", self.num_samples

    @property
    def factorable(self) -> bool:
        return True

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where)
        if self.num_samples % self.group:
            raise UserError(f"{where}group is {self.group} and must divide {where}num-samples, {self.num_samples}")


class AudioAdapter(GridAdapter):
    """Samples in groups, with positions."""

    def __init__(self, config: AudioInput) -> None:
        super().__init__(
            (config.num_positions(),),
            config.num_frequency_bands,
            config.group,
            None if config.resolution is None else (config.resolution,),
        )
        self.group = config.group

    def points(self, x: Tensor) -> Tensor:
        """(B, samples) -> (B, N, group)."""
        if not x.is_floating_point():
            x = x.float() / FULL_SCALE
        return x.unflatten(1, (-1, self.group))

    def forward(self, x: Tensor) -> Tensor:
        """(B, samples) -> (B, N, channels)."""
        return self.with_positions(self.points(x))


class VideoInput(InputConfig):
    """Patches of frames. A batch holds (B, frames, height, width, channels)."""

    has_cost_formulas: ClassVar[bool] = False

    video_shape: tuple[int, int, int, int] = (16, 224, 224, 3)
    """Frames, height, width, channels."""
    patch: tuple[int, int, int] = (1, 4, 4)
    """Frames, height and width of a patch."""
    num_frequency_bands: int = 32
    """Fourier bands per axis."""

    def build(self) -> nn.Module:
        return VideoAdapter(self)

    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(size // of for size, of in zip(self.video_shape[:3], self.patch, strict=True))

    def adapted_channels(self) -> int:
        return math.prod(self.patch) * self.video_shape[3] + 3 * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        return math.prod(self.grid())

    def batch_shape(self) -> Shape:
        return "B", *self.video_shape

    @property
    def factorable(self) -> bool:
        return True

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where)
        if min(*self.video_shape, *self.patch) < 1:
            raise UserError(f"{where}video-shape is {self.video_shape} and {where}patch {self.patch}: all sizes must be at least 1")
        if any(size % of for size, of in zip(self.video_shape, self.patch, strict=False)):
            raise UserError(f"{where}patch is {self.patch} and must divide {where}video-shape, {self.video_shape[:3]}")


class VideoAdapter(GridAdapter):
    """Patches of frames, with positions."""

    def __init__(self, config: VideoInput) -> None:
        super().__init__(config.grid(), config.num_frequency_bands, math.prod(config.patch) * config.video_shape[3])
        self.patch = config.patch

    def points(self, x: Tensor) -> Tensor:
        """(B, frames, height, width, channels) -> (B, N, numbers of a patch): frames, rows, columns, channels."""
        for axis, size in zip((1, 3, 5), self.patch, strict=True):
            x = x.unflatten(axis, (-1, size))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, frames, height, width, channels) -> (B, N, channels)."""
        return self.with_positions(self.points(x))


class StemInput(ImageInput):
    """An image in patches, or after a convolution, with Fourier position features."""

    has_cost_formulas: ClassVar[bool] = False

    stem: Literal["patches", "convolution"] = "patches"
    """patches: each patch is projected; convolution: 7 x 7 with stride 2, norm, ReLU, and the maximum of 3 x 3 with stride 2."""
    patch_size: int = 4
    """Of patches: pixels along each side."""
    num_channels: int = 64
    """Channels of a position, without its position features."""

    def build(self) -> nn.Module:
        return StemAdapter(self)

    def grid(self) -> tuple[int, int]:
        """Positions along each side."""
        step = self.patch_size if self.stem == "patches" else 4
        height, width, _ = self.image_shape
        return -(-height // step), -(-width // step)

    def adapted_channels(self) -> int:
        return self.num_channels + 2 * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        return math.prod(self.grid())

    @property
    def factorable(self) -> bool:
        return self.stem == "convolution"  # channels of patches are not few: keys and values cost less

    def check(self, where: str) -> None:
        super().check(where)
        where = spelled(where)
        if self.stem == "patches" and any(size % self.patch_size for size in self.image_shape[:2]):
            raise UserError(f"{where}patch-size is {self.patch_size} and must divide {where}image-shape, {self.image_shape[:2]}")


class StemAdapter(GridAdapter):
    """An image's stem, with positions."""

    def __init__(self, config: StemInput) -> None:
        super().__init__(config.grid(), config.num_frequency_bands, config.num_channels)
        self.patches, colours = config.stem == "patches", config.image_shape[2]
        size = config.patch_size
        self.convolution = (
            nn.Conv2d(colours, config.num_channels, size, stride=size)
            if self.patches
            else nn.Conv2d(colours, config.num_channels, 7, stride=2, padding=3, bias=False)
        )
        self.norm = None if self.patches else nn.LayerNorm(config.num_channels)

    def points(self, x: Tensor) -> Tensor:
        """images (B, height, width, colours) -> (B, N, channels)."""
        x = self.convolution(x.permute(0, 3, 1, 2))
        if self.norm is not None:
            x = self.norm(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
            x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
        return x.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """images (B, height, width, colours) -> (B, N, channels + position features)."""
        return self.with_positions(self.points(x))
