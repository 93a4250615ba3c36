"""What is reached without a trained model: by counts of the training data, or by an answer so simple that a pass measures it, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perceiver.config.optimization import raw_metric
from perceiver.data.manifest import Manifest


@dataclass(frozen=True)
class Guess:
    """A pass over a validation split by a model that knows frequencies alone."""

    sums: dict[str, np.ndarray]
    """As those of a pass; NaN where one is not known."""
    means: dict[str, str]
    """By metric: how it is reached, such as "always answering 'positive'"."""


@dataclass(frozen=True)
class Baseline:
    """What a metric is without a trained model."""

    value: float
    means: str
    """How it is reached."""

    def __str__(self) -> str:
        return f"{self.means}: {self.value:,.4g}"


def beside(metrics: Mapping[str, float], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Baseline]:
    """The baselines among the metrics of a pass, by the names of the metrics that they stand beside.

    Args:
        metrics: of a pass, with the prefix "val_" or "val_ema_", of mixtures also with "/SOURCE" at the end.
        pairs: by metric, without these: the metric of its baseline, and how that is reached.
    """
    found = {}
    for full in metrics:
        name, slash, source = full.partition("/")
        pair = pairs.get(raw_metric(name).removeprefix("val_"))
        if pair is not None and (value := metrics.get(_prefix(name) + pair[0] + slash + source)) is not None:
            found[full] = Baseline(value, pair[1])
    return found


def _prefix(name: str) -> str:
    return "val_ema_" if name.startswith("val_ema_") else "val_"


def unigram_guess(manifest: Manifest, metrics: tuple[str, ...], **sums: float) -> Guess | None:
    """Guessing each token of the validation text by its frequency in the training text.

    Args:
        metrics: those that this says something about.
        sums: what the task sums besides loss and targets.
    """
    nats = manifest.stats.get("unigram_nats_per_token")
    if nats is None:  # nothing is counted where there is no training text
        return None
    tokens = manifest.splits["val"].tokens
    counts = {"loss": nats * tokens, "targets": tokens, **sums}
    means = "guessing by the frequencies of single tokens"
    return Guess({name: np.float64(value) for name, value in counts.items()}, dict.fromkeys(metrics, means))
