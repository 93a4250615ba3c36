"""Image classification: a class per image."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.config.core import spelled
from perceiver.data.columns import fixed_array
from perceiver.data.images import random_crop
from perceiver.data.labels import picture_sizes
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.data.sources import resolve
from perceiver.models import ClassOutput, ImageInput, PerceiverIOConfig
from perceiver.plots import captioned, pixels
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, padded
from perceiver.tasks.class_settings import ClassSettings
from perceiver.tasks.classification import Classification, with_classes
from perceiver.tasks.distortion import distorted
from perceiver.tasks.tags import Tags

logger = logging.getLogger(__name__)

_LARGEST, _USUAL_SIZE = 128, 64
"""Side of pictures that are taken as they are, at most; side that others are scaled to."""
_DISTORTION = 1
"""Stream of the random numbers that distort an image; 0: those of its crop."""
_MISTAKES = 24
"""Pictures of a validation that got a wrong class which are shown, at most."""


class ImageClassificationConfig(ClassSettings):
    """A class per image."""

    kind: ClassVar[str] = "images"
    abilities: ClassVar[tuple[str, ...]] = ("classify", "embed")

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: their numbers, or those of the data, if model.output.num-classes is 0."""
    random_crop: int | None = None
    """Crop training images to this side length at a random place; None: do not crop."""
    random_rotation: float = 0.0
    """Rotate training images by a random angle of at most this many degrees."""
    random_scaling: float = 0.0
    """Scale training images at random by at most this share of their size (0.1: 90% to 110%)."""
    random_shift: float = 0.0
    """Move training images at random by at most this share of their width and height."""

    def check(self, where: str) -> None:
        super().check(where)
        for name, most in (("random_rotation", 180), ("random_scaling", 0.9), ("random_shift", 1)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{spelled(where + name)} is {value} and must be from 0 to {most}")

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        match model:
            case PerceiverIOConfig(input=ImageInput(), output=ClassOutput()):
                return cls()
        return None

    def check_images(self, model: ModelConfig, shape: tuple[int, int, int]) -> None:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput):
            raise UserError("the task reads images, but the model does not")
        height, width, channels = shape
        crop = self.random_crop
        if crop is not None and not 1 <= crop <= min(height, width):
            raise UserError(f"task.random-crop is {crop}, but the images have {height} x {width} pixels")
        expected = shape if crop is None else (crop, crop, channels)
        if tuple(model.input.image_shape) != expected:
            raise UserError(
                f"model.input.image-shape is {tuple(model.input.image_shape)}, but the images are {shape}"
                + ("" if crop is None else f", cropped to {expected}")
            )

    def completed(self, experiment: Experiment) -> Experiment:
        return _with_shape(with_classes(experiment))

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput):
            raise UserError("image classification needs a Perceiver IO model with an ImageInput")
        return ImageClassification(self, model, data, seed)


def _with_shape(experiment: Experiment) -> Experiment:
    """An experiment whose model has images of 0 x 0 x 0 with the shape of its data's pictures, or what they are scaled to.

    Raises:
        UserError: none of the pictures can be read.
    """
    model, data = experiment.model, experiment.data
    if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput) or model.input.image_shape != (0, 0, 0):
        return experiment
    crop = getattr(experiment.task, "random_crop", None)
    sizes = picture_sizes(resolve(data, experiment.task.kind), skip=data.on_error == "skip")
    channels = max(shape[2] for shape in sizes)
    sides: Counter[tuple[int, int]] = Counter()
    for (height, width, _), count in sizes.items():
        sides[height, width] += count
    (height, width), _ = sides.most_common(1)[0]
    size = data.image_size
    if size is None and (len(sides) > 1 or max(height, width) > _LARGEST):
        size = min(_USUAL_SIZE, min(min(each) for each in sides))
        size = max(size, crop or 1)
    smallest, largest = min(sides, key=lambda each: each[0] * each[1]), max(sides, key=lambda each: each[0] * each[1])
    kind = "grey" if channels == 1 else "colour"
    if size is None:
        logger.info(f"pictures: {height} x {width} pixels, {kind}, taken as they are")
    else:
        what = f"of {len(sides):,} sizes, {_by(smallest)} to {_by(largest)}" if len(sides) > 1 else f"of {_by(smallest)}"
        logger.info(
            f"pictures: {what} pixels, {kind}: scaled until the shorter side has {size} pixels, and the middle {size} x {size} cut out "
            "(--data.image-size N: another size)"
        )
        height = width = size
    if crop is not None:
        height = width = crop
    shaped = replace(model, input=replace(model.input, image_shape=(height, width, channels)))
    return replace(experiment, model=shaped, data=replace(data, image_size=size))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


