"""Any number of labels per row of a table."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.data.manifest import Split
from perceiver.tasks.base import Batch, of_examples
from perceiver.tasks.class_metrics import MOST_RANKED, area_metrics, mean_f1, score_counts
from perceiver.tasks.table_task import NumberTargets, losses_of_sources, model_input


class TableLabels(NumberTargets):
    """Any number of labels per row, each 0 or 1 or missing (NaN)."""

    metric_directions = {"loss": "min", "acc": "max", "f1": "max", "auroc": "max", "ap": "max", "baseline_acc": "max"}
    baseline_metrics = {"acc": ("baseline_acc", "always what is commoner")}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given, logits = ~batch["targets"].isnan(), model(model_input(batch)).float()
        targets = batch["targets"].nan_to_num(0.0)
        each = torch.where(given, F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), 0.0)
        if torch.is_grad_enabled():
            return each.sum(), losses_of_sources(each, given, batch)
        said, right = (logits > 0) & given, (targets > 0.5) & given
        counts = {"hits": said & right, "said": said, "right": right, "same": (said == right) & given, "given": given}
        sums = {name: values.sum(0) for name, values in counts.items()} | of_examples(each, given, said == right)
        if logits.shape[1] <= MOST_RANKED:
            sums["scores"] = score_counts(logits, targets > 0.5, given)
        return each.sum(), sums

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        given = max(float(sums["given"].sum()), 1.0)
        found = {**super().metrics(sums, split), "acc": float(sums["same"].sum()) / given}
        found["f1"] = mean_f1(sums["hits"], sums["said"], sums["right"])
        found |= area_metrics(sums)
        if self.config.target_mean:
            usual = np.array(self.config.target_mean) > 0.5
            found["baseline_acc"] = float(np.where(usual, sums["right"], sums["given"] - sums["right"]).sum()) / given
        return found

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"probabilities": model(model_input(batch)).float().sigmoid()}

    def prediction_names(self) -> dict[str, tuple[str, ...]]:
        return {"probabilities": self.config.number_names}
