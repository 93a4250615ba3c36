"""The metrics of a loaded model over its run's validation data, in this process and without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perceiver.config import UserError
from perceiver.datasets import Dataset
from perceiver.tasks import build_task
from perceiver.training.batches import make_val_loaders, read_here
from perceiver.training.metrics import evaluate as evaluate_on
from perceiver.training.parallel import World

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel


def evaluate(trained: TrainedModel, batches: int | None = None) -> dict[str, float]:
    """See `TrainedModel.evaluate`."""
    if trained.experiment is None:
        raise UserError(f"{trained.name} cannot be evaluated: it was not loaded from a run, which would know its validation data")
    if batches is not None and batches < 1:
        raise UserError(f"batches is {batches} and must be at least 1, or None for all")
    dataset = Dataset.find(trained.experiment)
    task = build_task(dataset.experiment)
    loaders = make_val_loaders(dataset.experiment, task, dataset.folder, dataset.manifest)
    world = World(0, 1, trained.device, mesh=None)  # alone: nothing is sharded, and no process group is left behind
    try:
        metrics, _, _ = evaluate_on(task, trained.model, loaders, world, read_here, batches)
    finally:
        trained.model.eval()
    if not metrics:
        raise UserError(f"the validation data in {dataset.folder} has no target, so nothing can be measured on it")
    return metrics
