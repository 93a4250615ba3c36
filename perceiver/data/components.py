"""The data sets that prepared data consists of: one, or those of a mixture, which lie beside each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perceiver.config import digest
from perceiver.data.manifest import COUNTS, SPLITS, Manifest, Split


@dataclass(frozen=True, eq=False)
class Component:
    """One data set of prepared data."""

    name: str
    """What metrics call it; "" where it is all there is."""
    share: float
    """Of the rows of a training batch; together 1."""
    folder: str
    manifest: Manifest


def components(folder: str, manifest: Manifest) -> list[Component]:
    """The data sets of a mixture; of other prepared data itself alone."""
    if not manifest.mixture:
        return [Component("", 1.0, folder, manifest)]
    found = []
    total = sum(part["share"] for part in manifest.mixture)
    for part in manifest.mixture:
        path = f"{folder.rpartition('/')[0]}/{part['folder']}"
        found.append(Component(part["name"], part["share"] / total, path, Manifest.load(path)))
    return found


def mixture_manifest(settings: dict[str, Any], parts: list[Component]) -> Manifest:
    """The manifest of a mixture. Its splits count the rows of all its data sets; it has no shards of its own.

    Args:
        settings: of the mixture, as `shards.prepare_settings` has them.
    """
    first = parts[0].manifest
    nats: list[Any] = [part.manifest.stats.get("unigram_nats_per_token") for part in parts]
    stats = {} if None in nats else {"unigram_nats_per_token": sum(n * p.share for n, p in zip(nats, parts, strict=True))}
    classes = [part.manifest.num_classes for part in parts if part.manifest.num_classes is not None]
    return Manifest(
        kind=first.kind,
        settings=settings,
        settings_digest=digest(settings, 8),
        splits={name: _together([part.manifest.splits[name] for part in parts]) for name in SPLITS},
        tokenizer=first.tokenizer,
        source={
            "mixture": [
                {
                    "name": part.name,
                    "share": part.share,
                    "folder": part.folder.rpartition("/")[2],
                    "digest": part.manifest.digest,
                }
                for part in parts
            ]
        },
        stats=stats,
        image_shape=first.image_shape,
        columns=first.columns,
        num_classes=max(classes, default=None),
    )


def _together(splits: list[Split]) -> Split:
    counts = {name: sum(getattr(split, name) for split in splits) for name in COUNTS}
    return replace(splits[0], shards=(), **counts)


def weighted(parts: list[Component], sums: list[dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], Split]:
    """Sums of a validation pass over each data set, and their splits, as of one pass in which each has its share of targets."""
    scales = [part.share / max(float(counts["targets"]), 1) for part, counts in zip(parts, sums, strict=True)]
    total = sum(float(counts["targets"]) for counts in sums)
    together = {name: sum(scale * total * counts[name] for scale, counts in zip(scales, sums, strict=True)) for name in sums[0]}
    splits = [part.manifest.splits["val"] for part in parts]
    tokens = sum(split.tokens for split in splits)
    per_token = {
        name: sum(p.share * getattr(s, name) / max(s.tokens, 1) for p, s in zip(parts, splits, strict=True))
        for name in ("bytes", "words", "documents")
    }
    counts = {name: round(tokens * rate) for name, rate in per_token.items()}
    return together, replace(_together(splits), **(counts if tokens else {}))
