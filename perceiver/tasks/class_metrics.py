"""Metrics of classes from sums that add up over batches and workers: F1, recall, the areas under both curves, top 5.

The areas need the order of all scores. Scores are counted in bins so narrow that only scores within one bin count as equal: of one column
131,072 bins, evenly spaced in asinh(score / 0.001), so 2e-7 wide around 0 and 0.02% of a score's size elsewhere; of more columns as many
together, but at least 1,024 each. Scores in one bin count half, as ties do; their pairs bound the error (`Areas.auroc_error`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_RANKED = 100
"""Classes whose areas are computed, at most."""
_BINS, _LEAST_BINS = 1 << 17, 1 << 10
_UNIT, _LARGEST = 0.001, 1000.0
TOP = 5


def score_counts(scores: Tensor, positive: Tensor, given: Tensor) -> Tensor:
    """How many scores lie in which bin: int64 (C, 2, bins), those of negatives first.

    Args:
        scores: (B, C), any numbers that rise with how probable a positive is.
        positive: (B, C) bool.
        given: (B, C) bool, which of them count.
    """
    columns = scores.shape[1]
    bins = max(_LEAST_BINS, _BINS // columns)
    largest = float(np.arcsinh(_LARGEST / _UNIT))
    places = torch.asinh(scores.detach().double() / _UNIT).nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
    number = ((places / largest + 1) / 2 * bins).long().clamp(0, bins - 1)
    column = torch.arange(columns, device=scores.device) * 2
    return torch.bincount(((column + positive) * bins + number)[given], minlength=columns * 2 * bins).view(columns, 2, bins)


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds of each class against all others, (B, C) float64; of two classes that of the second alone, (B, 1)."""
    logits = logits.detach().double()
    if logits.shape[1] == 2:
        return logits[:, 1:] - logits[:, :1]
    log_probabilities = logits.log_softmax(-1)
    return log_probabilities - torch.log(-torch.expm1(log_probabilities))


def class_sums(logits: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The sums that `class_metrics` needs, of a batch of a validation.

    Args:
        logits: (B, classes).
        labels: (B,) int64.
        valid: (B,) bool, which of them are no padding.
    """
    num_classes = logits.shape[1]
    pairs = labels[valid] * num_classes + logits.argmax(-1)[valid]
    sums = {"confusion": torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)}
    if num_classes > TOP:
        best = logits.topk(TOP, -1).indices
        sums["top5"] = ((best == labels[:, None]).any(-1) & valid).sum()
    if num_classes <= MOST_RANKED:
        scores = log_odds(logits)
        classes = torch.arange(num_classes - scores.shape[1], num_classes, device=labels.device)
        classes = classes if num_classes > 2 else classes[-1:]
        sums["scores"] = score_counts(scores, labels[:, None] == classes, valid[:, None].expand_as(scores))
    return sums


def class_metrics(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy, macro F1, macro recall, top 5, and the areas (of two classes those of the second, else means over classes)."""
    confusion = sums["confusion"].astype(np.float64)
    total, hits, said, there = confusion.sum(), np.diag(confusion), confusion.sum(0), confusion.sum(1)
    found = {"acc": float(hits.sum() / max(total, 1)), "f1": mean_f1(hits, said, there)}
    found["recall"] = float(np.mean(hits[there > 0] / there[there > 0])) if total else 0.0
    if "top5" in sums:
        found["top5"] = float(sums["top5"] / max(total, 1))
    return found | area_metrics(sums)


def area_metrics(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """The means over the columns of "scores" that have positives and negatives; nothing where none has."""
    known = [areas for areas in areas_of(sums["scores"]) if areas is not None] if "scores" in sums else []
    if not known:
        return {}
    return {"auroc": float(np.mean([each.auroc for each in known])), "ap": float(np.mean([each.ap for each in known]))}


@dataclass(frozen=True)
class Areas:
    """Of one class against the others."""

    auroc: float
    """Area under the receiver operating characteristic: the share of pairs of a positive and a negative that are in order."""
    auroc_error: float
    """Half the share of pairs that lie in one bin: the exact area differs by no more."""
    ap: float
    """Average precision: the mean of the precision at each positive, those of equal score together."""


def areas_of(counts: np.ndarray) -> list[Areas | None]:
    """The areas of each column of counts (C, 2, bins); None of one without positives or without negatives."""
    found: list[Areas | None] = []
    for negative, positive in counts.astype(np.float64):
        num_negative, num_positive = negative.sum(), positive.sum()
        if not num_negative or not num_positive:
            found.append(None)
            continue
        pairs, same = num_negative * num_positive, float((positive * negative).sum())
        in_order = float((positive * (np.cumsum(negative) - negative)).sum())
        above, false = np.cumsum(positive[::-1]), np.cumsum(negative[::-1])
        precision = above / np.maximum(above + false, 1e-300)
        ap = float((positive[::-1] * precision).sum() / num_positive)
        found.append(Areas((in_order + same / 2) / pairs, same / 2 / pairs, ap))
    return found


def constant_scores(positives: np.ndarray, total: float) -> np.ndarray:
    """The counts where all scores of a column are equal, (C, 2, 1): `positives` (C,) of `total` examples."""
    return np.stack([total - positives, positives], axis=1)[:, :, None]


def mean_f1(hits: np.ndarray, said: np.ndarray, there: np.ndarray) -> float:
    """The mean over classes of F1; of classes that neither are there nor were said there is none."""
    both = said.astype(np.float64) + there
    return float(np.mean(2 * hits[both > 0] / both[both > 0])) if (both > 0).any() else 0.0


def mean_iou(hits: np.ndarray, said: np.ndarray, there: np.ndarray) -> float:
    """The mean over classes of intersection over union; of classes that neither are there nor were said there is none."""
    union = said.astype(np.float64) + there - hits
    return float(np.mean(hits[union > 0] / union[union > 0])) if (union > 0).any() else 0.0


def class_table(confusion: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Lines with recall, precision and F1 of each class."""
    return tag_table(np.diag(confusion), confusion.sum(0), confusion.sum(1), names)


def tag_table(hits: np.ndarray, said: np.ndarray, there: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """The same from how often each class was right, was said, and is there: (classes,) each."""
    width = max(5, *(len(name) for name in names))
    lines = [f"{'class':<{width}} {'examples':>9} {'recall':>7} {'precision':>9} {'F1':>7}"]
    for name, hit, all_said, all_there in zip(names, hits, said, there, strict=True):
        ratios = [hit / n if n else float("nan") for n in (all_there, all_said, (all_said + all_there) / 2)]
        cells = ["-" if np.isnan(ratio) else f"{ratio:.4f}" for ratio in ratios]
        lines.append(f"{name:<{width}} {int(all_there):>9,} {cells[0]:>7} {cells[1]:>9} {cells[2]:>7}")
    return lines
