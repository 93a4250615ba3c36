"""Optimizers and learning-rate schedules. An optimizer or a schedule of your own is a subclass, in a file of yours.

class Sgd(OptimizerConfig):
    "Plain gradient descent."

    momentum: float = 0.9
    "Share of the last step's direction that is kept."

    def build(self, groups, lr):
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum)

Experiment(..., optim=OptimConfig(optimizer=Sgd(momentum=0.8)))
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from perceiver.config.core import Config, UserError, spelled

if TYPE_CHECKING:
    import torch


AVERAGED = ":ema"
"""After a checkpoint's name: its averaged weights are meant."""


def averaged_of(which: str) -> tuple[str, bool]:
    """A checkpoint's name without ":ema", and whether it had that: averaged weights are meant."""
    return which.removesuffix(AVERAGED), which.endswith(AVERAGED)


def averaged_metric(name: str) -> str:
    """The name of a validation metric (val_...) with averaged weights."""
    return f"val_ema_{name.removeprefix('val_')}"


def raw_metric(name: str) -> str:
    """The name of a validation metric without the mark of averaged weights."""
    return f"val_{name.removeprefix('val_ema_')}" if name.startswith("val_ema_") else name


class OptimizerConfig(Config):
    """An optimizer: base class of all."""

    apart: ClassVar[bool] = False
    """Whether the matrices of layers are in groups of their own, marked by "hidden"."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """The optimizer over parameter groups.

        Args:
            groups: as torch.optim takes them: "params" and "weight_decay", and "lr_factor", which is for the loop. Parameters may be
                sharded (DTensor).
            lr: peak learning rate; the loop sets every group's "lr" before each step.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build(groups, lr) that returns a torch optimizer")

    def state_size(self, shape: tuple[int, ...], shards: int = 1, hidden: bool = False) -> float:
        """How many numbers (fp32; one of 8 bits is a quarter) a worker keeps for a parameter, without a counter of steps: what
        `perceiver plan` and the check of memory count. Two moments by default; an optimizer that keeps anything else says so here.

        Args:
            shape: of the whole parameter.
            shards: workers that share it, by slices of its first dimension (`shard_size`).
            hidden: whether it is a matrix of a layer (`apart`).
        """
        return 2 * shard_size(shape, shards)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called before each step (from 0), for an optimizer that counts steps outside of its state: a checkpoint has that alone."""


def shard_size(shape: tuple[int, ...], shards: int) -> int:
    """Numbers of the largest of a parameter's shards, which are slices of its first dimension."""
    return -(-shape[0] // shards) * math.prod(shape[1:]) if shape else 1


def float_pair(pair: tuple[float, float]) -> tuple[float, float]:
    """Two numbers as PyTorch's optimizers take them: they refuse a whole one, such as a beta of 0."""
    return float(pair[0]), float(pair[1])


def check_covered(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], config: OptimizerConfig) -> None:
    """Looks whether an optimizer has all parameters, in groups with what belongs to them.

    Args:
        groups: what it was built from.
        config: its configuration, which messages name.

    Raises:
        UserError: a parameter would not be trained, or would be without its weight decay or learning-rate factor.
    """
    name = type(config).__name__
    found = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for group in groups:
        for parameter in group["params"]:
            there = found.get(id(parameter))
            if there is None:
                shape = tuple(parameter.shape)
                raise UserError(f"{name}.build leaves out a parameter of shape {shape}: the optimizer must be made of all groups")
            if lost := [key for key in group if key not in ("params", "weight_decay", *there) and (key, group[key]) != ("lr_factor", 1)]:
                raise UserError(f"{name}.build loses {lost[0]!r} of a group of parameters: give the optimizer the groups as they are")


