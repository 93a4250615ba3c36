"""Metrics of a model over data sets, those of a mixture together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from perceiver.data.components import Component, weighted
from perceiver.data.manifest import Split
from perceiver.training.batches import Loader, ReadAll
from perceiver.training.loop import Examples, validate
from perceiver.training.parallel import World
from perceiver.training.prefetch import Prefetch

if TYPE_CHECKING:
    from perceiver.tasks.base import Task


def evaluate(
    task: Task,
    model: nn.Module,
    loaders: list[tuple[Component, Loader]],
    world: World,
    read_all: ReadAll,
    num_batches: int | None = None,
    keep: Callable[[str, dict[str, np.ndarray]], None] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray], Split]:
    """Metrics (named val_...), their sums and what was read, over each loader's first global batches (None: all of them).

    Of a mixture, val_NAME/SOURCE is a metric on one source, and val_NAME that on all, each with its share. Data without any
    target has no metrics: a sum over nothing, 0, is no loss.

    Args:
        keep: called with what each example of a data set adds to its sums (`Task.each`), in the order of the rows, and the data set's
            name. The loaders are numbered then.
    """
    metrics: dict[str, float] = {}
    passes = []
    for part, loader in loaders:
        examples = Examples(loader.split.rows) if keep is not None else None
        sums = _pass(task, model, loader, world, read_all, num_batches, examples)
        if keep is not None and examples is not None:
            keep(part.name, examples.together(world))
        if not sums.get("targets", 0):
            continue
        passes.append((part, sums))
        suffix = f"/{part.name}" if part.name else ""
        metrics |= {f"val_{name}{suffix}": value for name, value in task.metrics(sums, loader.split).items()}
    if not passes:
        return {}, {}, loaders[0][1].split
    if len(loaders) == 1:
        return metrics, passes[0][1], loaders[0][1].split
    sums, split = weighted([part for part, _ in passes], [sums for _, sums in passes])
    return {f"val_{name}": value for name, value in task.metrics(sums, split).items()} | metrics, sums, split


def _pass(
    task: Task, model: nn.Module, loader: Loader, world: World, read_all: ReadAll, num_batches: int | None, examples: Examples | None
) -> dict[str, np.ndarray]:
    stop = min(loader.order.steps_per_epoch, num_batches or loader.order.steps_per_epoch)
    batches = Prefetch(loader.steps(read_all, world.rank, world.size, 0, stop), world.device)
    try:
        return validate(task, model, batches, world, examples)
    finally:
        batches.close()
