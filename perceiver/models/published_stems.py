"""Images as two of the published ImageNet classifiers take them (Perceiver IO, Table 6): with learned positions, and after a convolution.

Both are those of `deepmind/vision-perceiver-learned` and `deepmind/vision-perceiver-conv`.

Shapes: B batch, N input positions, C channels of an input position.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.inputs import ImageInput
from perceiver.models.position import coordinate_features


class LearnedPositionInput(ImageInput):
    """Every pixel attended, projected, with a learned position that is projected, too."""

    has_cost_formulas: ClassVar[bool] = False

    num_channels: int = 256
    """Channels of a pixel after its projection."""
    num_position_channels: int = 256
    """Channels of a position, learned and after its projection."""
    num_frequency_bands: int = 1
    """Not used: positions are learned."""

    def build(self) -> nn.Module:
        return LearnedPositionAdapter(self)

    def adapted_channels(self) -> int:
        return self.num_channels + self.num_position_channels

    @property
    def factorable(self) -> bool:
        return False


class LearnedPositionAdapter(nn.Module):
    """Projected pixels beside projected positions."""

    def __init__(self, config: LearnedPositionInput) -> None:
        super().__init__()
        self.linear = nn.Linear(config.image_shape[2], config.num_channels)
        self.positions = nn.Parameter(torch.empty(config.num_positions(), config.num_position_channels))
        self.position_projection = nn.Linear(config.num_position_channels, config.num_position_channels)

    def reset_buffers(self) -> None:
        """Nothing: all is learned."""

    def forward(self, x: Tensor) -> Tensor:
        """images (B, height, width, colours) -> (B, height * width, channels)."""
        points = self.linear(x.flatten(1, 2))
        return torch.cat([points, self.position_projection(self.positions).expand(len(points), -1, -1)], dim=-1)


class ConvolutionInput(ImageInput):
    """An image after a convolution (7 x 7, stride 2), ReLU and the maximum of 3 x 3 with stride 2, with Fourier position features.

    The published model's batch normalisation is that of evaluation, and part of the convolution.
    """

    has_cost_formulas: ClassVar[bool] = False

    num_channels: int = 64
    """Channels of the convolution."""
    num_frequency_bands: int = 64
    """Fourier bands per axis."""

    def build(self) -> nn.Module:
        return ConvolutionAdapter(self)

    def grid(self) -> tuple[int, int]:
        """Positions along each side."""
        height, width = (((size - 1) // 2 + 1 - 3) // 2 + 1 for size in self.image_shape[:2])
        return height, width

    def adapted_channels(self) -> int:
        return self.num_channels + 2 * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        return math.prod(self.grid())

    @property
    def factorable(self) -> bool:
        return False  # 64 channels of the convolution are not few: keys and values of its few positions cost less

    def check(self, where: str) -> None:
        super().check(where)
        if self.image_shape != (0, 0, 0) and min(self.grid()) < 1:
            raise UserError(f"{spelled(where)}image-shape is {self.image_shape} and must be at least 5 x 5 for a convolution")


class ConvolutionAdapter(nn.Module):
    """The convolution's channels, with the features of their positions."""

    position_encoding: Tensor

    def __init__(self, config: ConvolutionInput) -> None:
        super().__init__()
        self.config = config
        self.convolution = nn.Conv2d(config.image_shape[2], config.num_channels, 7, stride=2, padding=3)
        self.register_buffer("position_encoding", self._table(None), persistent=False)

    def _table(self, device: torch.device | None) -> Tensor:
        """Frequencies are those of the image's sides divided by 4, as the published model has them."""
        axes = [torch.linspace(-1.0, 1.0, size, device=device) for size in self.config.grid()]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        height, width, _ = self.config.image_shape
        return coordinate_features(points, (height // 4, width // 4), self.config.num_frequency_bands)

    def reset_buffers(self) -> None:
        """Computes the position table anew, in place (after `to_empty`)."""
        self.position_encoding.copy_(self._table(self.position_encoding.device))

    def forward(self, x: Tensor) -> Tensor:
        """images (B, height, width, colours) -> (B, N, channels)."""
        x = F.max_pool2d(self.convolution(x.permute(0, 3, 1, 2)).relu(), 3, stride=2)
        points = x.flatten(2).transpose(1, 2)
        return torch.cat([points, self.position_encoding.to(points.dtype).expand(len(points), -1, -1)], dim=-1)
