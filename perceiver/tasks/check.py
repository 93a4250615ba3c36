"""Whether an experiment's own classes keep their contracts: tried on two rows on the CPU, in seconds, before anything is held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import Experiment, UserError, nearest, type_name
from perceiver.config.core import is_builtin
from perceiver.config.optimization import raw_metric
from perceiver.data.components import Component
from perceiver.data.manifest import Manifest
from perceiver.data.row_kind import KINDS
from perceiver.data.rows import ArrayRows
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, dummy_split
from perceiver.tasks.baselines import Guess
from perceiver.tasks.check_calls import call, name_of, shape_of, tried
from perceiver.tasks.check_model import check_optimizer, check_step, checked_model

_RANDOM = "random choices must be functions of (self.seed, epoch, row), see perceiver.data.order.uniforms"
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
    task = checked_task(experiment)
    call(task, "check")
    _check_settings(task)
    model = checked_model(experiment)
    check_optimizer(experiment, model)
    if rows is None:
        if not _names_columns(task):
            return
        rows = _random_rows(task)
        _check_examples(task, rows.drop_columns(["row", "epoch"]))
    rows = rows.slice(0, 2)
    rows = _check_rows(task, rows)
    batch = _check_batches(task, rows)
    if next(iter(model.parameters())).is_meta:
        _loss(task, model, {name: tensor.to("meta") for name, tensor in batch.items()})
        return
    _check_loss(task, model, rows, batch)
    _check_each(task, model, batch)
    _check_samples(task, model, batch, experiment.run.best_metric)
    _check_predict(task, model, rows)
    model.train()
    check_step(experiment, model, _loss(task, model, batch)[0])


def checked_task(experiment: Experiment) -> Task[Any, Any]:
    """The task of an experiment.

    Raises:
        UserError: the user's `build` fails or returns something else.
    """
    task = tried(experiment.task, "build", experiment.model, experiment.data, experiment.training.seed)
    if not isinstance(task, Task):
        raise UserError(f"{name_of(experiment.task)}.build returned {shape_of(task)} and must return a perceiver.tasks.base.Task")
    return task


def check_guess(task: Task[Any, Any], parts: Sequence[Component], trained_on: Manifest | None = None) -> None:
    """Makes the baselines of a task of the user's, which are shown when a training or an evaluation ends.

    Args:
        task: with what it measures.
        parts: the data sets that are validated on.
        trained_on: the data set that the model was trained on, where it is not that of each part.

    Raises:
        UserError: `guess` fails, returns something else, or speaks of a metric that `metrics` does not give for its sums.
    """
    if is_builtin(type_name(type(task.config))):
        return
    for part in parts:
        guess = call(task, "guess", part.manifest, trained_on or part.manifest)
        if guess is None:
            continue
        if not isinstance(guess, Guess):
            raise UserError(f"{name_of(task)}.guess returned {shape_of(guess)} and must return a perceiver.tasks.baselines.Guess, or None")
        metrics = call(task, "metrics", guess.sums, part.manifest.splits["val"])
        if unknown := [name for name in guess.means if name not in metrics]:
            raise UserError(
                f"{name_of(task)}.guess speaks of {unknown[0]!r}, but metrics gives {', '.join(metrics) or 'nothing'} for its sums"
            )
    call(task, "baselines", list(parts), trained_on)


# ---------------------------------------------------------------------------------------------------------------- its parts


def _check_settings(task: Task[Any, Any]) -> None:
    """What a task and its configuration say of themselves."""
    config = task.config
    if config.kind not in KINDS:
        raise UserError(
            f"{name_of(config)}.kind is {config.kind!r}{nearest(config.kind, KINDS)} and must be one of {', '.join(KINDS)}, "
            "or a RowKind of yours whose module is imported"
        )
    if unknown := [name for name in config.measured if name not in config.__dataclass_fields__]:
        raise UserError(f"{name_of(config)}.measured names {unknown[0]!r}, which is none of its fields")
    for name, direction in task.metric_directions.items():
        if direction not in ("min", "max"):
            raise UserError(f'{name_of(task)}.metric_directions says {direction!r} of {name!r} and must say "min" or "max"')
    if _names_columns(task):
        rows = call(config, "rows", task.model_config, task.data)
        if not isinstance(rows, ArrayRows):
            raise UserError(f"{name_of(config)}.rows returned {shape_of(rows)} and must return a perceiver.data.rows.ArrayRows")
    unit = call(task, "throughput_unit")
    if not (isinstance(unit, tuple) and len(unit) == 2 and isinstance(unit[0], str) and type(unit[1]) is int and unit[1] > 0):
        raise UserError(f'{name_of(task)}.throughput_unit returned {unit!r} and must return a name and a number, such as ("tokens", 512)')


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


def _check_examples(task: Task[Any, Any], block: pa.Table) -> None:
    """One block as it is stored, whose rows are made examples twice."""
    once, again = (call(task, "examples", block, _split(task, block.num_rows), 0, 0, True) for _ in range(2))
    if not isinstance(once, pa.Table) or once.num_rows != block.num_rows:
        found = f"{once.num_rows} rows" if isinstance(once, pa.Table) else shape_of(once)
        raise UserError(f"{name_of(task)}.examples of {block.num_rows} rows returned {found} and must return a pyarrow.Table with as many")
    if not once.equals(again):
        raise UserError(f"{name_of(task)}.examples gave other rows the second time: {_RANDOM}")


def _check_rows(task: Task[Any, Any], rows: pa.Table) -> pa.Table:
    """The rows as `collate` gets them, with `decode` and `arrange`."""
    split = _split(task, rows.num_rows)
    if split is None:
        return rows
    for train in (True, False):
        decoded = call(task, "decode", rows, split, train)
        if not isinstance(decoded, pa.Table) or decoded.num_rows != rows.num_rows:
            found = f"{decoded.num_rows} rows" if isinstance(decoded, pa.Table) else shape_of(decoded)
            raise UserError(f"{name_of(task)}.decode of {rows.num_rows} rows returned {found} and must return a pyarrow.Table with as many")
        if not decoded.equals(call(task, "decode", rows, split, train)):
            raise UserError(f"{name_of(task)}.decode gave other rows the second time: {_RANDOM}")
    arranged = call(task, "arrange", decoded)
    if not isinstance(arranged, pa.Table) or sorted(arranged["row"].to_pylist()) != sorted(decoded["row"].to_pylist()):
        raise UserError(f"{name_of(task)}.arrange must return the same rows in any order, as a pyarrow.Table")
    return decoded


def _check_batches(task: Task[Any, Any], rows: pa.Table) -> Batch:
    """Three examples of which the last is padding."""
    batch = _batch(task, rows, 3)
    for train in (True, False):
        once, again = (_batch(task, rows, 3, train) for _ in range(2))
        for name, tensor in once.items():
            if not _same(tensor, again[name]):
                raise UserError(f"{name_of(task)}.collate gave another {name!r} for the same rows: {_RANDOM}")
    swapped = _batch(task, rows.take([1, 0]), 2)
    for name, tensor in swapped.items():
        if tensor.shape[1:] == batch[name].shape[1:] and not _same(tensor[[1, 0]], batch[name][:2]):
            raise UserError(f"{name_of(task)}.collate makes {name!r} of a row depend on the other rows of its batch")
    padded, whole = _targets(task, batch), _targets(task, _batch(task, rows, 2))
    if padded != whole:
        rule = f'its "labels" must be {IGNORE_INDEX}' if "labels" in batch else 'num_targets must leave it out (see "valid")'
        raise UserError(f"{name_of(task)} counts {padded - whole} targets in an example of padding, which must have none: {rule}")
    try:
        _batch(task, rows.slice(0, 0), 2)
    except UserError as error:
        raise UserError(f"{error}, for a batch without rows, which a worker may have at the end of an epoch") from error
    return batch


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; NaN, which may stand for a missing one, is the same as NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _batch(task: Task[Any, Any], rows: pa.Table, size: int, train: bool = False) -> Batch:
    batch = call(task, "collate", rows, size, _split(task, size), train, 0)
    if not isinstance(batch, dict) or not batch or not all(isinstance(value, Tensor) for value in batch.values()):
        kinds = {name: name_of(value) for name, value in batch.items()} if isinstance(batch, dict) else name_of(batch)
        raise UserError(f"{name_of(task)}.collate returned {kinds} and must return a dictionary of tensors")
    wrong = {name: tuple(tensor.shape) for name, tensor in batch.items() if tensor.dim() == 0 or len(tensor) != size}
    if wrong:
        raise UserError(f"{name_of(task)}.collate of {size} examples returned {wrong}: the first dimension must be {size}")
    return batch


def _split(task: Task[Any, Any], size: int) -> Any:
    return dummy_split(task.rows, size) if _names_columns(task) else None


def _targets(task: Task[Any, Any], batch: Batch) -> int:
    targets = call(task, "num_targets", batch)
    if not isinstance(targets, Tensor) or targets.dim() or targets.is_floating_point():
        raise UserError(f"{name_of(task)}.num_targets returned {shape_of(targets)} and must return a whole number as a tensor of shape ()")
    return int(targets)


def _loss(task: Task[Any, Any], model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    result = call(task, "loss", model, batch)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor) or not isinstance(result[1], dict):
        raise UserError(
            f"{name_of(task)}.loss returned {shape_of(result)} and must return the sum of the loss and a dictionary of other sums"
        )
    loss, sums = result
    if loss.dim():
        raise UserError(f"{name_of(task)}.loss returned a loss of shape {tuple(loss.shape)} and must return its sum, of shape ()")
    wrong = [name for name, value in sums.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{name_of(task)}.loss returned {wrong[0]!r} among its sums as {shape_of(sums[wrong[0]])}: all must be tensors")
    return loss, sums


def _check_loss(task: Task[Any, Any], model: nn.Module, rows: pa.Table, batch: Batch) -> None:
    model.train()
    loss, _ = _loss(task, model, batch)
    if not torch.isfinite(loss):
        raise UserError(f"{name_of(task)}.loss is {loss.item()} for the first two rows")
    if not loss.requires_grad:
        raise UserError(f"{name_of(task)}.loss returned a loss without gradient: is it computed from the model's output?")
    model.eval()
    with torch.no_grad():
        both, together = (_loss(task, model, _batch(task, rows, size))[0].item() for size in (2, 3))
        each = [_loss(task, model, _batch(task, rows.slice(i, 1), 1))[0].item() for i in range(2)]
    if not _near(both, together):
        raise UserError(
            f"{name_of(task)}.loss of two rows is {both:.6g}, but {together:.6g} with an example of padding, which must add nothing"
        )
    if not _near(both, sum(each)):
        mean = ": it is the mean, and must be the sum" if _near(both, sum(each) / 2) else ""
        raise UserError(
            f"{name_of(task)}.loss of two rows is {both:.6g}, of each alone {each[0]:.6g} and {each[1]:.6g}{mean or ': they must add up'}"
        )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other), 1e-6)


def _check_each(task: Task[Any, Any], model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        each = call(task, "each", model, batch, _loss(task, model, batch)[1])
    size = len(next(iter(batch.values())))
    if not isinstance(each, dict) or any(not isinstance(v, Tensor) or v.shape != (size,) for v in each.values()):
        shapes = {name: shape_of(value) for name, value in each.items()} if isinstance(each, dict) else shape_of(each)
        raise UserError(f"{name_of(task)}.each of {size} examples returned {shapes} and must return a dictionary of tensors ({size},)")
    if missing := [name for name in ("loss", "targets") if name not in each]:
        raise UserError(f"{name_of(task)}.each returned no {missing[0]!r}: it has {', '.join(each) or 'nothing'}")


def _check_samples(task: Task[Any, Any], model: nn.Module, batch: Batch, best_metric: str) -> None:
    with torch.no_grad():
        loss, parts = _loss(task, model, batch)
    sums = {name: value.double().numpy() for name, value in {**parts, "loss": loss, "targets": call(task, "num_targets", batch)}.items()}
    split = _split(task, 2)
    if split is None:
        return
    metrics = call(task, "metrics", sums, split)
    if not isinstance(metrics, dict):
        raise UserError(f"{name_of(task)}.metrics returned {shape_of(metrics)} and must return a dictionary of numbers")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{name_of(task)}.metrics gave {name!r} as {value!r} and must give finite numbers, as float")
        if name not in task.metric_directions:
            raise UserError(
                f"{name_of(task)}.metrics gave {name!r}, but metric_directions does not say whether low or high values are better: "
                f'metric_directions = {{"loss": "min", {name!r}: "min" or "max"}}'
            )
    best = raw_metric(best_metric).removeprefix("val_").partition("/")[0]
    if best in task.metric_directions and best not in metrics:
        raise UserError(
            f"{name_of(task)}.metrics gave {', '.join(metrics)}, but not {best!r}, by which the best checkpoint is chosen (run.best-metric)"
        )
    samples = call(task, "samples", model, sums, split)
    if not isinstance(samples, list) or not all(isinstance(sample, Sample) for sample in samples):
        raise UserError(f"{name_of(task)}.samples returned {samples!r:.80} and must return a list of perceiver.tasks.base.Sample")


def _check_predict(task: Task[Any, Any], model: nn.Module, rows: pa.Table) -> None:
    if type(task).predict is Task.predict or not _names_columns(task):
        return
    with torch.no_grad():
        result = call(task, "predict", model, _batch(task, rows, 2))
    good = isinstance(result, dict) and all(isinstance(value, Tensor) and value.dim() and len(value) == 2 for value in result.values())
    if not good:
        shapes = {name: shape_of(value) for name, value in result.items()} if isinstance(result, dict) else name_of(result)
        raise UserError(f"{name_of(task)}.predict of 2 examples returned {shapes} and must return a dictionary of tensors (2, ...)")


def _names_columns(task: Task[Any, Any]) -> bool:
    kind = KINDS.get(task.config.kind)
    return kind is not None and kind.has_columns
