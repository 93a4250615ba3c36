"""What is held out for validation where a source has no validation files: the same share of every class, whole groups, or the latest rows.

Before the first pass of a preparation the input is read once for the key (the hash of a content, or of a group) and the class of each
row. Which keys are held out then depends on them alone: not on the order of files or how they are cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from perceiver.data.pieces import Piece
from perceiver.data.preparation import Job, Preparation
from perceiver.data.spans import Problems
from perceiver.data.storage import atomic_file, list_folder, read_file
from perceiver.data.times import TimeColumn

_LEAST = 4
"""Rows of a class of which one at least is held out."""


def is_chosen(job: Job, pieces: list[Piece], stratify: bool) -> bool:
    """Whether validation is held out by class or by group: else rows of small hash are."""
    if not any(span.file.split == "hash" for piece in pieces for span in piece.spans):
        return False
    return job.columns.group is not None or (stratify and job.rows.has_labels and job.preparation.keyed is not Preparation.keyed)


def list_keys(job: Job, index: int, piece: Piece) -> dict[str, Any]:
    """Writes keys and classes of a piece's rows to the staging folder. Faults are left to the first pass, which names them."""
    preparation, problems = job.preparation(job), Problems(skip=True)
    found = [batch for span in piece.spans for batch in preparation.keyed(span, problems) or ()]
    keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in found)])
    classes = np.concatenate([np.zeros(0, np.int64), *(classes for _, classes in found)])
    with atomic_file(job.staging, _name(index)) as file:
        file.write(np.stack([keys, classes.astype(np.uint64)]).tobytes())
    return {"rows": len(keys)}


def listed(job: Job, num: int) -> set[int]:
    """The pieces, of `num`, whose keys are there."""
    there = list_folder(job.staging)
    return {index for index in range(num) if _name(index) in there}


def choose(job: Job, num: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The keys that are held out, sorted, from those of all pieces; and what the manifest says of it."""
    parts = [np.frombuffer(read_file(job.staging, _name(index)), np.uint64).reshape(2, -1) for index in range(num)]
    keys, classes = np.concatenate(parts, axis=1)
    by_class, num_keys = job.columns.group is None, len(np.unique(keys))
    if by_class:
        stats: dict[str, Any] = {"held_out": "by class", "repeated": len(keys) - num_keys}
    else:
        how = "by time, the latest" if isinstance(job.columns.group, TimeColumn) else "by group"
        stats = {"held_out": how, "groups": num_keys}
    return held_out(keys, classes.astype(np.int64), job.val_fraction, by_class), stats


def held_out(keys: np.ndarray, classes: np.ndarray, fraction: float, by_class: bool) -> np.ndarray:
    """The smallest keys of each class, or of all, that have as near as can be the given share of its rows.

    Of a class of four rows or more at least one is held out, and of each at least one key is left to train on.

    Args:
        keys: uint64 (n,), of rows; those of equal keys stay together, in the class of the first of them.
        classes: int64 (n,).
        by_class: choose from each class apart.
    """
    unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
    strata = classes[first] if by_class else np.zeros(len(unique), np.int64)
    chosen = np.zeros(len(unique), bool)
    for stratum in np.unique(strata):
        places = np.flatnonzero(strata == stratum)
        ends = np.cumsum(counts[places])
        wanted = fraction * ends[-1]
        number = int(np.argmin(np.abs(np.concatenate([[0], ends]) - wanted)))
        least = 1 if fraction > 0 and ends[-1] >= _LEAST else 0
        chosen[places[: min(max(number, least), len(places) - 1)]] = True
    return unique[chosen]


def _name(index: int) -> str:
    return f"keys-{index:06d}"
