"""The metrics of a loaded model over its run's validation data, in this process and without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perceiver.config import UserError
from perceiver.data_settings import OtherData
from perceiver.datasets import Dataset
from perceiver.training.batches import read_here, val_loaders
from perceiver.training.metrics import evaluate as evaluate_on
from perceiver.training.parallel import World

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel


def evaluate(trained: TrainedModel, batches: int | None = None) -> dict[str, float]:
    """See `TrainedModel.evaluate`."""
    experiment = trained.experiment
    if experiment is None:
        raise UserError(f"{trained.name} cannot be evaluated: it was not loaded from a run, which would know its validation data")
    if batches is not None and batches < 1:
        raise UserError(f"batches is {batches} and must be at least 1, or None for all")
    dataset = Dataset.find(OtherData.of(experiment, trained.data), trained.provenance.get("data"))
    data, training, size = dataset.experiment.data, experiment.training, experiment.parallel.micro_batch_size
    task = trained.task.build(trained.config, data, trained.seed)
    loaders = val_loaders(task, dataset.folder, dataset.manifest, data=data, training=training, micro_batch_size=size)
    world = World(0, 1, trained.device, mesh=None)  # alone: nothing is sharded, and no process group is left behind
    try:
        metrics, _, _ = evaluate_on(task, trained.model, loaders, world, read_here, batches)
    finally:
        trained.model.eval()
    if not metrics:
        raise UserError(f"the validation data in {dataset.folder} has no target, so nothing can be measured on it")
    return metrics
