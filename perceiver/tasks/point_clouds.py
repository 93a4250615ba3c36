"""Classes of point clouds: sets of points with coordinates, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.data.manifest import Split
from perceiver.data.rows import ArrayRows
from perceiver.models import ArrayInput, PerceiverIOConfig
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, padded
from perceiver.tasks.class_settings import ClassSettings
from perceiver.tasks.classification import Classification


class PointCloudsConfig(ClassSettings):
    """The class of each point cloud: rows have "points" (points, axes), from -1 to 1, and "label"."""

    class_names: tuple[str, ...] | None = None
    """Names of the classes."""

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        given = _input(model)
        return ArrayRows(points=((given.max_positions, given.num_features), "float32"), label=((), "int64"))

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        if not self.class_weights:
            return self
        output = getattr(model, "output", None)
        counts = np.zeros(getattr(output, "num_classes", 0), np.int64)
        for block in blocks:
            counts += np.bincount(block["label"].to_numpy(), minlength=len(counts))[: len(counts)]
        return self.counted(counts.tolist())

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        _input(model)
        assert isinstance(model, PerceiverIOConfig)
        return PointClouds(self, model, data, seed)


def _input(model: ModelConfig) -> ArrayInput:
    """The input of a model of point clouds.

    Raises:
        UserError: the model is none.
    """
    found = model.input if isinstance(model, PerceiverIOConfig) else None
    if not isinstance(found, ArrayInput) or found.num_coordinates != found.num_features:
        raise UserError("point clouds need a Perceiver IO model with an ArrayInput of as many coordinates as features")
    return found


class PointClouds(Classification[PointCloudsConfig]):
    """A class per cloud; the points are features and coordinates."""

    metric_directions = {**Classification.metric_directions, "baseline_acc": "max"}
    baseline_metrics = {"acc": ("baseline_acc", "always the commonest class")}

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """Rows that lack their label are for prediction."""
        stored = ArrayRows(**{name: (c.shape, c.dtype) for name, c in self.rows.columns.items() if name in rows.column_names})
        arrays = stored.arrays(rows)
        batch = {"points": padded(arrays["points"], size)}
        if "label" in arrays:
            labels, output = arrays["label"], self.model_config.output
            number = getattr(output, "num_classes", 0)
            if len(wrong := np.flatnonzero((labels < 0) | (labels >= number))):
                raise UserError(f"column 'label' has {labels[wrong[0]]}, and model.output.num-classes is {number}")
            batch["labels"] = padded(labels, size, IGNORE_INDEX)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model({"values": batch["points"], "coordinates": batch["points"]})

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        there = sums["confusion"].sum(1)
        return {**super().metrics(sums, split), "baseline_acc": float(there.max() / max(there.sum(), 1))}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        probabilities = self.logits(model, batch).float().softmax(-1)
        return {"class": probabilities.argmax(-1), "probabilities": probabilities}
