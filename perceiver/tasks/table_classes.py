"""A class per row of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.manifest import Split
from perceiver.tasks.base import IGNORE_INDEX, Batch, padded
from perceiver.tasks.classification import Classification
from perceiver.tasks.table_task import TableSettings, TableTask, model_input


class TableClassification(TableTask, Classification[TableSettings]):
    """A class per row, beside always answering the commonest class of the training split."""

    metric_directions = {**Classification.metric_directions, "baseline_acc": "max"}
    baseline_metrics = {"acc": ("baseline_acc", "always the commonest class")}

    @property
    def class_column(self) -> str | None:  # type: ignore[override]
        return self.config.targets[0]

    def classes(self, rows: pa.Table) -> np.ndarray:
        return class_numbers(self.config, rows)

    def dummy_rows(self, size: int) -> pa.Table:
        return with_classes(super().dummy_rows(size), [self.config])

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        batch = self.inputs(rows, size)
        if self.config.targets[0] in rows.column_names:
            labels = class_numbers(self.config, rows) if rows.num_rows else np.empty(0, np.int64)
            batch["labels"] = padded(labels, size, IGNORE_INDEX)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(model_input(batch))

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        confusion = sums["confusion"].astype(np.float64)
        found = super().metrics(sums, split)
        if self.config.target_mean:
            found["baseline_acc"] = float(confusion.sum(1)[int(np.argmax(self.config.target_mean))] / max(confusion.sum(), 1))
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        probabilities = self.logits(model, batch).float().softmax(-1)
        return {"class": probabilities.argmax(-1), "probabilities": probabilities}

    def prediction_names(self) -> dict[str, tuple[str, ...]]:
        names = self.config.class_names or tuple(map(str, range(len(self.config.target_mean))))
        return dict.fromkeys(("class", "probabilities"), names)


def with_classes(rows: pa.Table, settings: Sequence[TableSettings]) -> pa.Table:
    """Rows of which each text that names a class names the first."""
    for own in settings:
        if own.loss == "classes" and own.class_names:
            name = own.targets[0]
            values = pa.array([own.class_names[0]] * rows.num_rows, rows[name].type)
            rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), values)
    return rows


def class_numbers(config: TableSettings, rows: pa.Table) -> np.ndarray:
    """The class of each row.

    Raises:
        UserError: a class that the training data did not have.
    """
    column, num_classes = rows[config.targets[0]], len(config.class_names or config.target_mean)
    if config.class_names is not None:
        numbers = {name: number for number, name in enumerate(config.class_names)}
        found = np.array([numbers.get(name, -1) for name in column.to_pylist()], np.int64)
    else:
        found = column.to_numpy()
    wrong = (found < 0) | (found >= num_classes if num_classes else False)
    if wrong.any():
        place = int(wrong.argmax())
        where = f" in row {rows['row'][place].as_py():,} of its split" if "row" in rows.column_names else ""
        found_value = f"column {config.targets[0]!r} has {column[place].as_py()!r}{where}"
        raise UserError(f"{found_value}, which is none of the {num_classes} classes of the training data")
    return found
