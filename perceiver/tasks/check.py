"""Whether an experiment's own classes keep their contracts: tried on two rows on the CPU, in seconds, before anything is held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import Experiment, UserError, check_tree, nearest, nodes, type_name
from perceiver.config.core import is_builtin
from perceiver.config.optimization import raw_metric
from perceiver.data.components import Component
from perceiver.data.manifest import Manifest
from perceiver.data.row_kind import KINDS
from perceiver.data.rows import ArrayRows
from perceiver.extensions import place_of
from perceiver.tasks.base import EACH, Batch, Sample, Task
from perceiver.tasks.baselines import Guess
from perceiver.tasks.check_batches import (
    RANDOM,
    batch_of,
    check_batches,
    check_examples,
    check_rows,
    names_columns,
    rows_with_targets,
    split_of,
)
from perceiver.tasks.check_calls import call, name_of, shape_of, tried
from perceiver.tasks.check_model import check_optimizer, check_step, checked_model, positions_within

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
    with _one_thread():
        _check_model_and_task(experiment, task, rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two rows are computed fastest so, and on a busy machine many times faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_model_and_task(experiment: Experiment, task: Task[Any, Any], rows: pa.Table | None) -> None:
    model = checked_model(experiment)
    check_optimizer(experiment, model)
    if rows is None:
        if not names_columns(task):
            return
        rows = rows_with_targets(task)
        check_examples(task, rows.drop_columns(["row", "epoch"]))
    rows = rows.slice(0, 2)
    rows = check_rows(task, rows)
    batch = check_batches(task, rows)
    with positions_within(experiment, model):
        if next(iter(model.parameters())).is_meta:
            _loss(task, model, {name: tensor.to("meta") for name, tensor in batch.items()})
            return
        _check_loss(task, model, rows, batch)
    _check_each(task, model, batch)
    _check_samples(task, model, batch, experiment.run.best_metric)
    _check_predict(task, model, rows)
    model.train()
    check_step(experiment, model, _loss(task, model, batch)[0])


def checked_tree(experiment: Experiment) -> None:
    """`check_tree` of an experiment that may have parts of the user's, whose `check` and other methods may fail.

    Raises:
        UserError: the first field that cannot be right, or what fails, with file and line.
    """
    try:
        check_tree(experiment)
    except UserError:
        raise
    except Exception as error:
        own = [name_of(node) for _, node in nodes(experiment) if not is_builtin(type_name(type(node)))]
        if not own:
            raise
        raise UserError(f"the settings of {', '.join(own)} cannot be checked: {place_of(error)}") from error


def checked_task(experiment: Experiment) -> Task[Any, Any]:
    """The task of an experiment.

    Raises:
        UserError: the user's `build` fails or returns something else, or what the task says of its metrics cannot be right.
    """
    task = tried(experiment.task, "build", experiment.model, experiment.data, experiment.training.seed)
    if not isinstance(task, Task):
        raise UserError(f"{name_of(experiment.task)}.build returned {shape_of(task)} and must return a perceiver.tasks.base.Task")
    for name in ("config", "model_config", "data", "seed"):
        if not hasattr(task, name):
            raise UserError(f"{name_of(task)}.__init__ did not set {name}: it must call super().__init__(config, model, data, seed)")
    _check_metrics(task)
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
            f"{name_of(config)}.kind is {config.kind!r} and must be one of {', '.join(KINDS)}, "
            f"or a RowKind of yours whose module is imported{nearest(config.kind, KINDS)}"
        )
    if unknown := [name for name in config.measured if name not in config.__dataclass_fields__]:
        raise UserError(f"{name_of(config)}.measured names {unknown[0]!r}, which is none of its fields")
    if names_columns(task):
        rows = call(config, "rows", task.model_config, task.data)
        if not isinstance(rows, ArrayRows):
            raise UserError(f"{name_of(config)}.rows returned {shape_of(rows)} and must return a perceiver.data.rows.ArrayRows")
    unit = call(task, "throughput_unit")
    if not (isinstance(unit, tuple) and len(unit) == 2 and isinstance(unit[0], str) and type(unit[1]) is int and unit[1] > 0):
        raise UserError(f'{name_of(task)}.throughput_unit returned {unit!r} and must return a name and a number, such as ("tokens", 512)')
    targets = call(task, "targets_per_example")
    if targets is not None and not (type(targets) is int and 0 < targets <= unit[1]):
        raise UserError(f"{name_of(task)}.targets_per_example returned {targets!r} and must return None or a number from 1 to {unit[1]}")


def _check_metrics(task: Task[Any, Any]) -> None:
    """The names of metrics, and of those that stand beside others."""
    directions, pairs = task.metric_directions, task.baseline_metrics
    if not isinstance(directions, Mapping):
        raise UserError(f'{name_of(task)}.metric_directions is {shape_of(directions)} and must be a dictionary, such as {{"loss": "min"}}')
    for name, direction in directions.items():
        if direction not in ("min", "max"):
            raise UserError(f'{name_of(task)}.metric_directions says {direction!r} of {name!r} and must say "min" or "max"')
    example = '{"acc": ("usual_acc", "always the commonest class")}'
    if not isinstance(pairs, Mapping):
        raise UserError(f"{name_of(task)}.baseline_metrics is {shape_of(pairs)} and must be a dictionary, such as {example}")
    for name, pair in pairs.items():
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise UserError(
                f"{name_of(task)}.baseline_metrics has {pair!r:.80} for {name!r} and must have a pair of texts, such as {example}"
            )
        if unknown := [metric for metric in (name, pair[0]) if metric not in directions]:
            raise UserError(
                f"{name_of(task)}.baseline_metrics names {unknown[0]!r}, which metric_directions does not say: it has "
                f"{', '.join(map(str, directions))}{nearest(str(unknown[0]), map(str, directions))}"
            )


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
        again = _loss(task, model, batch_of(task, rows, 2))[0].item()
        (whole, sums), (padded, _) = (_loss(task, model, batch_of(task, rows, size)) for size in (2, 3))
        alone = [_loss(task, model, batch_of(task, rows.slice(i, 1), 1)) for i in range(2)]
    both, together, each = whole.item(), padded.item(), [loss.item() for loss, _ in alone]
    if not math.isfinite(both):
        raise UserError(f"{name_of(task)}.loss is {both} for the first two rows where the model is not training (model.eval())")
    if not _near(both, again):
        raise UserError(
            f"{name_of(task)}.loss of the same batch is {again:.6g} and then {both:.6g}, where the model is not training: {RANDOM}"
        )
    if not _near(both, together):
        raise UserError(
            f"{name_of(task)}.loss of two rows is {both:.6g}, but {together:.6g} with an example of padding, which must add nothing"
        )
    if not _near(both, sum(each)):
        mean = ": it is the mean, and must be the sum" if _near(both, sum(each) / 2) else ""
        raise UserError(
            f"{name_of(task)}.loss of two rows is {both:.6g}, of each alone {each[0]:.6g} and {each[1]:.6g}{mean or ': they must add up'}"
        )
    for name, value in sums.items():
        if name.startswith(EACH):
            continue
        if missing := [i for i, (_, found) in enumerate(alone) if name not in found]:
            raise UserError(f"{name_of(task)}.loss gave {name!r} among the sums of two rows, but not of row {missing[0]} alone")
        total, ones = _total(value), [_total(found[name]) for _, found in alone]
        if math.isfinite(total) and not _near(total, sum(ones)):
            mean = "a mean, and must be a sum" if _near(total, sum(ones) / 2) else "no sum, as it does not add up"
            raise UserError(
                f"{name_of(task)}.loss gave {name!r} as {total:.6g} of two rows, {ones[0]:.6g} and {ones[1]:.6g} of each alone: "
                f"it is {mean}"
            )


def _total(value: Tensor) -> float:
    return float(value.double().sum())


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
    split = split_of(task, 2)
    if split is None:
        return
    metrics = call(task, "metrics", sums, split)
    if not isinstance(metrics, dict):
        raise UserError(f"{name_of(task)}.metrics returned {shape_of(metrics)} and must return a dictionary of numbers")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            shown = repr(value) if np.ndim(value) == 0 and isinstance(value, (int, float, np.generic)) else shape_of(value)
            raise UserError(f"{name_of(task)}.metrics gave {name!r} as {shown} and must give finite numbers, as float")
        if name not in task.metric_directions:
            raise UserError(
                f"{name_of(task)}.metrics gave {name!r}, but metric_directions does not say whether low or high values are better: "
                f'add "{name}": "min", or "max", to it'
            )
    best = raw_metric(best_metric).removeprefix("val_").partition("/")[0]
    if best in task.metric_directions and best not in metrics:
        raise UserError(
            f"{name_of(task)}.metrics gave {', '.join(metrics)}, but not {best!r}, by which the best checkpoint is chosen (run.best-metric)"
        )
    samples = call(task, "samples", model, sums, split)
    if not isinstance(samples, list) or not all(isinstance(sample, Sample) for sample in samples):
        raise UserError(f"{name_of(task)}.samples returned {samples!r:.80} and must return a list of perceiver.tasks.base.Sample")
    for sample in samples:
        _check_sample(f"{name_of(task)}.samples", sample)


def _check_sample(method: str, sample: Sample) -> None:
    name, image = sample.name, sample.image
    if not isinstance(name, str) or not name or "/" in name or "\0" in name:
        raise UserError(f"{method} returned a sample whose name is {name!r} and must be that of a file, without /")
    if sample.text is not None and not isinstance(sample.text, str):
        raise UserError(f"{method} returned a sample {name!r} whose text is {shape_of(sample.text)} and must be a str")
    if image is not None and not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        raise UserError(
            f"{method} returned a sample {name!r} whose image is {shape_of(image)} and must be an array (height, width, 3) of type uint8"
        )
    if sample.file is not None and not isinstance(sample.file, bytes):
        raise UserError(f"{method} returned a sample {name!r} whose file is {shape_of(sample.file)} and must be bytes")


def _check_predict(task: Task[Any, Any], model: nn.Module, rows: pa.Table) -> None:
    if type(task).predict is Task.predict or not names_columns(task):
        return
    with torch.no_grad():
        result = call(task, "predict", model, batch_of(task, rows, 2))
    good = isinstance(result, dict) and all(isinstance(value, Tensor) and value.dim() and len(value) == 2 for value in result.values())
    if not good:
        shapes = {name: shape_of(value) for name, value in result.items()} if isinstance(result, dict) else shape_of(result)
        raise UserError(f"{name_of(task)}.predict of 2 examples returned {shapes} and must return a dictionary of tensors (2, ...)")
    if wrong := [name for name in result if not isinstance(name, str)]:
        raise UserError(f"{name_of(task)}.predict calls a prediction {wrong[0]!r}: names are texts, those of columns of the output")
