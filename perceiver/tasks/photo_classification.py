"""Classification of photos as on ImageNet: pictures are kept encoded, decoded and changed in data tasks, and mixed in batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import DataConfig, Experiment, ModelConfig, UserError
from perceiver.config.core import spelled
from perceiver.data.columns import fixed_array, fixed_column
from perceiver.data.images import IMAGENET_DEVIATION, IMAGENET_MEAN, JPEG, decode_image, framed
from perceiver.data.labels import class_order, label_counts
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.data.sources import is_path, resolve
from perceiver.models import ImageInput, PerceiverIOConfig
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, loss_of_sources, padded
from perceiver.tasks.class_settings import ClassSettings
from perceiver.tasks.classification import Classification, with_classes
from perceiver.tasks.randaugment import CROP_DRAWS, MOST_MAGNITUDE, OP_DRAWS, mixed, randaugment, random_part

_CHANGES, _MIXING = 0, 1
"""Streams of random numbers: of a picture's own changes, and of what it is mixed with."""
_MIXING_DRAWS = 5


class PhotoClassificationConfig(ClassSettings):
    """A class per photo, of any size. In validation the middle 7/8 of a photo are scaled to the model's size.

    In training a random part is (a mirror image half of the times), then come RandAugment, MixUp and CutMix. Pixels are normalised with
    ImageNet's mean and deviation, as the published models want it.
    """

    kind: ClassVar[str] = "photos"
    abilities: ClassVar[tuple[str, ...]] = ("classify", "embed")

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: those of the data's folders, or their numbers."""
    min_area: float = 0.08
    """Smallest share of a photo's area that a random part of it has in training; 1: the largest part in the middle."""
    mirror: bool = True
    """In training, mirror half of the photos."""
    randaugment_ops: int = 0
    """Operations of RandAugment that each training photo goes through."""
    randaugment_magnitude: float = 5.0
    """How strong they are, from 0 to 10."""
    mixup: float = 0.0
    """Alpha of MixUp: training photos are weighted means of two, with a weight from Beta(alpha, alpha); 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix: a part of another photo is laid into a training photo; 0: none. With MixUp, each takes half of the photos."""
    label_smoothing: float = 0.0
    """Share of a training target's probability that goes to all classes alike."""

    def check(self, where: str) -> None:
        super().check(where)
        where = spelled(where)
        if not 0 < self.min_area <= 1:
            raise UserError(f"{where}min-area is {self.min_area} and must be above 0 and at most 1")
        for name, most in (("randaugment-magnitude", MOST_MAGNITUDE), ("mixup", 100), ("cutmix", 100)):
            if not 0 <= (value := getattr(self, name.replace("-", "_"))) <= most:
                raise UserError(f"{where}{name} is {value} and must be from 0 to {most}")
        if not 0 <= self.randaugment_ops <= 20:
            raise UserError(f"{where}randaugment-ops is {self.randaugment_ops} and must be from 0 to 20")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"{where}label-smoothing is {self.label_smoothing} and must be at least 0 and below 1")

    def completed(self, experiment: Experiment) -> Experiment:
        if experiment.data.image_size is not None:
            raise UserError(
                f"data.image-size is {experiment.data.image_size}, and this task keeps photos as they are: leave it out "
                "(--model.input.image-shape is the size that they are scaled to)"
            )
        return _with_names(with_classes(experiment))

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput) or model.input.image_shape[2] != 3:
            raise UserError("photo classification needs a Perceiver IO model with an ImageInput of 3 colours")
        if min(model.input.image_shape) < 1:
            raise UserError(f"model.input.image-shape is {model.input.image_shape}: say the size that photos are scaled to, as 224 224 3")
        return PhotoClassification(self, model, data, seed)


def _with_names(experiment: Experiment) -> Experiment:
    """An experiment whose labels are names (of folders) with these names, where its model has as many classes.

    Raises:
        UserError: there are more names, or less.
    """
    model, task, data = experiment.model, experiment.task, experiment.data
    number = getattr(getattr(model, "output", None), "num_classes", 0)
    if getattr(task, "class_names", None) or not data.source or data.mixture or not is_path(data.source):
        return experiment
    source = resolve(data, task.kind)
    if not all(file.format in ("picture", "tar") for file in source.files):
        return experiment
    counts = label_counts(source, data.label_column, "train", skip=data.on_error == "skip")
    if all(name.isdecimal() for name in counts):
        return experiment
    if len(counts) != number:
        raise UserError(
            f"data.source {data.source} has {len(counts)} classes, and model.output.num-classes is {number}: give "
            "--model.output.num-classes 0 to take those of the data"
        )
    named: dict[str, Any] = {"class_names": class_order(counts)}
    return replace(experiment, task=replace(task, **named))