class Adam(OptimizerConfig):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moment estimates."""
    eps: float = 1e-8
    """Added to the denominator."""

    def check(self, where: str) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{spelled(where)}betas is {self.betas} and both must be at least 0 and below 1")
        if not self.eps > 0:
            raise UserError(f"{spelled(where)}eps is {self.eps} and must be above 0")

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adam(groups, lr=lr, betas=float_pair(self.betas), eps=self.eps, fused=True)


class AdamW(Adam):
    """AdamW (arXiv 1711.05101): Adam with decoupled weight decay."""

    def build(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=lr, betas=float_pair(self.betas), eps=self.eps, fused=True)


class ScheduleConfig(Config):
    """A learning-rate schedule after the warm-up: base class of all."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """The learning rate of a step as a fraction of `optim.lr`. A pure function: a continued run computes it anew.

        Args:
            step: steps since the end of the warm-up, from 0.
            total_steps: steps of the run after the warm-up.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method factor(step, total_steps) that returns a number")

    def in_steps(self, epoch: int) -> ScheduleConfig:
        """The same with what is given in epochs as steps, of which an epoch has a number. Overridden where there is such."""
        return self


def check_epochs(where: str, name: str, value: float | None) -> None:
    """Raises UserError for a number of epochs that is not above 0."""
    if value is not None and not value > 0:
        raise UserError(f"--{spelled(where + name)} is {value} and must be above 0, or None for steps")


class Constant(ScheduleConfig):
    """The peak learning rate to the end."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


class Cosine(ScheduleConfig):
    """Half a cosine from the peak down to `min_lr_fraction` at the last step, and there it stays (arXiv 1608.03983)."""

    min_lr_fraction: float = 0.0
    """The last learning rate as a fraction of the peak."""

    def check(self, where: str) -> None:
        if not 0 <= self.min_lr_fraction <= 1:
            raise UserError(f"{spelled(where)}min-lr-fraction is {self.min_lr_fraction} and must be from 0 to 1")

    def factor(self, step: int, total_steps: int) -> float:
        progress = min(1.0, step / max(1, total_steps))
        low = self.min_lr_fraction
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


LARGEST, LARGEST_RATE = 1e6, 1e30
"""Of factors of learning rates and weight decays, and of learning rates: in float32, larger ones leave weights that are not finite."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by their names, as `optim.groups` describes them."""

    pattern: str
    lr: float = 1.0
    decay: float | None = None
    freeze: bool = False
    begin: int = 0
    """The first step that changes them, counted from 1; 0: all do."""

    @classmethod
    def parse(cls, text: str) -> ParameterGroup:
        """PATTERN:lr=0.1,decay=0,from=500 or PATTERN:freeze with any of these.

        Raises:
            UserError: anything else.
        """
        pattern, _, settings = text.rpartition(":")
        values: dict[str, Any] = {}
        try:
            for setting in settings.split(","):
                name, equals, value = setting.strip().partition("=")
                if (name, equals) == ("freeze", ""):
                    values["freeze"] = True
                elif name == "from" and "begin" not in values and (step := int(value)) > 0:
                    values["begin"] = step
                elif name in ("lr", "decay") and name not in values and 0 <= (number := float(value)) <= LARGEST:
                    values[name] = number
                else:
                    raise ValueError
            if not pattern:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--optim.groups has {text!r}: PATTERN:lr=FACTOR, PATTERN:decay=WEIGHT_DECAY, PATTERN:from=STEP and PATTERN:freeze are "
                "right, also together ('encoder.*:lr=0.1,decay=0')"
            ) from None
        return cls(pattern, **values)


