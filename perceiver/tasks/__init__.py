"""Tasks by the class of their configuration."""

from perceiver.config import Experiment, UserError
from perceiver.tasks.base import Batch, Sample, Task

__all__ = ["Batch", "Sample", "Task", "build_task"]


def build_task(experiment: Experiment) -> Task:
    """The task of an experiment.

    Raises:
        UserError: a task that cannot be trained yet.
    """
    from perceiver.tasks.causal_lm import CausalLM
    from perceiver.tasks.image_classification import ImageClassification
    from perceiver.tasks.masked_lm import MaskedLM
    from perceiver.tasks.text_classification import TextClassification

    tasks = {
        "CausalLMConfig": CausalLM,
        "ImageClassificationConfig": ImageClassification,
        "MaskedLMConfig": MaskedLM,
        "TextClassificationConfig": TextClassification,
    }
    name = type(experiment.task).__name__
    if name not in tasks:
        raise UserError(
            f"{experiment.preset} is not trainable yet: its task {name.removesuffix('Config')} comes with a later version "
            f"(its model can be built)"
        )
    return tasks[name](experiment)