class PhotoClassification(Classification[PhotoClassificationConfig]):
    """Photos (height, width, 3), channels last, normalised with ImageNet's mean and deviation."""

    def _size(self) -> tuple[int, int]:
        image = self.model_config.input
        assert isinstance(image, ImageInput)  # or the task were not built
        return image.image_shape[0], image.image_shape[1]

    def decode(self, rows: pa.Table, split: Split, train: bool) -> pa.Table:
        """Encoded photos as pixels of the model's size, uint8, changed at random in training."""
        height, width = self._size()
        images = np.empty((rows.num_rows, height, width, 3), np.uint8)
        draws = self._draws(rows) if train else None
        for i, content in enumerate(rows["image"]):
            data = content.as_py()
            images[i] = self._changed(data, draws[i]) if draws is not None else framed(_colour(decode_image(data)), height, width)
        column = fixed_column(images.reshape(rows.num_rows, height * width * 3))
        return rows.set_column(rows.column_names.index("image"), "image", column)

    def _draws(self, rows: pa.Table) -> np.ndarray:
        number = CROP_DRAWS + 1 + OP_DRAWS * self.config.randaugment_ops
        return uniforms(self.seed, rows["epoch"].to_numpy(), rows["row"].to_numpy(), number, stream=_CHANGES)

    def _changed(self, data: bytes, draws: np.ndarray) -> np.ndarray:
        """A training photo: (height, width, 3) uint8."""
        from torchvision.transforms.v2 import functional

        config, image = self.config, _tensor(data)
        area = random_part(image.shape[1], image.shape[2], draws[:CROP_DRAWS], config.min_area)
        image = functional.resized_crop(image, *area, size=list(self._size()), antialias=True)
        if config.mirror and draws[CROP_DRAWS] < 0.5:
            image = functional.horizontal_flip(image)
        if config.randaugment_ops:
            image = randaugment(image, draws[CROP_DRAWS + 1 :], config.randaugment_magnitude)
        return np.moveaxis(image.numpy(), 0, -1)

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """images (size, H, W, 3) uint8, labels (size,) int64; where photos are mixed, share (size,) of the label, and partner (size,), the
        label of the rest.
        """
        config, labels = self.config, rows["label"].to_numpy().astype(np.int64)
        images = fixed_array(rows, "image").reshape(rows.num_rows, *self._size(), 3)
        if not train or not (config.mixup or config.cutmix):
            return {"images": padded(images, size), "labels": padded(labels, size, IGNORE_INDEX)}
        draws = uniforms(self.seed, step, rows["row"].to_numpy(), _MIXING_DRAWS, stream=_MIXING)
        images, shares, partners = mixed(images, draws, config.mixup, config.cutmix)
        batch = {"images": padded(images, size), "labels": padded(labels, size, IGNORE_INDEX)}
        return {**batch, "share": padded(shares, size, 1.0), "partner": padded(labels[partners], size, IGNORE_INDEX)}

    def dummy_batch(self, size: int) -> Batch:
        labels = torch.zeros(size, dtype=torch.int64)
        batch = {"images": torch.zeros(size, *self._size(), 3, dtype=torch.uint8), "labels": labels}
        return {**batch, "share": torch.ones(size), "partner": labels} if self.config.mixup or self.config.cutmix else batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        images = batch["images"]
        mean, deviation = (images.new_tensor(255 * values, dtype=torch.float32) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return model((images.float() - mean) / deviation)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """In training with smoothed labels, of mixed photos those of both; in validation plain."""
        if not torch.is_grad_enabled():
            return super().loss(model, batch)
        logits = self.logits(model, batch).float()
        each = self._cross_entropy(logits, batch["labels"])
        if "share" in batch:
            share = batch["share"].float()
            each = share * each + (1 - share) * self._cross_entropy(logits, batch["partner"])
        return each.sum(), loss_of_sources(each, batch)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=smoothing)
        weights = self._weights(logits.device)
        return each if weights is None else each * weights[labels.clamp(min=0)]


def _tensor(data: bytes) -> Tensor:
    """An encoded photo as uint8 (3, height, width)."""
    if data.startswith(JPEG):
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            return decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:  # such as a kind that Pillow alone reads
            pass
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(_colour(decode_image(data)), -1, 0)))


def _colour(pixels: np.ndarray) -> np.ndarray:
    """Grey as colour."""
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
