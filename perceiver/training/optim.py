"""The optimizer of a model: which parameters decay, which learn at which rate and which not at all, and the rate of a step."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from perceiver.config import OptimConfig, UserError
from perceiver.config.optimization import check_covered
from perceiver.models.weights import layer_matrices

FACTOR = "lr_factor"
"""In a group of parameters: its learning rate as a multiple of the step's."""
BEGIN, DECAY, HIDDEN = "begin", "decay", "hidden"
"""In groups that need it: the first step that changes them, from 1; the weight decay that a schedule begins from; see `OptimizerConfig`."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the trainable parameters; only matrices that multiply activations decay.

    Weights of linear layers and token embeddings (which are output matrices, too) decay; biases, norms, learned latents,
    queries and position embeddings do not, unless a group says otherwise. The learning rate is a tensor-free number set every step by
    `set_step`.
    """
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decaying |= {id(p) for name, p in model.named_parameters() if name.endswith("txt_embedding.weight")}
    depths = _layer_factors(model, config.layer_decay)
    hidden = layer_matrices(model) if config.optimizer.apart else set()
    groups: dict[tuple[bool, float, float, int, bool], list[nn.Parameter]] = {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for decays in (True, False):
        for name, parameter in trainable:
            if (id(parameter) in decaying) is not decays:
                continue
            factor, decay, begin = depths.get(name, 1.0), config.weight_decay if decays else 0.0, 0
            for group in config.parsed_groups:
                if fnmatchcase(name, group.pattern):
                    factor *= group.lr
                    decay = decay if group.decay is None else group.decay
                    begin = group.begin or begin
            groups.setdefault((decays, factor, decay, begin, id(parameter) in hidden), []).append(parameter)
    if not groups:
        raise UserError("--optim.groups freezes all of the model's parameters: leave some to be trained")
    made: list[dict[str, Any]] = []
    for (_, factor, decay, begin, is_hidden), params in groups.items():
        made.append({"params": params, "weight_decay": decay, FACTOR: factor})
        made[-1] |= {BEGIN: begin} if begin else {}
        made[-1] |= {DECAY: decay} if config.weight_decay_end is not None else {}
        made[-1] |= {HIDDEN: is_hidden} if config.optimizer.apart else {}
    optimizer = config.optimizer.build(made, config.lr)
    check_covered(optimizer, made, config.optimizer)
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total_steps: int, lr: float) -> None:
    """Sets the learning rates and weight decays of all groups of parameters for step `step` (from 0), whose learning rate is `lr`.

    Where a group is not to learn yet its rate is 0, with which no optimizer changes a weight; its moments are gathered meanwhile.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(FACTOR, 1.0) if step + 1 >= group.get(BEGIN, 0) else 0.0
        if DECAY in group:
            group["weight_decay"] = group[DECAY] * config.decay_factor(step, total_steps)


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Makes the parameters that a group freezes keep their values. Before the model is sharded."""
    for name, parameter in model.named_parameters():
        if any(group.freeze and fnmatchcase(name, group.pattern) for group in config.parsed_groups):
            parameter.requires_grad_(False)


def check_groups(model: nn.Module, config: OptimConfig) -> None:
    """Refuses groups that no parameter is in, and those that leave nothing to train.

    Raises:
        UserError: names the pattern.
    """
    names = [name for name, _ in model.named_parameters()]
    for group in config.parsed_groups:
        if not any(fnmatchcase(name, group.pattern) for name in names):
            some = ", ".join([names[0], names[len(names) // 2], names[-1]])
            raise UserError(f"--optim.groups: no parameter of the model has a name like {group.pattern!r} (there are {some}, ...)")
    frozen = [group.pattern for group in config.parsed_groups if group.freeze]
    if names and all(any(fnmatchcase(name, pattern) for pattern in frozen) for name in names):
        raise UserError("--optim.groups freezes all of the model's parameters: leave some to be trained")


def described_groups(model: nn.Module, config: OptimConfig) -> list[str]:
    """A line for each of the groups: how many of the model's parameters its pattern names."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lines = []
    for text, group in zip(config.groups, config.parsed_groups, strict=True):
        named = [size for name, size in sizes.items() if fnmatchcase(name, group.pattern)]
        lines.append(f"{text}: {len(named):,} of {len(sizes):,} tensors, {sum(named):,} of {sum(sizes.values()):,} parameters")
    return lines


def _layer_factors(model: nn.Module, decay: float | None) -> Mapping[str, float]:
    """Of each parameter its learning rate as a multiple, by depth: 1 in the last of the model's `layers()` and after it, less by `decay`
    with each layer before that, and once more for what comes before the first (embeddings, latents).
    """
    if decay is None:
        return {}
    layers = list(model.layers())  # type: ignore[operator]
    depth = {id(parameter): number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    factors, before = {}, True
    for name, parameter in model.named_parameters():
        number = depth.get(id(parameter))
        before = before and number is None
        below = len(layers) - 1 - number if number is not None else len(layers) if before else 0
        factors[name] = decay**below
    return factors
