"""Any array of floats as an input: measurements, point clouds, sets, embeddings of another model.

Shapes: B batch, N input positions, F features of a position, D coordinates of a position, C channels.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.initialize import Embedding
from perceiver.models.inputs import InputConfig
from perceiver.models.position import coordinate_features, fourier_features, rotation
from perceiver.models.tensor_shapes import Shape, Size


class ArrayInput(InputConfig):
    """Vectors of floats, projected, with positions. A batch holds (B, N, F), or a mapping of values, coordinates and mask."""

    has_cost_formulas: ClassVar[bool] = False

    num_features: int = 1
    """F, numbers of an input position."""
    max_positions: int = 128
    """N at most."""
    num_channels: int = 64
    """Channels that the features are projected to."""
    positions: Literal["none", "learned", "fourier", "rotary"] = "learned"
    """none: a set; learned: a vector for each position, added; fourier: features of a grid or of given coordinates, appended; rotary:
    pairs of channels rotated by the first given coordinate, or by the number of the position."""
    grid: tuple[int, ...] = ()
    """Of fourier: sizes of the grid that the positions fill, row by row; none: the batch has coordinates."""
    num_coordinates: int = 0
    """D, coordinates of a position in the batch: from -1 to 1 for fourier, in any unit for rotary; 0: none."""
    num_frequency_bands: int = 16
    """Of fourier: bands per axis."""
    resolution: int = 32
    """Of fourier and given coordinates: points along an axis that differ in it."""

    def build(self) -> nn.Module:
        return ArrayAdapter(self)

    def num_axes(self) -> int:
        """Axes of the Fourier features."""
        return (len(self.grid) or self.num_coordinates) if self.positions == "fourier" else 0

    def adapted_channels(self) -> int:
        return self.num_channels + self.num_axes() * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        return math.prod(self.grid) if self.grid else self.max_positions

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def batch_shape(self) -> Shape:
        positions: Size = self.num_positions() if self.grid else ("N", self.max_positions) if self.positions == "learned" else "N"
        return "B", positions, self.num_features

    def adapting_flops(self, num_positions: int) -> float:
        return 2.0 * num_positions * self.num_features * self.num_channels

    def check(self, where: str) -> None:
        where = spelled(where)
        if self.num_coordinates < 0:
            raise UserError(f"{where}num-coordinates is {self.num_coordinates} and must be at least 0")
        check_sizes(self, where, except_for="num_coordinates")
        if self.grid and min(self.grid) < 1:
            raise UserError(f"{where}grid is {self.grid}, but all its sizes must be at least 1")
        if self.grid and (self.positions != "fourier" or self.num_coordinates):
            raise UserError(f"{where}grid is {self.grid}, which needs {where}positions fourier and {where}num-coordinates 0")
        if self.positions == "fourier" and not self.num_axes():
            raise UserError(f"{where}positions is fourier, which needs {where}grid or {where}num-coordinates")
        if self.positions in ("none", "learned") and self.num_coordinates:
            raise UserError(
                f"{where}num-coordinates is {self.num_coordinates}, which needs {where}positions fourier or rotary, not {self.positions}"
            )
        if self.positions == "rotary" and self.num_channels % 2:
            raise UserError(f"{where}num-channels is {self.num_channels} and must be even for {where}positions rotary")


def parts_of(x: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values, coordinates and mask (True = padding) of what a batch holds: a tensor of values, or a mapping."""
    return (x, None, None) if isinstance(x, Tensor) else (x["values"], x.get("coordinates"), x.get("mask"))


class ArrayAdapter(nn.Module):
    """Values (B, N, F) to (B, N, C), and the mask where the batch has one."""

    table: Tensor | None

    def __init__(self, config: ArrayInput) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.num_features, config.num_channels)
        self.pos_embedding = Embedding(config.max_positions, config.num_channels) if config.positions == "learned" else None
        self.register_buffer("table", fourier_features(config.grid, config.num_frequency_bands) if config.grid else None, persistent=False)

    def reset_buffers(self) -> None:
        """Computes the table of the grid anew, in place (after `to_empty`)."""
        if self.table is not None:
            self.table.copy_(fourier_features(self.config.grid, self.config.num_frequency_bands, self.table.device))

    def forward(self, x: Any) -> Tensor | tuple[Tensor, Tensor]:
        values, coordinates, mask = parts_of(x)
        found = self._positioned(self.linear(values.to(self.linear.weight.dtype)), coordinates)
        return found if mask is None else (found, mask)

    def _positioned(self, x: Tensor, coordinates: Tensor | None) -> Tensor:
        config = self.config
        if self.pos_embedding is not None:
            return x + self.pos_embedding.weight[: x.shape[1]]
        if config.positions == "rotary":
            first = torch.arange(x.shape[1], device=x.device)[None] if coordinates is None else coordinates[..., 0]
            return rotation(first.float(), x.shape[-1])(x[:, None])[:, 0]
        if config.positions == "none":
            return x
        if self.table is not None:
            features = self.table.expand(x.shape[0], -1, -1)
        else:
            assert coordinates is not None, "a batch without coordinates"
            resolution = (config.resolution,) * config.num_coordinates
            features = coordinate_features(coordinates.float(), resolution, config.num_frequency_bands)
        return torch.cat([x, features.to(x.dtype)], dim=-1)
