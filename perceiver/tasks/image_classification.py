"""Image classification: a class per image."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.data.images import random_crop
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.data.rows import fixed_array
from perceiver.models import ClassOutput, ImageInput, PerceiverIOConfig
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, padded
from perceiver.tasks.classification import Classification


class ImageClassificationConfig(TaskConfig):
    """A class per image."""

    kind: ClassVar[str] = "images"
    abilities: ClassVar[tuple[str, ...]] = ("classify", "embed")

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: their numbers."""
    random_crop: int | None = None
    """Training images are cropped to this side length at a random place; None: not cropped."""

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
            raise UserError(f"task.random_crop is {crop}, but the images have {height} x {width} pixels")
        expected = shape if crop is None else (crop, crop, channels)
        if tuple(model.input.image_shape) != expected:
            raise UserError(
                f"model.input.image_shape is {tuple(model.input.image_shape)}, but the images are {shape}"
                + ("" if crop is None else f", cropped to {expected}")
            )

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, ImageInput):
            raise UserError("image classification needs a Perceiver IO model with an ImageInput")
        return ImageClassification(self, model, data, seed)


class ImageClassification(Classification[ImageClassificationConfig]):
    """Images (height, width, channels), channels last, pixels scaled to [-1, 1]."""

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """images (size, H, W, C) uint8, labels (size,) int64."""
        assert split.image_shape is not None
        images = fixed_array(rows, "image").reshape(rows.num_rows, *split.image_shape)
        crop = self.config.random_crop
        if crop is not None:
            seed = self.seed
            places = uniforms(seed, rows["epoch"].to_numpy(), rows["row"].to_numpy(), 2)
            images = random_crop(images, crop, places if train else np.full_like(places, 0.5))
        labels = rows["label"].to_numpy().astype(np.int64)
        return {"images": padded(images, size), "labels": padded(labels, size, IGNORE_INDEX)}

    def dummy_batch(self, size: int) -> Batch:
        image = self.model_config.input
        assert isinstance(image, ImageInput)  # or the task were not built
        return {"images": torch.zeros(size, *image.image_shape, dtype=torch.uint8), "labels": torch.zeros(size, dtype=torch.int64)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["images"].float() / 127.5 - 1)
