"""Whether an experiment's own classes keep their contracts: tried on two rows on the CPU, in seconds, before anything is held."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import Experiment, UserError
from perceiver.data.row_kind import KINDS
from perceiver.extensions import place_of
from perceiver.models import build_model
from perceiver.models.tensor_shapes import WrongTensor
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, dummy_split

LARGEST = 50_000_000
"""Parameters of the largest model that is computed with; of larger ones only the shapes are tried."""
TOLERANCE = 1e-3
"""Relative difference of sums that counts as none: of float32, in any order."""


def check_task(experiment: Experiment, rows: pa.Table | None = None) -> None:
    """Checks the task, model, optimizer and schedule of an experiment by using them on two rows.

    Made for classes of your own, in tests of your own as well. A large model is tried on the meta device, which sees shapes alone.

    Args:
        rows: at least two rows of prepared data with their columns "row" and "epoch"; by default rows of small random numbers, which a
            task that reads arrays can be tried on.

    Raises:
        UserError: the first mistake, with the method and the shapes: a missing method, a result of the wrong type or shape, a batch
            whose first dimension is not its size, padding that counts as a target, a loss that is no sum, a metric that is not finite
            or not declared, a random choice that is no function of (seed, row), weights that differ for the same seed.
    """
    task = _call(experiment.task, "build", experiment.model, experiment.data, experiment.training.seed)
    if not isinstance(task, Task):
        raise UserError(f"{_name(experiment.task)}.build returned a {_name(task)} and must return a perceiver.tasks.base.Task")
    model = _check_model(experiment)
    _check_optimizer(experiment, model)
    if rows is None:
        if not _names_columns(task):
            return
        rows = _random_rows(task)
    rows = rows.slice(0, 2)
    batch = _check_batches(task, rows)
    if next(iter(model.parameters())).is_meta:
        _loss(task, model, {name: tensor.to("meta") for name, tensor in batch.items()})
        return
    _check_loss(task, model, rows, batch)
    _check_samples(task, model, batch, rows)
    _check_predict(task, model, rows)


# ---------------------------------------------------------------------------------------------------------------- its parts


def _check_model(experiment: Experiment) -> nn.Module:
    """The model with initial weights, or on the meta device where it is large."""
    config = experiment.model
    with torch.device("meta"):
        model = _call(config, "build")
    if not isinstance(model, nn.Module):
        raise UserError(f"{_name(config)}.build returned a {_name(model)} and must return a torch.nn.Module")
    for method, what in (
        ("layers", "the list of its layers"),
        ("init_weights", "initial weights from a seed"),
        ("reset_buffers", "its constants (it may do nothing)"),
    ):
        if not callable(getattr(model, method, None)):
            raise UserError(f"{_name(model)} needs a method {method}: {what}")
    layers = list(_call(model, "layers"))
    parts = set(map(id, model.modules()))
    if not layers or any(not isinstance(layer, nn.Module) or id(layer) not in parts for layer in layers):
        raise UserError(f"{_name(model)}.layers must return some of the model's own modules, not {layers!r:.80}")
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return model
    first, second = (_built(experiment) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if not torch.equal(one, other):
            raise UserError(f"{_name(model)}.init_weights gave {name} other values the second time: they must depend on the seed alone")
        if not torch.isfinite(one).all():
            raise UserError(f"{_name(model)}.init_weights left {name} with values that are not finite: it must set every parameter")
    return first


def _built(experiment: Experiment) -> nn.Module:
    try:
        return build_model(experiment.model, experiment.training.seed)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_name(experiment.model)}'s model cannot be built: {place_of(error)}") from error


def _check_optimizer(experiment: Experiment, model: nn.Module) -> None:
    optim = experiment.optim
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": optim.weight_decay}]
    if groups[0]["params"] and not next(iter(model.parameters())).is_meta:
        made = _call(optim.optimizer, "build", groups, optim.lr)
        if not isinstance(made, torch.optim.Optimizer):
            raise UserError(f"{_name(optim.optimizer)}.build returned a {_name(made)} and must return a torch.optim.Optimizer")
    for step in (0, 1, 50, 100):
        factor = _call(optim.schedule, "factor", step, 100)
        if not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise UserError(f"{_name(optim.schedule)}.factor({step}, 100) returned {factor!r} and must return a finite number")


def _random_rows(task: Task[Any, Any]) -> pa.Table:
    """Two rows of small random numbers: what a task is tried on where there is no data."""
    rng = np.random.default_rng(0)
    columns = task.rows.columns
    empty: dict[str, Any] = {"string": "text", "binary": b"bytes"}
    examples = [
        {
            name: (rng.random(column.shape) * (1 if np.dtype(column.dtype).kind == "f" else 2)).astype(column.dtype)
            if column.is_number
            else empty[column.dtype]
            for name, column in columns.items()
        }
        for _ in range(2)
    ]
    table = task.rows.table(examples, "random rows")
    return table.append_column("row", pa.array([0, 1], pa.int64())).append_column("epoch", pa.array([0, 0], pa.int64()))


def _check_batches(task: Task[Any, Any], rows: pa.Table) -> Batch:
    """Three examples of which the last is padding."""
    batch = _batch(task, rows, 3)
    for name, tensor in batch.items():
        again = _batch(task, rows, 3)[name]
        if not _same(tensor, again):
            raise UserError(
                f"{_name(task)}.collate gave another {name!r} for the same rows: random choices must be functions of "
                "(self.seed, epoch, row), see perceiver.data.order.uniforms"
            )
    swapped = _batch(task, rows.take([1, 0]), 2)
    for name, tensor in swapped.items():
        if tensor.shape[1:] == batch[name].shape[1:] and not _same(tensor[[1, 0]], batch[name][:2]):
            raise UserError(f"{_name(task)}.collate makes {name!r} of a row depend on the other rows of its batch")
    padded, whole = _targets(task, batch), _targets(task, _batch(task, rows, 2))
    if padded != whole:
        rule = f'its "labels" must be {IGNORE_INDEX}' if "labels" in batch else 'num_targets must leave it out (see "valid")'
        raise UserError(f"{_name(task)} counts {padded - whole} targets in an example of padding, which must have none: {rule}")
    try:
        _batch(task, rows.slice(0, 0), 2)
    except UserError as error:
        raise UserError(f"{error}, for a batch without rows, which a worker may have at the end of an epoch") from error
    return batch


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN, which may stand for a missing one, is the same as NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _batch(task: Task[Any, Any], rows: pa.Table, size: int) -> Batch:
    batch = _call(task, "collate", rows, size, _split(task, size), False, 0)
    if not isinstance(batch, dict) or not batch or not all(isinstance(value, Tensor) for value in batch.values()):
        kinds = {name: _name(value) for name, value in batch.items()} if isinstance(batch, dict) else _name(batch)
        raise UserError(f"{_name(task)}.collate returned {kinds} and must return a dictionary of tensors")
    wrong = {name: tuple(tensor.shape) for name, tensor in batch.items() if tensor.dim() == 0 or len(tensor) != size}
    if wrong:
        raise UserError(f"{_name(task)}.collate of {size} examples returned {wrong}: the first dimension must be {size}")
    return batch


def _split(task: Task[Any, Any], size: int) -> Any:
    return dummy_split(task.rows, size) if _names_columns(task) else None


def _targets(task: Task[Any, Any], batch: Batch) -> int:
    targets = _call(task, "num_targets", batch)
    if not isinstance(targets, Tensor) or targets.dim() or targets.is_floating_point():
        raise UserError(f"{_name(task)}.num_targets returned {_shape(targets)} and must return a whole number as a tensor of shape ()")
    return int(targets)


def _loss(task: Task[Any, Any], model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    result = _call(task, "loss", model, batch)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor) or not isinstance(result[1], dict):
        raise UserError(f"{_name(task)}.loss returned {_shape(result)} and must return the sum of the loss and a dictionary of other sums")
    loss, sums = result
    if loss.dim():
        raise UserError(f"{_name(task)}.loss returned a loss of shape {tuple(loss.shape)} and must return its sum, of shape ()")
    wrong = [name for name, value in sums.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{_name(task)}.loss returned {wrong[0]!r} among its sums as {_shape(sums[wrong[0]])}: all must be tensors")
    return loss, sums


def _check_loss(task: Task[Any, Any], model: nn.Module, rows: pa.Table, batch: Batch) -> None:
    model.train()
    loss, _ = _loss(task, model, batch)
    if not torch.isfinite(loss):
        raise UserError(f"{_name(task)}.loss is {loss.item()} for the first two rows")
    if not loss.requires_grad:
        raise UserError(f"{_name(task)}.loss returned a loss without gradient: is it computed from the model's output?")
    model.eval()
    with torch.no_grad():
        both, together = (_loss(task, model, _batch(task, rows, size))[0].item() for size in (2, 3))
        each = [_loss(task, model, _batch(task, rows.slice(i, 1), 1))[0].item() for i in range(2)]
    if not _near(both, together):
        raise UserError(
            f"{_name(task)}.loss of two rows is {both:.6g}, but {together:.6g} with an example of padding, which must add nothing"
        )
    if not _near(both, sum(each)):
        mean = ": it is the mean, and must be the sum" if _near(both, sum(each) / 2) else ""
        raise UserError(
            f"{_name(task)}.loss of two rows is {both:.6g}, of each alone {each[0]:.6g} and {each[1]:.6g}{mean or ': they must add up'}"
        )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other), 1e-6)


def _check_samples(task: Task[Any, Any], model: nn.Module, batch: Batch, rows: pa.Table) -> None:
    with torch.no_grad():
        loss, parts = _loss(task, model, batch)
    sums = {name: value.double().numpy() for name, value in {**parts, "loss": loss, "targets": _call(task, "num_targets", batch)}.items()}
    split = _split(task, 2)
    if split is None:
        return
    metrics = _call(task, "metrics", sums, split)
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{_name(task)}.metrics gave {name!r} as {value!r} and must give finite numbers")
        if name not in task.metric_directions:
            raise UserError(
                f"{_name(task)}.metrics gave {name!r}, but metric_directions does not say whether low or high values are better: "
                f'metric_directions = {{"loss": "min", {name!r}: "min" or "max"}}'
            )
    samples = _call(task, "samples", model, sums, split)
    if not isinstance(samples, list) or not all(isinstance(sample, Sample) for sample in samples):
        raise UserError(f"{_name(task)}.samples returned {samples!r:.80} and must return a list of perceiver.tasks.base.Sample")


def _check_predict(task: Task[Any, Any], model: nn.Module, rows: pa.Table) -> None:
    if type(task).predict is Task.predict or not _names_columns(task):
        return
    with torch.no_grad():
        result = _call(task, "predict", model, _batch(task, rows, 2))
    good = isinstance(result, dict) and all(isinstance(value, Tensor) and value.dim() and len(value) == 2 for value in result.values())
    if not good:
        shapes = {name: _shape(value) for name, value in result.items()} if isinstance(result, dict) else _name(result)
        raise UserError(f"{_name(task)}.predict of 2 examples returned {shapes} and must return a dictionary of tensors (2, ...)")


# ------------------------------------------------------------------------------------------------------------------ helpers


def _call(owner: Any, method: str, *args: Any) -> Any:
    """What a method of the user's returns; an error in it is one sentence with its place."""
    function: Callable[..., Any] | None = getattr(owner, method, None)
    if function is None:
        raise UserError(f"{_name(owner)} needs a method {method}")
    try:
        return function(*args)
    except WrongTensor as error:
        raise UserError(f"{_name(owner)}.{method} fails: {error}") from error
    except UserError:
        raise
    except Exception as error:
        shapes = f" (batch: {_shapes(args)})" if _shapes(args) else ""
        raise UserError(f"{_name(owner)}.{method} fails: {place_of(error)}{shapes}") from error


def _shapes(args: tuple[Any, ...]) -> str:
    batches = [arg for arg in args if isinstance(arg, dict)]
    return ", ".join(f"{name} {tuple(value.shape)}" for batch in batches for name, value in batch.items() if isinstance(value, Tensor))


def _shape(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}" if isinstance(value, Tensor) else f"a {_name(value)}"


def _names_columns(task: Task[Any, Any]) -> bool:
    kind = KINDS.get(task.config.kind)
    return kind is not None and kind.has_columns


def _name(value: Any) -> str:
    return type(value).__name__
