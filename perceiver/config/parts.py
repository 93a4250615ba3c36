"""What an experiment is made of: the open base classes of models, tasks and callbacks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from perceiver.config.core import Config

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from perceiver.config.data import DataConfig
    from perceiver.config.experiment import Experiment
    from perceiver.data.rows import ArrayRows
    from perceiver.tasks.base import Task
    from perceiver.training.callbacks import Callback


class ModelConfig(Config):
    """A model: base class of all. Any architecture will do, Perceiver or not."""

    encoder_fields: ClassVar[tuple[str, ...]] = ()
    """Of a model whose encoder can start from another model's (`training.init-encoder-from`): how the names of the fields begin
    that say what its encoder is. The names of the encoder's weights then begin with "encoder."; (): it has none of its own."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model on the current default device, "meta" when it is to be sharded: then no weight has a value yet.

        The module has `layers()`, the list of layers to shard, recompute and compile one by one; `init_weights(seed)`, which gives every
        parameter its initial value as a function of the seed alone; and `reset_buffers()`, which computes its constants.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that returns the model")

    def text_limits(self) -> tuple[int, int] | None:
        """Of a model that reads text: its longest input in tokens, and the number of token ids. None: it reads something else."""
        return None

    def num_text_ids(self) -> int | None:
        """Number of token ids of texts that go in beside other things, such as columns of a table. None: there are no such texts."""
        return None

    def causal_limits(self) -> tuple[int, int] | None:
        """Of a causal model of ids with `text_limits`: its longest input, and how many of the last positions predict. None: it is none."""
        return None

    def picture_shape(self) -> tuple[int, int, int] | None:
        """Of a model that reads pictures: their height, width and channels. None: it reads something else."""
        return None

    def number_of_classes(self) -> int | None:
        """Of a model that gives classes: how many (0: as many as the data has). None: it gives something else."""
        return None

    def batch_shape(self) -> tuple[Any, ...] | None:
        """Of a model that takes one tensor: its shape, as `perceiver.models.tensor_shapes.Shape` writes it: ("B", 28, 28). By it the model
        is written as ONNX. None: it takes something else.
        """
        return None


class TaskConfig(Config):
    """What is learned: base class of all tasks' settings."""

    kind: ClassVar[str] = "arrays"
    """What prepared rows the task reads: "images", "tokens", "documents" (see perceiver/data/rows.py), or "arrays" (`rows`)."""
    document_marks: ClassVar[str] = "eos"
    """Of a task that reads a stream of text, the ids around each document: "eos" (one after it) or "cls-sep"."""
    abilities: ClassVar[tuple[str, ...]] = ("predict",)
    """Methods of `perceiver.inference.trained.TrainedModel` that its models have; a batch of rows is given to the first by default."""
    several_classes: ClassVar[bool] = False
    """Of a task with classes, whether an example has any number of them and not one."""
    takes_any: ClassVar[bool] = False
    """Whether `of_model` takes every model of a class: such a task is asked after those that take some."""

    measured: ClassVar[tuple[str, ...]] = ()
    """Fields that `measure` fills in. They follow from the data, so they are no part of a run's identity."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        """The task, where published weights of such a model were trained for it; None: they were not, as far as this task can tell."""
        return None

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows | None:
        """The columns of the rows that the task reads, where it reads arrays (kind "arrays"); else None."""
        return None

    def check_images(self, model: ModelConfig, shape: tuple[int, int, int]) -> None:
        """Checks that images (height, width, channels) are what the task and its model take, where it reads images.

        Raises:
            UserError: they are not.
        """

    def prepared_settings(self, model: ModelConfig) -> dict[str, Any]:
        """What of the task and its model decides how rows are prepared, besides what their kind says: "row_length", "sample_rate"."""
        return {}

    def completed(self, experiment: Experiment) -> Experiment:
        """The experiment with what its command line left open and the schema of its data tells: sizes, names of classes.

        Raises:
            UserError: the data has not what the experiment names.
        """
        return experiment

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        """The settings with their `measured` fields filled in from all rows of the training split."""
        return self

    def counted(self, counts: Sequence[float]) -> Self:
        """The settings with what follows from how often each class occurs in the training split, where rows have one."""
        return self

    @abstractmethod
    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        """The task for one model and one kind of data, a subclass of `perceiver.tasks.base.Task`; `seed` is that of all random choices.

        Raises:
            UserError: it cannot be trained, or not with such a model.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build(model, data, seed) that returns the task")


class CallbackConfig(Config):
    """Something that watches a training: base class of all callbacks' settings."""

    @abstractmethod
    def build(self) -> Callback:
        """The callback, a subclass of `perceiver.training.callbacks.Callback`: one on every worker, for every start of a run.

        It is built before that, too, to be tried: what it opens belongs into `on_start`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that returns the callback")

    def ready(self, where: str) -> CallbackConfig:
        """Itself as workers get it, with what the environment of the command says. Called before workers start.

        Args:
            where: its place with a dot at its end, "callbacks.0.".

        Raises:
            UserError: it cannot work: a package or an account is missing, say.
        """
        return self

    def check_metrics(self, where: str, names: Sequence[str]) -> None:
        """Checks the metrics that it names before a training starts.

        Args:
            where: its place, as its fields are typed ("callbacks.0.").
            names: all that validations of the training give (val_loss, ...).

        Raises:
            UserError: it names another.
        """
