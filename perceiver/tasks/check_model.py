"""Whether a model, an optimizer and a schedule keep their contracts: tried on the CPU, as part of `check_task`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perceiver.config import Experiment, UserError, type_name
from perceiver.config.core import is_builtin
from perceiver.config.optimization import check_covered
from perceiver.extensions import place_of
from perceiver.models import build_model
from perceiver.tasks.check_calls import call, name_of, shape_of

LARGEST = 50_000_000
"""Parameters of the largest model that is computed with; of larger ones only the shapes are tried."""
STEPS = 100
"""Length of the training that a schedule is asked about."""


def checked_model(experiment: Experiment) -> nn.Module:
    """The model with initial weights, or on the meta device where it is large.

    Raises:
        UserError: a missing method, layers that are not the model's, weights or constants that are not set or not by the seed alone.
    """
    config = experiment.model
    with torch.device("meta"):
        model = call(config, "build")
    if not isinstance(model, nn.Module):
        raise UserError(f"{name_of(config)}.build returned {shape_of(model)} and must return a torch.nn.Module")
    for method, what in (
        ("layers", "the list of its layers"),
        ("init_weights", "initial weights from a seed"),
        ("reset_buffers", "its constants (it may do nothing)"),
    ):
        if not callable(getattr(model, method, None)):
            raise UserError(f"{name_of(model)} needs a method {method}: {what}")
    layers = call(model, "layers")
    parts = set(map(id, model.modules()))
    if not isinstance(layers, (list, tuple, nn.ModuleList)):
        raise UserError(f"{name_of(model)}.layers returned {shape_of(layers)} and must return a list of some of the model's own modules")
    if not layers or any(not isinstance(layer, nn.Module) or id(layer) not in parts for layer in layers):
        raise UserError(f"{name_of(model)}.layers must return some of the model's own modules, not {layers!r:.80}")
    if not any(True for _ in model.parameters()):
        raise UserError(f"{name_of(model)} has no parameters, so there is nothing to train")
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return model
    first, second = (_built(experiment) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if not torch.equal(one, other):
            raise UserError(f"{name_of(model)}.init_weights gave {name} other values the second time: they must depend on the seed alone")
        if not torch.isfinite(one).all():
            raise UserError(f"{name_of(model)}.init_weights left {name} with values that are not finite: it must set every parameter")
    _check_buffers(second, experiment.training.seed)
    for (name, constant), (_, other) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        if constant.dtype == other.dtype and not torch.equal(constant.nan_to_num(), other.nan_to_num()):
            raise UserError(
                f"{name_of(model)}.reset_buffers gave {name} other values the second time: constants must be the same on every worker"
            )
    _wake(first)
    return first


def _built(experiment: Experiment) -> nn.Module:
    try:
        return build_model(experiment.model, experiment.training.seed)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name_of(experiment.model)}'s model cannot be built: {place_of(error)}") from error


def _check_buffers(model: nn.Module, seed: int) -> None:
    """Raises UserError where a buffer is set by neither method. A model is built without memory, so that it holds what lay there."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    given = {name: buffer.clone() for name, buffer in buffers}
    for _, buffer in buffers:
        buffer.fill_(math.nan)
    call(model, "reset_buffers")
    call(model, "init_weights", seed)
    for name, buffer in model.named_buffers():
        if name in given and bool((buffer.isnan() & ~given[name].isnan()).any()):
            raise UserError(
                f"{name_of(model)}.reset_buffers left {name} as it was and must set every buffer: weights and buffers are undefined before"
            )


def _wake(model: nn.Module) -> None:
    """Gives parameters that begin with zeros small numbers: a layer that answers 0 would hide what is added for padding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def positions_within(experiment: Experiment, model: nn.Module) -> Iterator[None]:
    """Looks, while the model is called, whether its input's adapter returns at most as many positions as its configuration says: memory and
    FLOPs are computed from that number, and positions are counted with it.

    Raises:
        UserError: it returns more.
    """
    given: Any = getattr(experiment.model, "input", None)
    adapter = next((part.input_adapter for part in model.modules() if isinstance(getattr(part, "input_adapter", None), nn.Module)), None)
    if adapter is None or not hasattr(given, "num_positions"):
        yield
        return

    def look(module: nn.Module, args: Any, output: Any) -> None:
        adapted = output[0] if isinstance(output, tuple) else output
        if isinstance(adapted, Tensor) and adapted.dim() == 3 and adapted.shape[1] > (most := given.num_positions()):
            raise UserError(
                f"{name_of(given)}.num_positions returned {most}, but its adapter returned {adapted.shape[1]} positions of an example: "
                "it must return the most that there can be"
            )

    handle = adapter.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def check_optimizer(experiment: Experiment, model: nn.Module) -> None:
    """Makes the optimizer, and asks the schedule for some steps.

    Raises:
        UserError: it is no optimizer, or a factor is no number or is negative.
    """
    _optimizer(experiment, model)
    schedule = experiment.optim.schedule
    for step in (0, 1, STEPS // 2, STEPS - 1):
        factor = call(schedule, "factor", step, STEPS)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor < 0:
            raise UserError(
                f"{name_of(schedule)}.factor({step}, {STEPS}) returned {factor!r} and must return a finite float that is not negative"
            )


def check_step(experiment: Experiment, model: nn.Module, loss: Tensor) -> None:
    """Looks whether a loss reaches the model, and takes a step with an optimizer of the user's.

    Raises:
        UserError: no parameter has a gradient, the step fails, or it leaves weights that are not finite.
    """
    config = experiment.optim.optimizer
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and all(parameter.grad is None for parameter in trained):
        raise UserError(
            f"{name_of(experiment.task)}: the loss does not depend on any parameter of the model, so nothing is learned: "
            "is it computed from the model's output, without detach()?"
        )
    if is_builtin(type_name(type(config))):
        return
    optimizer = _optimizer(experiment, model)
    if optimizer is None:
        return
    try:
        call(optimizer, "step")
    except UserError as error:
        raise UserError(f"{name_of(config)}: {error}") from None
    if wrong := [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]:
        raise UserError(f"{name_of(config)}: after a step of its optimizer {wrong[0]} has values that are not finite")


def _optimizer(experiment: Experiment, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer of all that is trained; None where nothing is, or the model has no memory."""
    optim = experiment.optim
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or next(iter(model.parameters())).is_meta:
        return None
    decaying = {"params": trained[:1], "weight_decay": optim.weight_decay}  # two groups, as training makes them
    groups: list[dict[str, Any]] = [decaying, {"params": trained[1:], "weight_decay": 0.0}][: len(trained)]
    made = call(optim.optimizer, "build", groups, optim.lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"{name_of(optim.optimizer)}.build returned {shape_of(made)} and must return a torch.optim.Optimizer")
    check_covered(made, groups, optim.optimizer)
    numbers = call(optim.optimizer, "state_size", (4, 4))
    if isinstance(numbers, bool) or not isinstance(numbers, (int, float)) or numbers < 0:
        raise UserError(f"{name_of(optim.optimizer)}.state_size returned {numbers!r} and must return how many numbers it keeps")
    return made