class OptimConfig(Config):
    """Optimizer and learning-rate schedule."""

    optimizer: OptimizerConfig = AdamW()
    """The optimizer: adamw, adamw8bit, adam, sgd, lion, lamb, muon, adafactor, or a class of yours (module:Class)."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay on matrices; biases, norms and embeddings of positions get none."""
    weight_decay_end: float | None = None
    """Weight decay at the last step, reached along half a cosine (arXiv 2104.14294). The weight decays of groups change by the same
    factor. None: constant."""
    schedule: ScheduleConfig = Constant()
    """The learning rate after the warm-up: constant, linear, cosine, flatcosine, wsd, inversesquareroot, onecycle, warmrestarts, or a
    class of yours (module:Class)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    warmup_epochs: float | None = None
    """The same in epochs (0.5, say), in place of warmup_steps; None: as warmup_steps says."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this; None: no clipping."""
    groups: tuple[str, ...] = ()
    """Settings for some parameters, chosen by name: PATTERN:lr=FACTOR,decay=WEIGHT_DECAY,from=STEP,freeze with any of these, such as
    'encoder.*:lr=0.1'. Where several patterns match, the factors multiply, and the last weight decay and first step count."""
    layer_decay: float | None = None
    """Learning rate of each layer as a multiple of the next layer's (0.8, say); None: the same for all."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, with this decay (0.999, say). It is validated as val_ema_..., saved in
    checkpoints, and named best:ema, last:ema or STEP:ema. None: no average."""

    def check(self, where: str) -> None:
        if not self.lr > 0:
            raise UserError(f"{where}lr is {self.lr} and must be above 0")
        for name in ("lr", "weight_decay", "weight_decay_end"):
            largest = LARGEST_RATE if name == "lr" else LARGEST
            if (value := getattr(self, name)) is not None and value > largest:
                raise UserError(f"{spelled(where + name)} is {value:g} and must be at most {largest:g}: weights would not stay finite")
        if self.warmup_steps < 0:
            raise UserError(f"{where}warmup-steps is {self.warmup_steps} and must not be negative")
        check_epochs(where, "warmup_epochs", self.warmup_epochs)
        if self.weight_decay < 0:
            raise UserError(f"{where}weight-decay is {self.weight_decay} and must not be negative")
        if self.weight_decay_end is not None and (self.weight_decay_end < 0 or not self.weight_decay):
            raise UserError(
                f"--{spelled(where)}weight-decay-end is {self.weight_decay_end} and must not be negative, and "
                f"--{spelled(where)}weight-decay, which it begins from, is {self.weight_decay} and must be above 0"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"{where}max-grad-norm is {self.max_grad_norm} and must be above 0, or None for no clipping")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"--{spelled(where)}layer-decay is {self.layer_decay} and must be above 0 and at most 1, or None for one rate")
        self.parsed_groups  # noqa: B018  # raises for what is none
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--{spelled(where)}ema-decay is {self.ema_decay} and must be above 0 and below 1, or None for no average")

    @property
    def parsed_groups(self) -> list[ParameterGroup]:
        """What `groups` says.

        Raises:
            UserError: it says something else.
        """
        return [ParameterGroup.parse(text) for text in self.groups]

    def in_steps(self, epoch: int) -> OptimConfig:
        """The same with all that is given in epochs as steps. `learning_rate` needs it.

        Args:
            epoch: steps of an epoch.
        """
        schedule = self.schedule.in_steps(epoch)
        if self.warmup_epochs is None:
            return self if schedule is self.schedule else replace(self, schedule=schedule)
        return replace(self, schedule=schedule, warmup_steps=round(self.warmup_epochs * epoch), warmup_epochs=None)

    def learning_rate(self, step: int, total_steps: int) -> float:
        """The learning rate of step `step` (from 0) of `total_steps`: linear warm-up from 0, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        return self.lr * self.schedule.factor(step - self.warmup_steps, total_steps - self.warmup_steps)

    def decay_factor(self, step: int, total_steps: int) -> float:
        """The weight decay of step `step` (from 0) of `total_steps` as a multiple of `weight_decay`."""
        if self.weight_decay_end is None:
            return 1.0
        end, progress = self.weight_decay_end / self.weight_decay, min(1.0, step / max(1, total_steps - 1))
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Version 0.1 kept the fields of the optimizer and of the schedule side by side here."""
        if not isinstance(values.get("optimizer"), str):
            return values
        moved = {"optimizer": ("betas", "eps"), "schedule": ("min_lr_fraction",)}
        names: dict[str, type[Config]] = {"adamw": AdamW, "adam": Adam, "constant": Constant, "cosine": Cosine}
        result = {name: value for name, value in values.items() if name not in ("betas", "eps", "min_lr_fraction")}
        for section, fields in moved.items():
            name = values.get(section, "constant")
            node = names.get(name) if isinstance(name, str) else None
            if node is None:
                raise UserError(f"optim.{section} is {values[section]!r}, which this version does not know")
            kept = {name: values[name] for name in fields if name in values and name in node.__dataclass_fields__}
            result[section] = {"type": node.__name__, **kept}
        return result
