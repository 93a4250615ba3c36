"""A worker's batches: rows collated, cut into micro-batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from perceiver.config import DataConfig, Experiment, TrainingConfig
from perceiver.data.balance import balanced
from perceiver.data.chunks import Chunks, open_chunks
from perceiver.data.components import Component, components
from perceiver.data.manifest import Manifest, Split
from perceiver.data.mixture import Mixture, MixtureReadTask, mixture_batches, mixture_plan
from perceiver.data.order import (
    MIXTURE_LANES,
    MOST_LANES,
    STREAM_LANES,
    VALIDATION_SEED,
    Order,
    ReadTask,
    lanes_and_window,
    plan,
    worker_slots,
)
from perceiver.data.reader import MixtureReader, Reader, SplitReader, StreamReader
from perceiver.data.sources import mixture_sources
from perceiver.data.stream import rank_batches
from perceiver.tasks.base import Task

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Loader(ABC):
    """Prepared data in one order, for one task."""

    task: Task
    folder: str
    split: Split
    order: Order | Mixture
    train: bool
    micro_batch_size: int | None
    """Most examples of a micro-batch."""

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """Reads the units of its reading plan; what data tasks get."""

    @abstractmethod
    def plan(self, rank: int, world: int, start: int, stop: int) -> Iterator[Any]:
        """What a worker has to read for the steps start .. stop - 1."""

    @abstractmethod
    def batches(self, rank: int, world: int, start: int, stop: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table | None]:
        """A worker's rows of the steps start .. stop - 1, from the rows of its plan; None where a step has no row for it."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of what a row is made from, about."""

    def micro_batches(self, world: int) -> tuple[int, int]:
        """Number of micro-batches in a worker's share of a step, and examples of each."""
        low, high = worker_slots(self.order.global_batch_size, 0, world)
        count = -(-(high - low) // min(self.micro_batch_size or high - low, high - low))
        return count, -(-(high - low) // count)

    def steps(self, read_all: ReadAll, rank: int, world: int, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each of the steps start .. stop - 1 this worker's micro-batches, all of the same shapes."""
        count, size = self.micro_batches(world)
        tables = read_all(self, self.plan(rank, world, start, stop))
        for step, rows in enumerate(self.batches(rank, world, start, stop, tables), start):
            if rows is None:
                rows = self.reader.empty_rows()
            rows = self.task.arrange(rows)
            yield [self.collate(rows.slice(i * size, size), size, step) for i in range(count)]

    def collate(self, rows: pa.Table, size: int, step: int) -> Batch:
        """A micro-batch of `size` examples, of which the first are `rows`."""
        return self.task.collate(rows, size, self.split, self.train, step)


@dataclass(frozen=True, kw_only=True)
class SplitLoader(Loader):
    """One split of a prepared data set."""

    order: Order
    numbered: bool = False
    """Whether batches have "row" besides, (B,) int64: the number of each example's row in the split (padding: -1)."""

    @property
    def reader(self) -> SplitReader:
        return SplitReader(folder=self.folder, split=self.split, order=self.order, train=self.train, **own_steps(self.task))

    def plan(self, rank: int, world: int, start: int, stop: int) -> Iterator[ReadTask]:
        return plan(self.order, rank, world, start, stop)

    def batches(self, rank: int, world: int, start: int, stop: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table | None]:
        return rank_batches(self.order, rank, world, start, stop, tables)

    def collate(self, rows: pa.Table, size: int, step: int) -> Batch:
        batch = super().collate(rows, size, step)
        if not self.numbered:
            return batch
        numbers = np.full(size, -1)
        numbers[: rows.num_rows] = rows["row"].to_numpy()
        if (of := self.task.examples_of(rows, size)) is not None:
            numbers = numbers[of]
        return {**batch, "row": torch.from_numpy(numbers)}

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored, about."""
        return max(1, sum(shard.bytes for shard in self.split.shards) // self.split.rows)


@dataclass(frozen=True, kw_only=True)
class StreamLoader(SplitLoader):
    """A training split whose rows are made from text when they are read."""

    chunks: Chunks

    @property
    def reader(self) -> StreamReader:
        return StreamReader(**vars(super().reader), chunks=self.chunks)

    @property
    def row_bytes(self) -> int:
        """Bytes of text that a row is made from, about."""
        return max(1, self.split.bytes // self.split.rows)


@dataclass(frozen=True, kw_only=True)
class MixtureLoader(Loader):
    """The training splits of several data sets, mixed. `split` counts all of them together; its rows lie in `loaders`.

    Batches have "sources" besides, (B, data sets) bool: which one an example is from (padding: none).
    """

    order: Mixture
    loaders: tuple[SplitLoader, ...]

    @property
    def reader(self) -> MixtureReader:
        return MixtureReader(order=self.order, readers=tuple(loader.reader for loader in self.loaders))

    def plan(self, rank: int, world: int, start: int, stop: int) -> Iterator[MixtureReadTask]:
        return mixture_plan(self.order, rank, world, start, stop)

    def batches(self, rank: int, world: int, start: int, stop: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table | None]:
        return mixture_batches(self.order, rank, world, start, stop, tables)

    def collate(self, rows: pa.Table, size: int, step: int) -> Batch:
        sources = np.zeros((size, len(self.loaders)), bool)
        sources[np.arange(rows.num_rows), rows["source"].to_numpy()] = True
        return {**super().collate(rows, size, step), "sources": torch.from_numpy(sources)}

    @property
    def row_bytes(self) -> int:
        return max(loader.row_bytes for loader in self.loaders)


def own_steps(task: Task) -> dict[str, Any]:
    """What a task itself does with rows in data tasks, of which most do nothing."""
    own = {"examples": task.examples, "decode": task.decode}
    return {name: method for name, method in own.items() if getattr(type(task), name) is not getattr(Task, name)}


ReadAll = Callable[[Loader, Iterator[Any]], Iterable[pa.Table]]
"""Runs a loader's reads and gives their rows in order: in this process (`read_here`), or as Ray Data tasks."""


def read_here(loader: Loader, units: Iterator[Any]) -> Iterator[pa.Table]:
    """Reads the units in this process, one when it is asked for."""
    return map(loader.reader.read, units)


def make_loader(
    task: Task, folder: str, split: Split, train: bool, *, data: DataConfig, training: TrainingConfig, micro_batch_size: int | None = None
) -> SplitLoader:
    """The loader of the training or validation split of one prepared data set."""
    lanes, window_blocks = _lanes_and_window(split, data, training.global_batch_size)
    seed, size = training.seed, training.global_batch_size
    return _make_loader(task, folder, split, train, seed, size, lanes, window_blocks, micro_batch_size)


def _lanes_and_window(split: Split, data: DataConfig, global_batch_size: int, most: int = MOST_LANES) -> tuple[int, int]:
    block_bytes = split.rows_per_block * split.bytes_per_row
    return lanes_and_window(split.num_blocks, block_bytes, global_batch_size, data.lanes, data.shuffle_window_blocks, most)


def _make_loader(
    task: Task,
    folder: str,
    split: Split,
    train: bool,
    seed: int,
    global_batch_size: int,
    lanes: int,
    window_blocks: int,
    micro_batch_size: int | None,
) -> SplitLoader:
    order = Order(
        rows=split.rows,
        rows_per_block=split.rows_per_block,
        global_batch_size=global_batch_size,
        window_blocks=window_blocks,
        max_lanes=lanes,
        seed=seed if train else VALIDATION_SEED,
    )
    return SplitLoader(task=task, folder=folder, split=split, order=order, train=train, micro_batch_size=micro_batch_size)


def make_train_loader(experiment: Experiment, task: Task, folder: str, manifest: Manifest) -> Loader:
    """`train_loader` with an experiment's settings.

    Raises:
        UserError: files that are streamed have changed.
    """
    size = experiment.parallel.micro_batch_size
    return train_loader(task, folder, manifest, data=experiment.data, training=experiment.training, micro_batch_size=size)


def train_loader(
    task: Task, folder: str, manifest: Manifest, *, data: DataConfig, training: TrainingConfig, micro_batch_size: int | None
) -> Loader:
    """The loader of training data: of one data set, or of the mixture that the manifest names.

    Raises:
        UserError: files that are streamed have changed.
    """
    parts = components(folder, manifest)
    if not manifest.mixture:
        return _part_loader(task, parts[0], data.source, data, training, micro_batch_size)
    sources = {source.name: source.source for source in mixture_sources(data)}
    loaders = tuple(_part_loader(task, part, sources[part.name], data, training, micro_batch_size) for part in parts)
    order = Mixture(
        orders=tuple(loader.order for loader in loaders),
        shares=tuple(part.share for part in parts),
        global_batch_size=training.global_batch_size,
    )
    return MixtureLoader(
        task=task, folder=folder, split=manifest.splits["train"], order=order, train=True, micro_batch_size=micro_batch_size,
        loaders=loaders,
    )  # fmt: skip


def _part_loader(
    task: Task, part: Component, source: str, data: DataConfig, training: TrainingConfig, micro_batch_size: int | None
) -> SplitLoader:
    """The loader of one data set of training data; of a mixture's in an order that takes a row of each lane in turn."""
    split, stream = part.manifest.splits["train"], part.manifest.stream
    size = training.global_batch_size
    if stream:  # a chunk is as large as a window of blocks
        lanes, window_blocks = data.lanes or STREAM_LANES, 1
    else:
        lanes, window_blocks = _lanes_and_window(split, data, size, MIXTURE_LANES if part.name else MOST_LANES)
    if part.name:
        size = max(1, min(lanes, -(-split.num_blocks // window_blocks)))
    loader = _make_loader(task, part.folder, split, True, training.seed, size, lanes, window_blocks, micro_batch_size)
    if data.balance is not None:
        loader = replace(loader, order=balanced(loader.order, part.folder, split, task, data.balance))
    return StreamLoader(**vars(loader), chunks=open_chunks(data, source, part.manifest)) if stream else loader


def make_val_loaders(
    experiment: Experiment, task: Task, folder: str, manifest: Manifest, numbered: bool = False
) -> list[tuple[Component, Loader]]:
    """`val_loaders` with an experiment's settings."""
    size = experiment.parallel.micro_batch_size
    return val_loaders(
        task, folder, manifest, data=experiment.data, training=experiment.training, micro_batch_size=size, numbered=numbered
    )  # fmt: skip


def val_loaders(
    task: Task,
    folder: str,
    manifest: Manifest,
    *,
    data: DataConfig,
    training: TrainingConfig,
    micro_batch_size: int | None,
    numbered: bool = False,
) -> list[tuple[Component, Loader]]:
    """The loaders of validation data: one, or one of each data set of a mixture.

    Args:
        numbered: whether batches say which rows their examples are (`SplitLoader.numbered`).
    """
    loaders: list[tuple[Component, Loader]] = []
    for part in components(folder, manifest):
        split = part.manifest.splits["val"]
        loader = make_loader(task, part.folder, split, False, data=data, training=training, micro_batch_size=micro_batch_size)
        loaders.append((part, replace(loader, numbered=numbered)))
    return loaders
