"""Tasks: what is learned, one file each."""

from perceiver.config import Experiment
from perceiver.tasks.base import Batch, Sample, Task

__all__ = ["Batch", "Sample", "Task", "build_task"]


def build_task(experiment: Experiment) -> Task:
    """The task of an experiment.

    Raises:
        UserError: a task that cannot be trained yet.
    """
    return experiment.task.build(experiment.model, experiment.data, experiment.training.seed)
