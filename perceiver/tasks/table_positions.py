"""A class for each position of a list per row of a table: segmentation of a series, or of a grid of numbers.

Shapes: B batch, M positions, K classes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.manifest import Split
from perceiver.tasks.base import IGNORE_INDEX, Batch, loss_of_sources, of_examples, padded
from perceiver.tasks.class_metrics import class_table, mean_f1, mean_iou
from perceiver.tasks.table_task import TableSettings, TableTask, flat, model_input


class TablePositions(TableTask):
    """A class for each position; a negative number is none, and left out."""

    metric_directions = {"loss": "min", "acc": "max", "f1": "max", "miou": "max", "baseline_acc": "max"}
    baseline_metrics = {"acc": ("baseline_acc", "always the commonest class")}

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """The inputs, and "labels" (size, M), unless the rows lack their column."""
        batch = self.inputs(rows, size)
        if self.config.targets[0] in rows.column_names:
            batch["labels"] = padded(position_classes(self.config, self.rows.arrays(rows), rows.num_rows), size, IGNORE_INDEX)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, M, K)."""
        return model(model_input(batch)).float()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = self.logits(model, batch), batch["labels"]
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX)
        if torch.is_grad_enabled():
            return each.sum(), loss_of_sources(each, batch)
        given, said, number = labels != IGNORE_INDEX, logits.argmax(-1), logits.shape[-1]
        confusion = torch.bincount((labels * number + said)[given], minlength=number**2).view(number, number)
        return each.sum(), {"confusion": confusion, **of_examples(each, given, said == labels)}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Over all positions of all rows together: accuracy, and the means over classes of F1 and of intersection over union."""
        confusion = sums["confusion"].astype(np.float64)
        hits, said, there = np.diag(confusion), confusion.sum(0), confusion.sum(1)
        total = max(confusion.sum(), 1.0)
        found = {**super().metrics(sums, split), "acc": float(hits.sum() / total)}
        found |= {"f1": mean_f1(hits, said, there), "miou": mean_iou(hits, said, there)}
        if self.config.target_mean:
            found["baseline_acc"] = float(there[int(np.argmax(self.config.target_mean))] / total)
        return found

    def details(self, sums: dict[str, np.ndarray]) -> list[str]:
        return class_table(sums["confusion"], tuple(map(str, range(len(sums["confusion"])))))

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The likeliest class of each position and its probability, (B, M)."""
        probabilities, classes = self.logits(model, batch).softmax(-1).max(-1)
        return {"class": classes, "probability": probabilities}


def position_classes(config: TableSettings, arrays: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
    """The class of each position, (rows, M) int64, IGNORE_INDEX for none.

    Raises:
        UserError: a class that the training data did not have.
    """
    found = flat(arrays, config.targets, num_rows).astype(np.int64)
    number = len(config.target_mean)
    if number and (found >= number).any():
        raise UserError(f"column {config.targets[0]!r} has {found.max()}, and the classes of the training data are 0 to {number - 1}")
    return np.where(found < 0, IGNORE_INDEX, found)


def shares(config: TableSettings, arrays: dict[str, np.ndarray], num_rows: int, num_classes: int) -> np.ndarray:
    """A row for each position that has a class, 1 for that and 0 else, (n, K): its mean are the shares of the classes."""
    labels = position_classes(config, arrays, num_rows)
    return np.eye(num_classes)[labels[labels != IGNORE_INDEX]]
