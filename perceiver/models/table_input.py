"""Columns of a table as the input of a model: each number, or each position of a list, is an input position.

Shapes: B batch, N input positions of all columns together, C channels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.inputs import InputConfig
from perceiver.models.tensor_shapes import Shape

SCALAR = "scalar"
"""Shape of a column that has one number a row."""


def shape_of(text: str) -> tuple[int, ...]:
    """A column's shape from its text: "scalar", "24", "72x7".

    Raises:
        ValueError: it is none of these.
    """
    return () if text == SCALAR else tuple(int(size) for size in text.split("x"))


def text_of(shape: tuple[int, ...]) -> str:
    """The inverse of `shape_of`."""
    return "x".join(map(str, shape)) or SCALAR


class TableInput(InputConfig):
    """Columns of numbers: each has a linear map of its own to the channels, and each position a learned vector."""

    columns: tuple[str, ...] = ()
    """Columns of the table that go in, separated by spaces or commas; none: all columns of numbers that are no targets."""
    shapes: tuple[str, ...] = ()
    """Shape of each column's value in a row: scalar, 24 (a list of 24 numbers), 72x7 (72 lists of 7). None: as found in the data."""
    num_channels: int = 64
    """Channels of an input position."""

    def build(self) -> nn.Module:
        return TableAdapter(self)

    def sizes(self) -> list[tuple[int, int]]:
        """Positions of each column, and numbers of a position: the last axis of two or more is one of channels."""
        found = []
        for shape in map(shape_of, self.shapes):
            channels = shape[-1] if len(shape) > 1 else 1
            found.append((math.prod(shape) // channels, channels))
        return found

    def adapted_channels(self) -> int:
        return self.num_channels

    def num_positions(self) -> int:
        return sum(positions for positions, _ in self.sizes())

    def batch_shape(self) -> Shape:
        return "B", sum(positions * channels for positions, channels in self.sizes())

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def adapting_flops(self, num_positions: int) -> float:
        return sum(2.0 * positions * channels * self.num_channels for positions, channels in self.sizes())

    def check(self, where: str) -> None:
        check_sizes(self, where)
        if len(self.shapes) != len(self.columns):
            raise UserError(
                f"{spelled(where)}shapes has {len(self.shapes)} shapes for {len(self.columns)} {spelled(where)}columns: leave both out, "
                "or give a shape for each column"
            )
        for text in self.shapes:
            try:
                right = all(size >= 1 for size in shape_of(text))
            except ValueError:
                right = False
            if not right:
                raise UserError(f"{spelled(where)}shapes has {text!r} and must have scalar, or sizes such as 24 or 72x7")


class TableAdapter(nn.Module):
    """Numbers of all columns (B, numbers of a row) to (B, N, C) and the mask of positions where a number is missing (NaN)."""

    def __init__(self, config: TableInput) -> None:
        super().__init__()
        self.sizes = config.sizes()
        ends = [0]
        for positions, channels in self.sizes:
            ends.append(ends[-1] + positions * channels)
        self.places = list(pairwise(ends))
        self.columns = nn.ModuleList(nn.Linear(channels, config.num_channels, bias=False) for _, channels in self.sizes)
        self.pos_embedding = nn.Embedding(max(1, config.num_positions()), config.num_channels)

    def reset_buffers(self) -> None:
        """Nothing: all is learned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        adapted, missing = [], []
        for (positions, channels), (start, stop), linear in zip(self.sizes, self.places, self.columns, strict=True):
            values = x[:, start:stop].unflatten(1, (positions, channels))
            missing.append(values.isnan().any(-1))
            adapted.append(linear(values.nan_to_num(0.0)))
        return torch.cat(adapted, 1) + self.pos_embedding.weight, torch.cat(missing, 1)
