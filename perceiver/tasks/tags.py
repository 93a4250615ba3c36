"""Any number of classes per picture or text (multi-label): each label is there or not, by itself."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.data.manifest import Manifest, Split
from perceiver.models import ClassOutput
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, loss_of_sources, of_examples, padded
from perceiver.tasks.baselines import Guess
from perceiver.tasks.class_metrics import MOST_RANKED, area_metrics, constant_scores, mean_f1, score_counts, tag_table
from perceiver.tasks.class_settings import ClassSettings
from perceiver.tasks.classification import Classification

S = TypeVar("S", bound=ClassSettings)


class Tags(Classification[S]):
    """A batch's "labels" are (B, classes), 1 where a class is there and 0 where it is not; the loss is the binary cross-entropy of each."""

    metric_directions = {"loss": "min", "acc": "max", "f1": "max", "auroc": "max", "ap": "max"}
    class_column = None

    def check(self) -> None:
        super().check()
        if self.config.class_weights:
            raise UserError("--task.class-weights is given, but each row has any number of classes: leave it out")

    def labels(self, rows: pa.Table, size: int) -> Tensor:
        values = pc.list_flatten(rows["labels"]).to_numpy().astype(np.int64)
        return padded(values.reshape(rows.num_rows, self._num_classes), size, IGNORE_INDEX)

    def dummy_labels(self, size: int) -> Tensor:
        return torch.zeros(size, self._num_classes, dtype=torch.int64)

    @property
    def _num_classes(self) -> int:
        output = self.model_config.output
        assert isinstance(output, ClassOutput)
        return output.num_classes

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels, logits = batch["labels"], self.logits(model, batch).float()
        given = labels != IGNORE_INDEX
        each = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
        each = torch.where(given, each, 0.0)
        if torch.is_grad_enabled():
            return each.sum(), loss_of_sources(each, batch)
        said, there = (logits > 0) & given, labels == 1
        sums = {"hits": (said & there).sum(0), "said": said.sum(0), "there": there.sum(0), "rows": given.sum(0)}
        if logits.shape[1] <= MOST_RANKED:
            sums["scores"] = score_counts(logits, there, given)
        return each.sum(), {**sums, **of_examples(each, given, said == there)}

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Loss and accuracy of a label; F1 and areas are means over the labels."""
        found = Task.metrics(self, sums, split)
        wrong = (sums["said"] + sums["there"] - 2 * sums["hits"]).sum()
        found["acc"] = float(1 - wrong / max(sums["rows"].sum(), 1))
        found["f1"] = mean_f1(sums["hits"], sums["said"], sums["there"])
        return found | area_metrics(sums)

    def details(self, sums: dict[str, np.ndarray]) -> list[str]:
        hits, said, there = (np.asarray(sums[name]) for name in ("hits", "said", "there"))
        return tag_table(hits, said, there, self.names_of(len(hits)))

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        return [Sample("classes", text="\n".join(self.details(sums)))]

    def observe(self, batch: Batch, logits: Tensor) -> None:
        pass

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        """Answering each label with its frequency in the training split (one of each added), so always alike."""
        train, val = trained_on.stats.get("labels", {}).get("train"), manifest.stats.get("labels", {}).get("val")
        if not train or not val:
            return None
        num, trained, rows = self._num_classes, trained_on.splits["train"].rows, manifest.splits["val"].rows
        counts, there = np.zeros(num), np.zeros(num)
        counts[: len(train)], there[: len(val)] = train, val
        shares = (counts + 1) / (trained + 2)
        loss = -(there * np.log(shares) + (rows - there) * np.log(1 - shares)).sum()
        said = np.where(shares > 0.5, rows, 0.0)
        always = "answering each label as most rows have it"
        sums = {
            "loss": loss, "targets": np.float64(rows * num), "hits": np.where(shares > 0.5, there, 0.0), "said": said, "there": there,
            "rows": np.full(num, float(rows)),
        }  # fmt: skip
        means = {"loss": "answering with the training labels' frequencies", "acc": always, "f1": always}
        if num <= MOST_RANKED:
            sums["scores"] = constant_scores(there, float(rows))
            means |= dict.fromkeys(area_metrics(sums), "one answer to all")
        return Guess(sums, means)
