"""Class-balanced sampling as arithmetic of the order: how often each row comes in an epoch is a function of (labels, epoch, row).

An epoch has as many rows as the data. Each class is given an equal share of them, but no row comes more than `most` times; what a class
cannot use goes to the others. A class of n rows that is given t comes t // n times, and t % n of its rows once more: other ones in every
epoch, in turn, so that over n epochs all come equally often. Copies of a row are shuffled like rows of their own, and have random choices
(crops, masks) of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perceiver.config import UserError
from perceiver.data.manifest import DamagedData, Split
from perceiver.data.order import Order
from perceiver.data.storage import open_folder

COPY = 32
"""Bits that the number of a row's copy is moved by in the column "epoch", which random choices depend on."""


def shares(counts: Sequence[int] | np.ndarray, most: int) -> np.ndarray:
    """How many rows of an epoch each class is given: int64, together as many as there are rows.

    Args:
        counts: rows of each class.
        most: how often a row may come, at most.
    """
    rows = np.asarray(counts, np.int64)
    limits, given = rows * most, np.zeros(len(rows), np.int64)
    open_, left = rows > 0, int(rows.sum())
    while open_.any() and left:
        share, extra = divmod(left, int(open_.sum()))
        wanted = np.where(open_, share, 0)
        wanted[np.flatnonzero(open_)[:extra]] += 1
        full = open_ & (wanted >= limits)
        if not full.any():
            return np.where(open_, wanted, given)
        given[full] = limits[full]
        open_, left = open_ & ~full, left - int(limits[full].sum())
    return given


class Copies:
    """How often each row of a split comes in which epoch.

    Args:
        labels: int (rows,), the class of each row.
        most: how often a row may come, at most.
    """

    def __init__(self, labels: np.ndarray, most: int) -> None:
        self.labels, self.most = np.ascontiguousarray(labels, np.int32), most
        self._key = hashlib.sha256(self.labels.data).hexdigest(), most

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Copies) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple:
        return type(self), (self.labels, self.most)

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.bincount(self.labels)

    @cached_property
    def _places(self) -> np.ndarray:
        """A number of each row among those of its class, spread over them: int64, 0 .. rows of the class - 1."""
        order = np.argsort(self.labels, kind="stable")
        places = np.empty(len(order), np.int64)
        first = 0
        for count in map(int, self._counts):
            places[order[first : first + count]] = np.arange(count) * _stride(count) % max(count, 1)
            first += count
        return places

    def of(self, epoch: int, rows: np.ndarray | slice) -> np.ndarray:
        """How often each of some rows comes in an epoch: int64."""
        counts, given = self._counts, shares(self._counts, self.most)
        whole, rest = np.divmod(given, np.maximum(counts, 1))
        labels = self.labels[rows]
        turn = (self._places[rows] - epoch * rest[labels]) % counts[labels]
        return whole[labels] + (turn < rest[labels])


def _stride(count: int) -> int:
    """A step by which neighbours among `count` rows come far apart, and every one comes."""
    step = max(1, round(count * 0.6180339887))
    while math.gcd(step, max(count, 1)) != 1:
        step += 1
    return step


@dataclass(frozen=True, kw_only=True)
class BalancedOrder(Order):
    """An order whose epochs have each row as often as `copies` says; together as many as there are rows."""

    copies: Copies

    def block_sizes(self, epoch: int, blocks: np.ndarray) -> np.ndarray:
        return _block_sizes(self, epoch)[blocks]

    def _of_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a window's blocks and how often each comes."""
        rows = super().block_order_rows(epoch, window)
        return rows, self.copies.of(epoch, rows)

    def block_order_rows(self, epoch: int, window: int) -> np.ndarray:
        return np.repeat(*self._of_window(epoch, window))

    def choose(self, epoch: int, window: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, counts = self._of_window(epoch, window)
        index = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        chosen = self.window_permutation(epoch, window)[places]
        return index[chosen], epoch + ((chosen - first[index[chosen]]) << COPY)


@lru_cache(maxsize=32)
def _block_sizes(order: BalancedOrder, epoch: int) -> np.ndarray:
    """Rows of each block in an epoch, copies counted."""
    counts = order.copies.of(epoch, slice(None))
    return np.add.reduceat(counts, np.arange(0, order.rows, order.rows_per_block))


def read_classes(folder: str, split: Split, column: str, classes: Callable[[pa.Table], np.ndarray]) -> np.ndarray:
    """The class of each row of a split: int32 (rows,). Of each shard this one column is read.

    Raises:
        DamagedData: a shard is missing, or not as it was written.
    """
    filesystem, path = open_folder(folder)
    found: list[np.ndarray] = []
    for shard in split.shards:
        try:
            with filesystem.open_input_file(f"{path}/{shard.file}") as source:
                table = pq.ParquetFile(source, page_checksum_verification=True).read(columns=[column])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedData(f"{folder}/{shard.file} is damaged ({(str(error).splitlines() or [''])[0]})") from None
        found.append(classes(table))
    return np.concatenate(found).astype(np.int32)


class HasClasses(Protocol):
    """A task whose rows may have one class each."""

    class_column: str | None

    def classes(self, rows: pa.Table) -> np.ndarray: ...


def balanced(order: Order, folder: str, split: Split, task: HasClasses, most: int) -> BalancedOrder:
    """The order of a split with classes drawn equally often, and no row more than `most` times an epoch.

    Raises:
        UserError: the task has no classes, or a shard cannot be read.
    """
    if task.class_column is None:
        raise UserError(f"--data.balance is {most}, but {type(task).__name__} has no one class for each row: leave it out")
    classes = read_classes(folder, split, task.class_column, task.classes)
    return BalancedOrder(**vars(order), copies=Copies(classes, most))


def described(counts: Sequence[int], names: Sequence[str] | None, most: int) -> str:
    """What balancing does to each class, for a person."""
    given, total = shares(counts, most), max(sum(counts), 1)
    parts: list[Any] = []
    for number, (count, share) in enumerate(zip(counts, given.tolist(), strict=True)):
        if count:
            name = names[number] if names is not None and number < len(names) else number
            parts.append(f"{name} {count / total:.1%} -> {share / total:.1%} (each row {share / count:.3g} times)")
    shown = parts[:12] + ([f"... ({len(parts):,} classes)"] if len(parts) > 12 else [])
    return ", ".join(shown) + f"; no row more than {most} times an epoch"
