"""Several named inputs as one sequence.

Shapes: B batch, N input positions of all inputs together, C common channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.inputs import InputConfig


class ClassInput(InputConfig):
    """A class as one input position, of one channel for each class. A batch holds the numbers of the classes (B,), -1 for none."""

    has_cost_formulas: ClassVar[bool] = False

    num_classes: int = 700
    """Number of classes."""

    def build(self) -> nn.Module:
        return ClassAdapter(self.num_classes)

    def adapted_channels(self) -> int:
        return self.num_classes

    def num_positions(self) -> int:
        return 1

    def check(self, where: str) -> None:
        check_sizes(self, where)


class ClassAdapter(nn.Module):
    """Numbers of classes (B,) to (B, 1, classes): 1 for the class, 0 else."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def reset_buffers(self) -> None:
        """Nothing: there are none."""

    def forward(self, x: Tensor) -> Tensor:
        found = torch.zeros(len(x), 1, self.num_classes, device=x.device)
        return found.scatter_(2, x.clamp(min=0)[:, None, None], (x >= 0).float()[:, None, None])


class MultimodalInput(InputConfig):
    """Named inputs, each filled up to common channels by a learned vector of its own. A batch holds a mapping by these names."""

    has_cost_formulas: ClassVar[bool] = False

    names: tuple[str, ...] = ()
    """Names of the inputs."""
    inputs: tuple[InputConfig, ...] = ()
    """The inputs, in the order of their names."""
    masked: tuple[float, ...] = ()
    """Share of each input's positions that training hides at random, behind a learned vector; of 1 it is hidden in evaluation as well.
    None: 0 for all."""
    num_own_channels: int = 4
    """Channels of the learned vector of the widest input."""

    def build(self) -> nn.Module:
        return MultimodalAdapter(self)

    def adapted_channels(self) -> int:
        return max(part.adapted_channels() for part in self.inputs) + self.num_own_channels

    def num_positions(self) -> int:
        return sum(part.num_positions() for part in self.inputs)

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def adapting_flops(self, num_positions: int) -> float:
        return sum(part.adapting_flops(part.num_positions()) for part in self.inputs)

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where)
        if not self.inputs or len(set(self.names)) != len(self.inputs) or len(self.names) != len(self.inputs):
            raise UserError(f"{where}names has {list(self.names)} for {len(self.inputs)} inputs: give each a name of its own")
        if wrong := [name for name in self.names if not name or "." in name]:
            raise UserError(f"{where}names has {wrong[0]!r} and must have names without a dot")
        if self.masked and (len(self.masked) != len(self.inputs) or not all(0 <= share <= 1 for share in self.masked)):
            raise UserError(
                f"{where}masked is {list(self.masked)} and must have a number from 0 to 1 for each of {len(self.inputs)} inputs"
            )


class MultimodalAdapter(nn.Module):
    """A mapping of what each input takes to (B, N, C), and a mask of padding where an input has one."""

    def __init__(self, config: MultimodalInput) -> None:
        super().__init__()
        channels = config.adapted_channels()
        self.masked = dict(zip(config.names, config.masked or (0.0,) * len(config.names), strict=True))
        parts = dict(zip(config.names, config.inputs, strict=True))
        self.adapters = nn.ModuleDict({name: part.build() for name, part in parts.items()})
        self.own = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(1, channels - part.adapted_channels())) for name, part in parts.items()}
        )
        hidden = config.names if config.masked else ()  # also where the share is 0, as published models have them
        self.hidden = nn.ParameterDict({name: nn.Parameter(torch.empty(1, channels)) for name in hidden})

    def reset_buffers(self) -> None:
        """Nothing of its own: those of the parts are computed by themselves."""

    def forward(self, x: Mapping[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        found, masks = [], []
        for name, adapter in self.adapters.items():
            dtype, part = self.own[name].dtype, x[name]
            part = adapter(part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part)
            adapted, mask = part if isinstance(part, tuple) else (part, None)
            adapted = adapted.to(dtype)
            own, share = self.own[name], self.masked[name]
            if share == 0 and name in self.hidden and self.training:  # all parameters have a gradient, as resumed optimizers expect
                own = own + 0 * self.hidden[name].sum()
            adapted = torch.cat([adapted, own.expand(*adapted.shape[:2], -1)], dim=-1)
            if share == 1 or share > 0 and self.training:
                hide = torch.rand(adapted.shape[:2], device=adapted.device) < share
                adapted = torch.where(hide[..., None], self.hidden[name], adapted)
            found.append(adapted)
            masks.append(mask)
        joined = torch.cat(found, dim=1)
        if all(mask is None for mask in masks):
            return joined
        given = [torch.zeros(a.shape[:2], dtype=torch.bool, device=a.device) if m is None else m for a, m in zip(found, masks, strict=True)]
        return joined, torch.cat(given, dim=1)
