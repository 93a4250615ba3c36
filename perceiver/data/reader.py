"""Reads the units of a reading plan: what a data task needs, which is little of a task, and without one's own code nothing that loads
PyTorch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from perceiver.data.chunks import Chunks, no_tokens
from perceiver.data.manifest import Split
from perceiver.data.mixture import Mixture, MixtureReadTask
from perceiver.data.order import Order, ReadTask
from perceiver.data.pieces import Piece
from perceiver.data.stream import Examples, empty_rows, read_unit

Decode = Callable[[pa.Table, Split, bool], pa.Table]
"""A task's `decode`: (rows, split, train) -> rows."""


def as_stored(block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
    """The rows of a block as its examples, without those of the next block at its end."""
    return block.slice(0, block.num_rows - split.lookahead)


class Reader(ABC):
    """Reads the units of a reading plan."""

    unit_type: ClassVar[type[Any]]
    """The class of the units."""

    @abstractmethod
    def read(self, unit: Any) -> pa.Table:
        """The rows of a unit."""

    @abstractmethod
    def empty_rows(self) -> pa.Table:
        """A table without rows, with the columns of `read`."""

    def pieces(self) -> tuple[Sequence[Piece], ...]:
        """The parts of a source's files that blocks are read from, where these are not prepared: one list a data set."""
        return ()

    def pieces_of(self, unit: Any) -> tuple[int, Sequence[int]]:
        """Which of them a unit is read from: number of the list, numbers in it."""
        return 0, ()

    def with_pieces(self, pieces: Sequence[Sequence[Piece]]) -> Self:
        """A reader that reads these instead, one list for each of `pieces()`."""
        return self


@dataclass(frozen=True, kw_only=True)
class SplitReader(Reader):
    """Of one split of a prepared data set."""

    folder: str
    split: Split
    order: Order
    train: bool
    examples: Examples = as_stored
    """The task's, where it makes something else of blocks."""
    decode: Decode | None = None
    """The task's, where it has one."""

    unit_type = ReadTask

    def read(self, unit: ReadTask) -> pa.Table:
        rows = read_unit(self.folder, self.split, self.order, unit, self.examples, self.train)
        return rows if self.decode is None else self.decode(rows, self.split, self.train)

    def empty_rows(self) -> pa.Table:
        rows = empty_rows(self.folder, self.split, self.examples)
        return rows if self.decode is None else self.decode(rows, self.split, False)


@dataclass(frozen=True, kw_only=True)
class StreamReader(SplitReader):
    """Of a training split whose rows are made from text when they are read."""

    chunks: Chunks

    def read(self, unit: ReadTask) -> pa.Table:
        return read_unit(self.folder, self.split, self.order, unit, self.examples, self.train, self.chunks.read)

    def empty_rows(self) -> pa.Table:
        return empty_rows(self.folder, self.split, self.examples, lambda *_: no_tokens(self.split.row_length))

    def pieces(self) -> tuple[Sequence[Piece], ...]:
        return (self.chunks.pieces,)

    def pieces_of(self, unit: ReadTask) -> tuple[int, Sequence[int]]:
        return 0, self.order.window_blocks_of(unit.epoch, unit.window).tolist()

    def with_pieces(self, pieces: Sequence[Sequence[Piece]]) -> Self:
        (own,) = pieces
        return replace(self, chunks=replace(self.chunks, pieces=own))


@dataclass(frozen=True, kw_only=True)
class MixtureReader(Reader):
    """Of the training splits of several data sets, mixed: "source" tells which one a row is from."""

    order: Mixture
    readers: tuple[SplitReader, ...]

    unit_type = MixtureReadTask

    def read(self, unit: MixtureReadTask) -> pa.Table:
        rows = self.readers[unit.source].read(unit.unit)
        rows = rows.filter(pa.array(unit.kept(self.order)))
        return rows.append_column("source", pa.array(np.full(rows.num_rows, unit.source)))

    def empty_rows(self) -> pa.Table:
        return self.readers[0].empty_rows().append_column("source", pa.array([], pa.int64()))

    def pieces(self) -> tuple[Sequence[Piece], ...]:
        return tuple(next(iter(reader.pieces()), ()) for reader in self.readers)

    def pieces_of(self, unit: MixtureReadTask) -> tuple[int, Sequence[int]]:
        return unit.source, self.readers[unit.source].pieces_of(unit.unit)[1]

    def with_pieces(self, pieces: Sequence[Sequence[Piece]]) -> Self:
        return replace(self, readers=tuple(reader.with_pieces([own]) for reader, own in zip(self.readers, pieces, strict=True)))
