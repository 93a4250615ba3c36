"""Learning from tables: classes, several labels or numbers from columns of numbers, which the command line names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.data.manifest import Split
from perceiver.data.rows import ArrayRows
from perceiver.data.table_schema import TableSchema
from perceiver.models import ClassOutput, PerceiverIOConfig, TableInput, ValueOutput
from perceiver.models.table_input import shape_of, text_of
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, loss_of_sources, padded
from perceiver.tasks.classification import Classification
from perceiver.tasks.moments import Moments

MAX_CLASSES = 10_000
"""Classes that whole numbers are taken for at most."""


class TablesConfig(TaskConfig):
    """Classes, labels or numbers from the columns of a table."""

    measured = ("input_mean", "input_scale", "target_mean", "target_scale")

    targets: tuple[str, ...] = ()
    """Columns to predict, separated by spaces or commas."""
    loss: Literal["auto", "classes", "labels", "mse", "mae", "huber", "gaussian", "quantiles"] = "auto"
    """classes: one of several classes; labels: each target is 0 or 1, any number of them together; numbers: mse, mae, huber, gaussian
    (mean and deviation) or quantiles. auto: classes for one column of texts or whole numbers, else mse."""
    huber: float = 1.0
    """Of loss huber: the error, in standard deviations of the target, above which the loss grows linearly."""
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Of loss quantiles: which ones, ascending."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes: as found in a column of texts; None: their numbers."""
    target_shapes: tuple[str, ...] = ()
    """Shape of each target's value in a row, as model.input.shapes; None: as found in the data."""
    input_mean: tuple[float, ...] = ()
    """Mean of each channel of the input columns in the training split, set by the training."""
    input_scale: tuple[float, ...] = ()
    """Standard deviation of the same."""
    target_mean: tuple[float, ...] = ()
    """Mean of each target in the training split (of classes: each one's share), set by the training."""
    target_scale: tuple[float, ...] = ()
    """Standard deviation of the same."""

    def completed(self, experiment: Experiment) -> Experiment:
        model = experiment.model
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TableInput) or model.input.shapes:
            return experiment
        if not experiment.data.source:
            raise UserError("data.source is empty: name your table, --data.source FILE.parquet")
        schema = TableSchema(experiment.data)
        targets = _names(self.targets)
        if not targets:
            raise UserError(
                f"task.targets is empty: name the columns to predict, --task.targets NAME ({schema.name} has: {_list(schema.types)})"
            )
        for name in targets:
            schema.check(name, "--task.targets")
        columns = _names(model.input.columns) or tuple(name for name in schema.types if name not in targets and schema.is_numeric(name))
        if not columns:
            raise UserError(f"{schema.name} has no column of numbers beside the targets: model.input.columns needs one")
        if both := sorted(set(columns) & set(targets)):
            raise UserError(f"--model.input.columns and --task.targets both name {both[0]!r}: what is predicted cannot go in")
        shapes = tuple(text_of(schema.shape(name, "--model.input.columns")) for name in columns)
        task = replace(self, targets=targets, loss=self._loss(schema, targets))
        task, num_outputs = task._with_targets(schema)
        channels = getattr(model.output, "num_query_channels", None)
        kind: Any = ClassOutput if task.loss == "classes" else ValueOutput
        number = {"num_classes" if task.loss == "classes" else "num_values": num_outputs}
        output = kind(**number) if channels is None else kind(**number, num_query_channels=channels)
        made = replace(model, input=replace(model.input, columns=columns, shapes=shapes), output=output)
        return replace(experiment, task=task, model=made)

    def _loss(self, schema: TableSchema, targets: tuple[str, ...]) -> Any:
        if self.loss != "auto":
            return self.loss
        first = targets[0]
        return "classes" if len(targets) == 1 and (schema.is_text(first) or schema.is_whole(first)) else "mse"

    def _with_targets(self, schema: TableSchema) -> tuple[TablesConfig, int]:
        """With the targets' shapes and classes, and the number of outputs."""
        if self.loss != "classes":
            shapes = [schema.shape(name, "--task.targets") for name in self.targets]
            texts = tuple(text_of(shape) for shape in shapes)
            return replace(self, target_shapes=texts), sum(map(math.prod, shapes)) * self.outputs_per_target
        name = self.targets[0]
        if len(self.targets) > 1:
            raise UserError(
                f"--task.targets names {len(self.targets)} columns and task.loss is classes, which takes one: or labels, mse, ..."
            )
        if schema.is_text(name):
            classes = tuple(schema.distinct(name))
            return replace(self, target_shapes=(text_of(()),), class_names=classes), len(classes)
        if schema.shape(name, "--task.targets") != ():
            raise UserError(f"--task.targets names {name!r}, which holds lists: task.loss classes takes one class a row")
        values = schema.distinct(name)
        if not values or min(values) < 0 or max(values) >= MAX_CLASSES or any(value != int(value) for value in values):
            found = f"{min(values):g} .. {max(values):g}" if values else "nothing"
            raise UserError(
                f"--task.targets names {name!r} with {found}, and classes are whole numbers from 0 to {MAX_CLASSES - 1:,}: for a quantity "
                "give --task.loss mse"
            )
        return replace(self, target_shapes=(text_of(()),)), int(max(values)) + 1

    @property
    def outputs_per_target(self) -> int:
        """Numbers that the model says of one number to predict."""
        return {"gaussian": 2, "quantiles": len(self.quantiles)}.get(self.loss, 1)

    @property
    def num_targets(self) -> int:
        """Numbers to predict in a row."""
        return sum(math.prod(shape_of(text)) for text in self.target_shapes)

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        table = _input(model)
        columns = {name: (shape_of(text), "float32") for name, text in zip(table.columns, table.shapes, strict=True)}
        kind = "float32" if self.loss != "classes" else "string" if self.class_names else "int64"
        return ArrayRows(**columns, **{name: (shape_of(text), kind) for name, text in zip(self.targets, self.target_shapes, strict=True)})

    def measure(self, model: ModelConfig, blocks: Iterator[pa.Table]) -> TaskConfig:
        table = _input(model)
        rows = self.rows(model, DataConfig())
        inputs = [Moments(channels) for _, channels in table.sizes()]
        targets = Moments(_num_classes(model) if self.loss == "classes" else self.num_targets)
        for block in blocks:
            arrays = rows.arrays(block)
            for name, moments in zip(table.columns, inputs, strict=True):
                moments.add(arrays[name].reshape(-1, moments.size))
            if self.loss == "classes":
                targets.add(np.eye(targets.size)[class_numbers(self, block)])
            else:
                targets.add(flat(arrays, self.targets, block.num_rows))
        return replace(
            self,
            input_mean=tuple(value for moments in inputs for value in moments.mean.tolist()),
            input_scale=tuple(value for moments in inputs for value in moments.scale.tolist()),
            target_mean=tuple(targets.mean.tolist()),
            target_scale=tuple(targets.scale.tolist()),
        )

    def check(self, where: str) -> None:
        if not self.huber > 0:
            raise UserError(f"{where}huber is {self.huber} and must be above 0")
        ascending = all(low < high for low, high in zip(self.quantiles, self.quantiles[1:], strict=False))
        if not self.quantiles or not ascending or not 0 < self.quantiles[0] or not self.quantiles[-1] < 1:
            raise UserError(f"{where}quantiles is {' '.join(map(str, self.quantiles))} and must be ascending numbers between 0 and 1")

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        if not isinstance(model, PerceiverIOConfig) or not isinstance(model.input, TableInput):
            raise UserError("tables need a Perceiver IO model whose input is a TableInput")
        if not model.input.columns or not self.targets:
            raise UserError("tables need columns to read and to predict: --model.input.columns and --task.targets")
        kinds: dict[str, Any] = {"classes": TableClassification, "labels": TableLabels}
        return kinds.get(self.loss, TableRegression)(self, model, data, seed)


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of columns, given as words or separated by commas."""
    return tuple(name for word in given for name in word.split(",") if name)


def _list(names: Any) -> str:
    return ", ".join(names)


def _input(model: ModelConfig) -> TableInput:
    found = getattr(model, "input", None)
    assert isinstance(found, TableInput)
    return found


def _num_classes(model: ModelConfig) -> int:
    output = getattr(model, "output", None)
    assert isinstance(output, ClassOutput)
    return output.num_classes


def flat(arrays: dict[str, np.ndarray], names: tuple[str, ...], num_rows: int) -> np.ndarray:
    """Columns side by side, (rows, numbers of a row)."""
    return np.concatenate([arrays[name].reshape(num_rows, -1) for name in names], axis=1)


def class_numbers(config: TablesConfig, rows: pa.Table) -> np.ndarray:
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
        value = column[int(wrong.argmax())].as_py()
        raise UserError(f"column {config.targets[0]!r} has {value!r}, which is none of the {num_classes} classes of the training data")
    return found


class _TableTask(Task[TablesConfig, PerceiverIOConfig]):
    """What the tasks on tables share: the input, normalised."""

    def inputs(self, rows: pa.Table, size: int) -> Tensor:
        """(size, numbers of a row): each channel of a column with the mean 0 and the deviation 1 that it has in the training split."""
        arrays, table, config = self.rows.arrays(rows), _input(self.model_config), self.config
        found, first = [], 0
        for name, (positions, channels) in zip(table.columns, table.sizes(), strict=True):
            values = arrays[name].reshape(rows.num_rows, positions, channels).astype(np.float64)
            if config.input_mean:
                place = slice(first, first + channels)
                values = (values - np.array(config.input_mean[place])) / np.array(config.input_scale[place])
            found.append(values.reshape(rows.num_rows, -1).astype(np.float32))
            first += channels
        return padded(np.concatenate(found, axis=1), size)


class TableClassification(_TableTask, Classification[TablesConfig]):
    """A class per row, beside always answering the commonest class of the training split."""

    metric_directions = {"loss": "min", "acc": "max", "f1": "max", "baseline_acc": "max"}

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        batch = {"inputs": self.inputs(rows, size)}
        if self.config.targets[0] in rows.column_names:
            labels = class_numbers(self.config, rows) if rows.num_rows else np.empty(0, np.int64)
            batch["labels"] = padded(labels, size, IGNORE_INDEX)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["inputs"])

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        confusion = sums["confusion"].astype(np.float64)
        found = {**super().metrics(sums, split), "f1": _f1(np.diag(confusion), confusion.sum(0), confusion.sum(1))}
        if self.config.target_mean:
            found["baseline_acc"] = float(confusion.sum(1)[int(np.argmax(self.config.target_mean))] / max(confusion.sum(), 1))
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        probabilities = self.logits(model, batch).float().softmax(-1)
        return {"class": probabilities.argmax(-1), "probabilities": probabilities}


class TableLabels(_TableTask):
    """Any number of labels per row, each 0 or 1 or missing (NaN)."""

    metric_directions = {"loss": "min", "acc": "max", "f1": "max", "baseline_acc": "max"}

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        return {"inputs": self.inputs(rows, size), **_targets(self.config, self.rows, rows, size)}

    def num_targets(self, batch: Batch) -> Tensor:
        return (~batch["targets"].isnan()).sum()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given, logits = ~batch["targets"].isnan(), model(batch["inputs"]).float()
        targets = batch["targets"].nan_to_num(0.0)
        each = torch.where(given, F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), 0.0)
        if torch.is_grad_enabled():
            return each.sum(), _sources(each, given, batch)
        said, right = (logits > 0) & given, (targets > 0.5) & given
        counts = {"hits": said & right, "said": said, "right": right, "same": (said == right) & given, "given": given}
        return each.sum(), {name: values.sum(0) for name, values in counts.items()}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        given = max(float(sums["given"].sum()), 1.0)
        found = {**super().metrics(sums, split), "acc": float(sums["same"].sum()) / given}
        found["f1"] = _f1(sums["hits"], sums["said"], sums["right"])
        if self.config.target_mean:
            usual = np.array(self.config.target_mean) > 0.5
            found["baseline_acc"] = float(np.where(usual, sums["right"], sums["given"] - sums["right"]).sum()) / given
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"probabilities": model(batch["inputs"]).float().sigmoid()}


class TableRegression(_TableTask):
    """Numbers, learned in units of their standard deviations in the training split, measured in their own."""

    metric_directions = {
        "loss": "min", "mae": "min", "rmse": "min", "r2": "max", "crps": "min", "baseline_mae": "min", "baseline_rmse": "min",
    }  # fmt: skip

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        return {"inputs": self.inputs(rows, size), **_targets(self.config, self.rows, rows, size)}

    def num_targets(self, batch: Batch) -> Tensor:
        return (~batch["targets"].isnan()).sum()

    def said(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, targets, outputs of one), in standard deviations from the mean."""
        return model(batch["inputs"]).float().unflatten(1, (-1, self.config.outputs_per_target))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given, said = ~batch["targets"].isnan(), self.said(model, batch)
        mean, scale = self._mean_and_scale(said.device)
        targets = batch["targets"].double().sub(mean).div(scale).float().nan_to_num(0.0)
        each = torch.where(given, self._losses()(said, targets), 0.0)
        if torch.is_grad_enabled():
            return each.sum(), _sources(each, given, batch)
        error = torch.where(given, (self.middle(said) - targets).double(), 0.0) * scale
        spread = torch.where(given, targets.double(), 0.0) * scale  # about the training split's mean, so that squares do not cancel
        sums = {
            "abs": error.abs(),
            "square": error.square(),
            "spread": spread,
            "spread_square": spread.square(),
            "spread_abs": spread.abs(),
        }
        if self.config.loss in ("gaussian", "quantiles"):
            sums["crps"] = torch.where(given, self._crps(said, targets).double(), 0.0) * scale
        return each.sum(), {"given": given.sum(0), **{name: values.sum(0) for name, values in sums.items()}}

    def _mean_and_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        number = self.config.num_targets
        values = self.config.target_mean or (0.0,) * number, self.config.target_scale or (1.0,) * number
        mean, scale = (torch.tensor(value, dtype=torch.float64, device=device) for value in values)
        return mean, scale

    def middle(self, said: Tensor) -> Tensor:
        """(B, targets): one number for each target, the mean or the quantile nearest to the median."""
        quantiles = self.config.quantiles
        return said[..., min(range(len(quantiles)), key=lambda i: abs(quantiles[i] - 0.5)) if self.config.loss == "quantiles" else 0]

    def _losses(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.config
        return {
            "mse": lambda said, t: (said[..., 0] - t).square(),
            "mae": lambda said, t: (said[..., 0] - t).abs(),
            "huber": lambda said, t: F.huber_loss(said[..., 0], t, reduction="none", delta=config.huber),
            "gaussian": lambda said, t: -torch.distributions.Normal(said[..., 0], deviation(said), validate_args=False).log_prob(t),
            "quantiles": lambda said, t: pinball(said, t, config.quantiles).sum(-1),
        }[config.loss]

    def _crps(self, said: Tensor, targets: Tensor) -> Tensor:
        if self.config.loss == "gaussian":
            return gaussian_crps(said[..., 0], deviation(said), targets)
        return 2 * pinball(said, targets, self.config.quantiles).mean(-1)

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        given = np.maximum(sums["given"].astype(np.float64), 1.0)
        total = given.sum()
        about_mean = sums["spread_square"] - sums["spread"] ** 2 / given
        found = {
            **super().metrics(sums, split),
            "mae": float(sums["abs"].sum() / total),
            "rmse": math.sqrt(float(sums["square"].sum() / total)),
            "r2": float(np.mean(1 - sums["square"] / np.maximum(about_mean, 1e-300))) if (about_mean > 0).all() else 0.0,
        }
        if "crps" in sums:
            found["crps"] = float(sums["crps"].sum() / total)
        found["baseline_mae"] = float(sums["spread_abs"].sum() / total)
        found["baseline_rmse"] = math.sqrt(float(sums["spread_square"].sum() / total))
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        said = self.said(model, batch).double()
        mean, scale = self._mean_and_scale(said.device)
        found = {"prediction": self.middle(said) * scale + mean}
        if self.config.loss == "gaussian":
            found["deviation"] = deviation(said) * scale
        if self.config.loss == "quantiles":
            found["quantiles"] = said.sort(-1).values * scale[:, None] + mean[:, None]
        return found


def _targets(config: TablesConfig, stored: ArrayRows, rows: pa.Table, size: int) -> Batch:
    """The "targets" (size, numbers), NaN where there is none; nothing where the rows lack a column of them."""
    if any(name not in rows.column_names for name in config.targets):
        return {}
    return {"targets": padded(flat(stored.arrays(rows), config.targets, rows.num_rows), size, math.nan)}


def _sources(each: Tensor, given: Tensor, batch: Batch) -> dict[str, Tensor]:
    return loss_of_sources(each, {**batch, "labels": torch.where(given, 0, IGNORE_INDEX)})


def _f1(hits: np.ndarray, said: np.ndarray, right: np.ndarray) -> float:
    """The mean over classes of F1; of classes that neither are there nor were said there is none."""
    both = said.astype(np.float64) + right
    return float(np.mean(2 * hits[both > 0] / both[both > 0])) if (both > 0).any() else 0.0


def deviation(said: Tensor) -> Tensor:
    """The standard deviation of a Gaussian that is said as (mean, any number)."""
    return F.softplus(said[..., 1]) + 1e-3


def pinball(said: Tensor, targets: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """The loss whose minimum is each quantile, (..., quantiles)."""
    shares, error = said.new_tensor(quantiles), targets[..., None] - said
    return torch.maximum(shares * error, (shares - 1) * error)


def gaussian_crps(mean: Tensor, deviation: Tensor, targets: Tensor) -> Tensor:
    """The continuous ranked probability score of Gaussians."""
    z = (targets - mean) / deviation
    below = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return deviation * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
