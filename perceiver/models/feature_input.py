"""Vectors as they are: the features of another model, or whatever you have made of your data yourself."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from perceiver.models.checks import check_sizes
from perceiver.models.inputs import InputConfig
from perceiver.models.tensor_shapes import Shape


class FeatureInput(InputConfig):
    """Vectors (B, N, D), attended as they are: no projection, no positions, no parameters."""

    has_cost_formulas: ClassVar[bool] = False

    num_features: int = 64
    """D, channels of a vector."""
    max_positions: int = 2048
    """N at most."""

    def build(self) -> nn.Module:
        return FeatureAdapter()

    def adapted_channels(self) -> int:
        return self.num_features

    def num_positions(self) -> int:
        return self.max_positions

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def batch_shape(self) -> Shape:
        return "B", ("N", self.max_positions), self.num_features

    def check(self, where: str) -> None:
        check_sizes(self, where)


class FeatureAdapter(nn.Module):
    """Gives (B, N, D) back."""

    def reset_buffers(self) -> None:
        """Nothing: there are no constants."""

    def forward(self, x: Tensor) -> Tensor:
        return x