class ImageClassification(Classification[ImageClassificationConfig]):
    """Images (height, width, channels), channels last, pixels scaled to [-1, 1]."""

    def __init__(self, config: ImageClassificationConfig, model: PerceiverIOConfig, data: DataConfig, seed: int) -> None:
        super().__init__(config, model, data, seed)
        self._mistakes: list[tuple[np.ndarray, int, int, float]] = []
        """Pixels, class, class given, its probability."""

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """images (size, H, W, C) uint8, labels (size,) int64."""
        assert split.image_shape is not None
        images = fixed_array(rows, "image").reshape(rows.num_rows, *split.image_shape)
        config, seed, epochs, numbers = self.config, self.seed, rows["epoch"].to_numpy(), rows["row"].to_numpy()
        distortion = config.random_rotation, config.random_scaling, config.random_shift
        if train and any(distortion):
            images = distorted(images, uniforms(seed, epochs, numbers, 4, stream=_DISTORTION), *distortion)
        crop = config.random_crop
        if crop is not None:
            places = uniforms(seed, epochs, numbers, 2)
            images = random_crop(images, crop, places if train else np.full_like(places, 0.5))
        return {"images": padded(images, size), "labels": self.labels(rows, size)}

    def observe(self, batch: Batch, logits: Tensor) -> None:
        """Keeps the first pictures of a validation that got a wrong class (of those that this worker sees)."""
        found, labels = self._mistakes, batch["labels"]
        if len(found) == _MISTAKES:
            return
        probabilities = logits.softmax(-1)
        for i in ((labels != IGNORE_INDEX) & (logits.argmax(-1) != labels)).nonzero().flatten().tolist()[: _MISTAKES - len(found)]:
            guess = int(logits[i].argmax())
            found.append((batch["images"][i].cpu().numpy(), int(labels[i]), guess, float(probabilities[i, guess])))

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        found, self._mistakes = self._mistakes, []
        names = self.names_of(len(sums["confusion"]))
        titles = [f"{names[label]}, not {names[guess]} ({probability:.0%})" for _, label, guess, probability in found]
        pictures = captioned([image for image, *_ in found], titles, "true class, and the one given to it with its probability")
        return [*super().samples(model, sums, split), *([Sample("mistakes", image=pixels(pictures))] if found else [])]

    def dummy_batch(self, size: int) -> Batch:
        image = self.model_config.input
        assert isinstance(image, ImageInput)  # or the task were not built
        return {"images": torch.zeros(size, *image.image_shape, dtype=torch.uint8), "labels": self.dummy_labels(size)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["images"].float() / 127.5 - 1)


class ImageTagsConfig(ImageClassificationConfig):
    """Any number of classes per image."""

    kind: ClassVar[str] = "tagged-images"
    several_classes: ClassVar[bool] = True

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        return None

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput):
            raise UserError("classes of images need a Perceiver IO model with an ImageInput")
        return ImageTags(self, model, data, seed)


class ImageTags(Tags[ImageTagsConfig], ImageClassification):  # type: ignore[misc]
    """Images with any number of classes each."""
