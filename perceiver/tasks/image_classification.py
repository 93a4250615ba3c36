"""Image classification: a class per image."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import ClassOutput, ImageClassificationConfig, ImageInput, PerceiverIOConfig, UserError
from perceiver.data.images import random_crop
from perceiver.data.order import uniforms
from perceiver.data.shards import Manifest, Split, fixed_array
from perceiver.models import build_model
from perceiver.models.flops import training_flops
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, padded
from perceiver.tasks.pictures import confusion_matrix


class ImageClassification(Task):
    """Images (height, width, channels), channels last, pixels scaled to [-1, 1]; accuracy, loss and a confusion matrix."""

    kind = "images"

    def check(self) -> None:
        model, names = self.experiment.model, self._settings.class_names
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput):
            raise UserError("image classification needs a Perceiver IO model with an ImageInput")
        if not isinstance(model.output, ClassOutput):
            raise UserError("image classification needs a model with a ClassOutput")
        if names is not None and len(names) != model.output.num_classes:
            raise UserError(
                f"task.class-names has {len(names)} names but model.output.num-classes is {model.output.num_classes}"
            )

    def build_model(self) -> nn.Module:
        return build_model(self.experiment.model)

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool) -> Batch:
        """images (size, H, W, C) uint8, labels (size,) int64."""
        images = fixed_array(rows, "image").reshape(rows.num_rows, *self._stored_shape(split))
        crop = self._settings.random_crop
        if crop is not None:
            places = uniforms(self._seed, rows["epoch"].to_numpy(), rows["row"].to_numpy(), 2)
            images = random_crop(images, crop, places if train else np.full_like(places, 0.5))
        labels = rows["label"].to_numpy().astype(np.int64)
        return {"images": padded(images, size), "labels": padded(labels, size, IGNORE_INDEX)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"]
        logits = model(batch["images"].float() / 127.5 - 1).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        if torch.is_grad_enabled():
            return loss, {}
        valid = labels != IGNORE_INDEX
        num_classes = logits.shape[-1]
        pairs = labels[valid] * num_classes + logits.argmax(-1)[valid]
        return loss, {"confusion": torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        confusion = sums["confusion"]
        return {**super().metrics(sums, split), "acc": float(np.trace(confusion) / max(confusion.sum(), 1))}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        confusion = sums["confusion"]
        names = self._settings.class_names or tuple(str(i) for i in range(len(confusion)))
        return [Sample("confusion", image=confusion_matrix(confusion, names))] if len(names) <= 100 else []

    def baselines(self, split: Split, manifest: Manifest) -> list[str]:
        num_classes = self.experiment.model.output.num_classes
        return [f"chance is accuracy {1 / num_classes:.3f}, loss {math.log(num_classes):.3f}"]

    def flops_per_example(self) -> float:
        return training_flops(self.experiment.model)

    @property
    def _settings(self) -> ImageClassificationConfig:
        assert isinstance(self.experiment.task, ImageClassificationConfig)
        return self.experiment.task

    @property
    def _seed(self) -> int:
        return self.experiment.training.seed

    def _stored_shape(self, split: Split) -> tuple[int, int, int]:
        """Shape of the images as stored, which a crop makes smaller."""
        height, width, channels = self.experiment.model.input.image_shape
        if self._settings.random_crop is None:
            return height, width, channels
        side = round((split.row_length // channels) ** 0.5)
        return side, split.row_length // channels // side, channels
