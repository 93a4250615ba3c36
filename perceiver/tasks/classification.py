"""What classification tasks share, whatever they classify: loss, accuracy, confusion matrix."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import Experiment, UserError
from perceiver.costs.flops import training_flops
from perceiver.costs.memory import has_formulas
from perceiver.data.labels import class_order, label_counts
from perceiver.data.manifest import Manifest, Split
from perceiver.data.sources import resolve
from perceiver.models import ClassOutput, PerceiverIOConfig
from perceiver.plots import confusion_matrix, pixels
from perceiver.tasks import class_metrics
from perceiver.tasks.base import IGNORE_INDEX, Batch, C, Sample, Task, loss_of_sources, of_examples, padded
from perceiver.tasks.baselines import Guess
from perceiver.tasks.class_settings import ClassSettings

logger = logging.getLogger(__name__)

_SHOWN = 12
"""Classes that a line names, at most."""


def with_classes(experiment: Experiment) -> Experiment:
    """An experiment whose model has 0 classes with those of its data: their number, and their names in order.

    `task.class_names`, where given, says which labels are classes, and in which order.

    Raises:
        UserError: the data has less than two classes, or not those that are named.
    """
    model, task = experiment.model, experiment.task
    if not isinstance(model, PerceiverIOConfig) or not isinstance(model.output, ClassOutput) or model.output.num_classes:
        return experiment
    data = experiment.data
    if not data.source or data.mixture:
        raise UserError(f"{experiment.preset}: name the data with the classes, --data.source PATH")
    source = resolve(data, task.kind)
    if source.parts and (said := tuple(getattr(source.parts[0].target, "class_names", ()))):
        named: dict[str, Any] = {"class_names": said}
        output = replace(model.output, num_classes=len(said))
        return replace(experiment, model=replace(model, output=output), task=replace(task, **named))
    counts = label_counts(source, data.label_column, "train", task.several_classes, data.on_error == "skip")
    given = tuple(getattr(task, "class_names", None) or ())
    if missing := [name for name in given if name not in counts]:
        raise UserError(f"--task.class-names has {missing[0]!r}, which no training label is (there are: {_listed(counts)})")
    names = given or class_order(counts)
    if len(names) < 2:
        raise UserError(f"data.source {data.source} has {len(names)} class ({_listed(counts)}), and a classifier needs at least 2")
    left = {name: count for name, count in counts.items() if name not in names}
    logger.info(f"classes: {_listed({name: counts[name] for name in names})}" + (f"; not chosen: {_listed(left)}" if left else ""))
    output = replace(model.output, num_classes=len(names))
    named = {"class_names": names}
    if left and isinstance(task, ClassSettings):
        named["leave_out"] = tuple(sorted(left))
    return replace(experiment, model=replace(model, output=output), task=replace(task, **named))


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:_SHOWN]]
    return ", ".join(shown) + (f", ... ({len(counts):,} in all)" if len(counts) > _SHOWN else "")


class Classification(Task[C, PerceiverIOConfig]):
    """A class per example: a batch's "labels" are (B,), and `logits` are (B, classes)."""

    metric_directions = {
        "loss": "min", "acc": "max", "f1": "max", "recall": "max", "auroc": "max", "ap": "max", "top5": "max",
    }  # fmt: skip

    class_column: str | None = "label"
    _weights_there: Tensor | None = None
    """The weights of classes on the device that was asked for last."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the task's settings have them."""
        return getattr(self.config, "class_names", None) or None

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits (B, classes)."""

    def check(self) -> None:
        output, names = getattr(self.model_config, "output", None), self.class_names
        if not isinstance(output, ClassOutput):
            raise UserError("classification needs a Perceiver IO model with a ClassOutput")
        if output.num_queries != 1:
            raise UserError(f"model.output.num-queries is {output.num_queries} and must be 1 for a class per example")
        if not output.num_classes:
            raise UserError("model.output.num-classes is 0, as many as the data has, which only a command line looks up: give the number")
        if names is not None and len(names) != output.num_classes:
            raise UserError(f"task.class-names has {len(names)} names but model.output.num-classes is {output.num_classes}")
        if isinstance(self.config, ClassSettings):
            self.config.check_weights(output.num_classes)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"]
        logits = self.logits(model, batch).float()
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
        if torch.is_grad_enabled():
            if (weights := self._weights(logits.device)) is not None:
                each = each * weights[labels.clamp(min=0)]
            return each.sum(), loss_of_sources(each, batch)
        self.observe(batch, logits)
        valid = labels != IGNORE_INDEX
        sums = class_metrics.class_sums(logits, labels, valid)
        return each.sum(), {**sums, **of_examples(each, valid, logits.argmax(-1) == labels)}

    def _weights(self, device: torch.device) -> Tensor | None:
        """The weight of each class in the training loss, (classes,) float32; None: all are 1."""
        weights = self.config.weights() if isinstance(self.config, ClassSettings) else None
        if weights is None:
            return None
        if self._weights_there is None or self._weights_there.device != device:
            self._weights_there = torch.tensor(weights, dtype=torch.float32, device=device)
        return self._weights_there

    def labels(self, rows: pa.Table, size: int) -> Tensor:
        """The class of each row, (size,) int64; IGNORE_INDEX for those that are missing."""
        return padded(rows["label"].to_numpy().astype(np.int64), size, IGNORE_INDEX)

    def dummy_labels(self, size: int) -> Tensor:
        """Labels to count with."""
        return torch.zeros(size, dtype=torch.int64)

    def observe(self, batch: Batch, logits: Tensor) -> None:
        """Looks at what the model says of a batch of a validation; what it keeps is for `samples`."""

    def names_of(self, num_classes: int) -> tuple[str, ...]:
        """Names of the classes, or their numbers."""
        return self.class_names or tuple(str(i) for i in range(num_classes))

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        return {**super().metrics(sums, split), **class_metrics.class_metrics(sums)}

    def details(self, sums: dict[str, np.ndarray]) -> list[str]:
        if "confusion" not in sums:  # of very many classes it is not kept
            return []
        confusion = np.asarray(sums["confusion"])
        return class_metrics.class_table(confusion, self.names_of(len(confusion)))

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        confusion = sums["confusion"]
        names = self.names_of(len(confusion))
        classes = Sample("classes", text="\n".join(self.details(sums)))
        return [classes, *([Sample("confusion", image=pixels(confusion_matrix(confusion, names)))] if len(names) <= 100 else [])]

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        """Answering each example with the frequencies of the training labels (plus one each), so always with the same class."""
        train, val = (each.stats.get("labels", {}).get(split, ()) for each, split in ((trained_on, "train"), (manifest, "val")))
        if not sum(train) or not sum(val):
            return None
        output = self.model_config.output
        assert isinstance(output, ClassOutput)
        num_classes = output.num_classes
        counts, answers = np.ones(num_classes), np.zeros(num_classes)
        counts[: len(train)] += train
        answers[: len(val)] = val
        most = int(counts.argmax())
        confusion = np.zeros((num_classes, num_classes))
        confusion[:, most] = answers
        loss = -(answers * np.log(counts / counts.sum())).sum()
        names = self.class_names
        always = f"always answering {repr(names[most]) if names else most}"
        means = {"loss": "answering with the training labels' frequencies", "acc": always, "f1": always, "recall": always}
        sums = {"loss": loss, "targets": answers.sum(), "confusion": confusion}
        if num_classes > class_metrics.TOP:
            commonest = np.argsort(-counts, kind="stable")[: class_metrics.TOP]
            sums["top5"], means["top5"] = answers[commonest].sum(), f"always answering the {class_metrics.TOP} commonest"
        if num_classes <= class_metrics.MOST_RANKED:
            columns = answers[1:] if num_classes == 2 else answers
            sums["scores"] = class_metrics.constant_scores(columns, answers.sum())
            means |= dict.fromkeys(class_metrics.area_metrics(sums), "one answer to all")
        return Guess(sums, means)

    def flops_per_example(self) -> float:
        """At the model's greatest input length."""
        if not has_formulas(self.model_config):
            return super().flops_per_example()
        return training_flops(self.model_config)
