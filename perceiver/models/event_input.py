"""Events as an input: what happened, when, and how much of it.

Shapes: B batch, N events, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.initialize import Embedding
from perceiver.models.inputs import InputConfig


class EventInput(InputConfig):
    """Events at any times. A batch holds a mapping of ids (B, N), times (B, N), and if there are such, values (B, N) and mask (B, N)."""

    has_cost_formulas: ClassVar[bool] = False

    num_ids: int = 16
    """Kinds of events."""
    max_events: int = 128
    """N at most."""
    num_channels: int = 64
    """Channels of the embedding of an event's kind and value."""
    num_time_bands: int = 16
    """Sines, and cosines, of the time."""
    shortest_period: float = 1.0
    """Period of the fastest sine, in units of the time."""
    longest_period: float = 1000.0
    """Period of the slowest."""

    def build(self) -> nn.Module:
        return EventAdapter(self)

    def adapted_channels(self) -> int:
        return self.num_channels + 2 * self.num_time_bands

    def num_positions(self) -> int:
        return self.max_events

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where)
        if not 0 < self.shortest_period < self.longest_period:
            raise UserError(
                f"{where}shortest-period is {self.shortest_period:g} and must be above 0 and below {where}longest-period, "
                f"{self.longest_period:g}"
            )


def time_features(times: Tensor, num_bands: int, shortest: float, longest: float) -> Tensor:
    """Sines, then cosines, of times (...) with periods in equal ratios from the shortest to the longest: (..., 2 * num_bands)."""
    periods = torch.logspace(math.log10(shortest), math.log10(longest), num_bands, device=times.device)
    angle = 2 * torch.pi * times.float()[..., None] / periods
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class EventAdapter(nn.Module):
    """Each kind has an embedding and a direction in which its value counts; features of the time are appended."""

    def __init__(self, config: EventInput) -> None:
        super().__init__()
        self.config = config
        self.kinds = Embedding(config.num_ids, config.num_channels)
        self.directions = Embedding(config.num_ids, config.num_channels)

    def reset_buffers(self) -> None:
        """Nothing: all is learned."""

    def forward(self, x: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """A value that is NaN is none."""
        config, found = self.config, self.kinds(x["ids"])
        if "values" in x:
            found = found + self.directions(x["ids"]) * x["values"].nan_to_num(0.0).to(found.dtype)[..., None]
        times = time_features(x["times"], config.num_time_bands, config.shortest_period, config.longest_period)
        found = torch.cat([found, times.to(found.dtype)], dim=-1)
        return (found, x["mask"]) if "mask" in x else found
