"""What classification tasks share, whatever they classify: loss, accuracy, confusion matrix."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.costs.flops import training_flops
from perceiver.costs.memory import has_formulas
from perceiver.data.manifest import Manifest, Split
from perceiver.models import ClassOutput, PerceiverIOConfig
from perceiver.plots import confusion_matrix, pixels
from perceiver.tasks.base import IGNORE_INDEX, Batch, C, Guess, Sample, Task, loss_of_sources


class Classification(Task[C, PerceiverIOConfig]):
    """A class per example: a batch's "labels" are (B,), and `logits` are (B, classes)."""

    metric_directions = {"loss": "min", "acc": "max"}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the task's settings have them."""
        return getattr(self.config, "class_names", None)

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits (B, classes)."""

    def check(self) -> None:
        output, names = getattr(self.model_config, "output", None), self.class_names
        if not isinstance(output, ClassOutput):
            raise UserError("classification needs a Perceiver IO model with a ClassOutput")
        if output.num_queries != 1:
            raise UserError(f"model.output.num-queries is {output.num_queries} and must be 1 for a class per example")
        if names is not None and len(names) != output.num_classes:
            raise UserError(f"task.class-names has {len(names)} names but model.output.num-classes is {output.num_classes}")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"]
        logits = self.logits(model, batch).float()
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
        if torch.is_grad_enabled():
            return each.sum(), loss_of_sources(each, batch)
        valid = labels != IGNORE_INDEX
        num_classes = logits.shape[-1]
        pairs = labels[valid] * num_classes + logits.argmax(-1)[valid]
        return each.sum(), {"confusion": torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        confusion = sums["confusion"]
        return {**super().metrics(sums, split), "acc": float(np.trace(confusion) / max(confusion.sum(), 1))}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        confusion = sums["confusion"]
        names = self.class_names or tuple(str(i) for i in range(len(confusion)))
        return [Sample("confusion", image=pixels(confusion_matrix(confusion, names)))] if len(names) <= 100 else []

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
        means = {
            "loss": "answering with the training labels' frequencies",
            "acc": f"always answering {repr(names[most]) if names else most}",
        }
        return Guess({"loss": loss, "targets": answers.sum(), "confusion": confusion}, means)

    def flops_per_example(self) -> float:
        """At the model's greatest input length."""
        if not has_formulas(self.model_config):
            return super().flops_per_example()
        return training_flops(self.model_config)
