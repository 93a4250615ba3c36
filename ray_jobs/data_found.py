"""What `perceiver data` has found of a source, and the words that say it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from perceiver.data.labels import class_order, label_counts
from perceiver.data.sources import Source
from ray_jobs.data_page import Facts

SHOWN = 20
"""Classes and columns that are listed, at most."""


@dataclass(frozen=True)
class Found:
    """What a source holds, and what can be trained on it."""

    lines: list[str]
    """For a person."""
    preset: str
    words: list[str]
    """Fields that the preset is given, as on a command line."""
    is_table: bool = False
    """Whether it is a table, of which columns are predicted."""
    table_words: list[str] = field(default_factory=list)
    """Fields that the preset `tables` is given to learn from all columns, where another one learns from the text alone."""
    facts: Facts = field(default_factory=Facts)
    """What a page shows besides."""

    def as_table(self) -> Found:
        """The same as a table, of which all columns are read."""
        return Found(self.lines, "tables", self.table_words, is_table=True, facts=self.facts)

    @property
    def commands(self) -> list[str]:
        """The commands that train on it."""
        found = [f"train: {_command(self.preset, self.words)}"]
        return [*found, f"train on all columns: {_command('tables', self.table_words)}"] if self.table_words else found


def class_counts(found: Source, label: str) -> dict[str, Counter[str]]:
    """How often each label occurs, by split: "train", "val", or "all" where validation is held out of them."""
    train = label_counts(found, label, "train", skip=True)
    splits = dict.fromkeys(file.split for file in found.inputs)
    return {
        "all" if split == "hash" else split: train if split in ("train", "hash") else label_counts(found, label, split, skip=True)
        for split in splits
    }


def class_lines(classes: Mapping[str, Mapping[str, int]], column: str = "") -> list[str]:
    """The labels of each split."""
    lines, place = [], f"{column!r}, " if column else ""
    train = classes.get("train", classes.get("all", Counter()))
    for split, counts in classes.items():
        name = "all (a part is held out for validation)" if split == "all" else split
        lines.append(f"classes in {place}{name}: {shown_counts({key: counts[key] for key in class_order(Counter(counts))})}")
        if new := sorted(counts.keys() - train.keys()):
            lines.append(f"  not in train: {', '.join(new)}")
    if len(train) == 1:
        lines.append(f"there is only one class to train on, {next(iter(train))!r}, so there is nothing to tell apart")
    return lines


def shown_counts(counts: Mapping[str, int]) -> str:
    """Names with their counts, the first ones."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:SHOWN])
    return shown + (f", ... {len(counts):,} in all" if len(counts) > SHOWN else "")


def _command(preset: str, words: list[str]) -> str:
    return shlex.join(["perceiver", "train", preset, *words])
