"""How rows of a kind are made, in the two passes of a preparation: the class that each kind has, and what it works with.

Pass 1 adds what a piece of the input holds to the piece's files, pass 2 makes blocks of a shard from the files of all pieces.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import pyarrow as pa

from perceiver.config import UserError
from perceiver.data.examples import ExamplePart
from perceiver.data.files import InputFile
from perceiver.data.manifest import COUNTS
from perceiver.data.rows import ArrayRows, RowKind, rows_of
from perceiver.data.spans import Problems, Span
from perceiver.data.storage import atomic_file, open_folder, read_range
from perceiver.data.tables import Columns
from perceiver.data.times import Time
from perceiver.data.tokenizers import Tokenizer

_MOST_ROWS, _BATCH_BYTES = 1024, 8 << 20
"""Rows of arrays that are gathered before they are written, at most, and their bytes."""
Splits = Iterator[tuple[str, np.ndarray]]
"""Names of splits, with which of the documents (or images) go there: bool (n,)."""
Selection = Callable[[Splits, Sequence[bytes]], Splits]
"""What takes documents out of splits: their contents are given one call after the other."""
_COUNTED_AT_ONCE = 1 << 16
"""Values counted by one call: what it makes of them then stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all jobs of a preparation need to know."""

    kind: str
    folder: str
    """Where shards go."""
    staging: str
    """Where pieces and the notes on finished jobs go."""
    columns: Columns
    skip: bool
    """Leave out and count faulty rows and files instead of stopping."""
    val_fraction: float
    row_length: int
    """T, or the greatest length of a document, or height * width * channels."""
    rows_per_block: int
    blocks_per_shard: int
    tokenizer: Tokenizer | None = None
    document_marks: str = ""
    """"eos": an end id after each document; "cls-sep": each document between [CLS] and [SEP]."""
    arrays: ArrayRows | None = None
    """The columns of rows of arrays."""
    long_texts: Literal["cut", "split", "stride", "refuse"] = "cut"
    """What becomes of documents that are longer than a row."""
    text_stride: int | None = None
    """Of long_texts stride: ids between the beginnings of two parts; None: half a row."""
    held_out: np.ndarray | None = None
    """Keys of what goes to validation, sorted, where it was chosen by class or by group (`held_out.py`); None: those of small hash."""
    preparation: type[Preparation] = field(init=False)
    """Of the kind. It goes with the job to other processes, and the code that it needs with it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preparation", Preparation.of(self.kind))

    @property
    def rows(self) -> RowKind:
        """What the rows are."""
        return rows_of(self.kind, self.row_length, self.arrays)

    @property
    def rows_per_shard(self) -> int:
        return self.rows_per_block * self.blocks_per_shard


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to make: its rows, and where in which pieces they lie."""

    split: str
    number: int
    first_row: int
    rows: int
    parts: tuple[tuple[int, int, int], ...]
    """(piece, first, last + 1): ids of a stream, or rows, counted in the piece."""


class Preparation(ABC):
    """How the rows of one kind are made. A subclass with a `kind` is known when it is defined."""

    kind: ClassVar[str]
    """The kind of rows, as their `RowKind` has it."""
    known: ClassVar[dict[str, type[Preparation]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            Preparation.known[cls.kind] = cls

    def __init__(self, job: Job) -> None:
        self.job = job
        self.selection: Selection | None = None
        """What leaves out duplicates (`duplicates.py`)."""

    @staticmethod
    def of(kind: str) -> type[Preparation]:
        """That of a kind.

        Raises:
            UserError: rows of this kind cannot be made.
        """
        if kind not in Preparation.known:
            raise UserError(f"rows of kind {kind!r} have no Preparation: define a subclass with this kind beside their RowKind")
        return Preparation.known[kind]

    @abstractmethod
    def add(self, span: Span, problems: Problems, writers: Mapping[str, PieceWriter]) -> None:
        """Pass 1: reads a part of the input and adds what it holds to the piece's files of the splits that it belongs to."""

    def keyed(self, span: Span, problems: Problems) -> Iterator[tuple[np.ndarray, np.ndarray]] | None:
        """What of a part of the input would be held out together: a key (uint64) and a class (int64) for each document or row.

        None: validation cannot be chosen by class or group. Where it is, `add` gives `splits_of` what the keys are hashes of.
        """
        return None

    def splits(self, file: InputFile | ExamplePart, contents: Sequence[bytes], groups: Sequence[bytes] | None = None) -> Splits:
        """The splits that a file's documents go to, with which ones: those of equal content, or group, to the same.

        Those that are left out as duplicates go nowhere. `add` asks this once for each document, in order.
        """
        found = splits_of(file, groups or contents, self.job.val_fraction, self.job.held_out)
        return found if self.selection is None else self.selection(found, contents)

    @abstractmethod
    def block(self, shard: ShardParts, first: int, num: int) -> pa.Table:
        """Pass 2: rows first .. first + num - 1 of a shard (and the kind's lookahead)."""


class PieceWriter:
    """The files of one piece for one split: values (ids or pixels), and where rows have labels, lengths and labels."""

    def __init__(self, job: Job, index: int, split: str, stack: ExitStack) -> None:
        self._job, self._stack, self._name = job, stack, f"piece-{index:06d}-{split}"
        self._files: dict[str, BinaryIO] = {}
        self._counts = dict.fromkeys((*COUNTS, "empty", "long", "all_tokens", "cut", "filled"), 0)
        self._histogram = np.zeros(0, np.int64)
        self._examples: list[dict[str, Any]] = []
        self._tables: pa.RecordBatchWriter | None = None

    def add_example(self, example: dict[str, Any], content: bytes, digest: np.ndarray | None, label: int | None = None) -> None:
        """A row of arrays; the label, where it has one, is counted."""
        if label is not None:
            self._count(np.array([label]))
        for name, count in (("rows", 1), ("documents", 1), ("bytes", len(content))):
            self._counts[name] += count
        if digest is not None:
            self._write("hashes", digest)
        self._examples.append(example)
        assert self._job.arrays is not None
        if len(self._examples) == rows_at_once(self._job.arrays):
            self._flush()

    def _flush(self) -> None:
        """Writes the rows of arrays that have been gathered."""
        rows = self._job.arrays
        if rows is not None and self._examples:
            if self._tables is None:
                file = self._stack.enter_context(atomic_file(self._job.staging, f"{self._name}.rows"))
                self._tables = self._stack.enter_context(pa.ipc.new_file(file, rows.schema))
            self._tables.write_table(rows.stack(self._examples))
            self._examples = []

    def add(
        self,
        values: np.ndarray,
        counts: dict[str, int],
        labels: np.ndarray | None,
        lengths: np.ndarray | None,
        hashes: np.ndarray | None,
    ) -> None:
        for name, count in counts.items():
            self._counts[name] += count
        self._write("values", values)
        if labels is not None:
            self._write("labels", labels.astype(np.int32))
        if lengths is not None:
            self._write("lengths", lengths.astype(np.int32))
        if hashes is not None:
            self._write("hashes", hashes)
        if labels is not None and labels.ndim == 2:  # several classes a row: how often each is there
            self._histogram = np.pad(self._histogram, (0, labels.shape[1] - len(self._histogram))) + labels.sum(0)
        else:
            self._count(values if labels is None else labels)

    def _count(self, values: np.ndarray) -> None:
        if len(values):
            missing = int(values.max()) + 1 - len(self._histogram)
            self._histogram = np.pad(self._histogram, (0, max(missing, 0)))
        for first in range(0, len(values), _COUNTED_AT_ONCE):
            part = values[first : first + _COUNTED_AT_ONCE]
            self._histogram += np.bincount(part, minlength=len(self._histogram))

    def finish(self) -> dict[str, int]:
        """Writes what is left, and how often each id (or label) occurs; the counts."""
        self._flush()
        if len(self._histogram):
            self._write("histogram", self._histogram)
        return self._counts

    def _write(self, part: str, values: np.ndarray) -> None:
        if part not in self._files:
            name = f"{self._name}.{part}"
            self._files[part] = self._stack.enter_context(atomic_file(self._job.staging, name))
        self._files[part].write(np.ascontiguousarray(values).data)


class ShardParts:
    """The parts of pieces' files that a shard is made of."""

    def __init__(self, job: Job, plan: ShardPlan) -> None:
        self._job, self._plan = job, plan

    def read(self, part: str, dtype: type, start: int, stop: int, width: int = 1) -> np.ndarray:
        """Values start .. stop - 1 of a shard (each of `width` numbers), from the pieces that they lie in."""
        size = np.dtype(dtype).itemsize * width
        found = []
        for name, low, high in self._pieces(start, stop):
            data = read_range(self._job.staging, f"{name}.{part}", low * size, high * size)
            found.append(np.frombuffer(data, dtype))
        return np.concatenate(found) if found else np.empty(0, dtype)

    def labels(self, first: int, num: int) -> dict[str, pa.Array]:
        """The column of labels of rows first .. first + num - 1 of a shard, by its name."""
        if not self._job.rows.has_tags:
            return {"label": pa.array(self.read("labels", np.int32, first, first + num))}
        width = self._job.columns.num_classes
        values = self.read("labels", np.int32, first, first + num, width=width).astype(np.uint8)
        offsets = pa.array(np.arange(num + 1, dtype=np.int32) * width)
        item = pa.list_(pa.field("element", pa.uint8(), nullable=False))
        return {"labels": pa.ListArray.from_arrays(offsets, pa.array(values), type=item)}

    def read_lists(self, start: int, stop: int) -> pa.ListArray:
        """Rows start .. stop - 1 of a shard as lists of ids."""
        ids, lengths = [], []
        for name, low, high in self._pieces(start, stop):
            sizes = np.frombuffer(read_range(self._job.staging, f"{name}.lengths", 0, high * 4), np.int32).astype(np.int64)
            first = int(sizes[:low].sum())
            last = first + int(sizes[low:].sum())
            ids.append(np.frombuffer(read_range(self._job.staging, f"{name}.values", first * 2, last * 2), np.uint16))
            lengths.append(sizes[low:])
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
        item = pa.list_(pa.field("element", pa.uint16(), nullable=False))
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)), type=item)

    def read_rows(self, rows: ArrayRows, start: int, stop: int) -> pa.Table:
        """Rows start .. stop - 1 of a shard of arrays."""
        filesystem, staging = open_folder(self._job.staging)
        size, found = rows_at_once(rows), []
        for name, low, high in self._pieces(start, stop):
            with filesystem.open_input_file(f"{staging}/{name}.rows") as source:
                reader = pa.ipc.open_file(source)
                first = low // size
                batches = [reader.get_batch(i) for i in range(first, (high - 1) // size + 1)]
                found.append(pa.Table.from_batches(batches).slice(low - first * size, high - low))
        return pa.concat_tables(found).combine_chunks()

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """What values start .. stop - 1 of a shard are in the pieces: (name of the piece's files, first, last + 1)."""
        begin = 0
        for piece, low, high in self._plan.parts:
            first, last = max(start - begin, 0), min(stop - begin, high - low)
            if first < last:
                yield f"piece-{piece:06d}-{self._plan.split}", low + first, low + last
            begin += high - low


def rows_at_once(rows: ArrayRows) -> int:
    """Rows of a batch in the files of pieces: all batches but the last have this number."""
    return max(1, min(_MOST_ROWS, _BATCH_BYTES // rows.bytes_per_row))


def strata(labels: np.ndarray) -> np.ndarray:
    """What rows are held out by (`Preparation.keyed`): their class; rows of several classes are all alike. int64 (n,)."""
    return labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)


def content_hashes(contents: Sequence[bytes]) -> np.ndarray:
    """What tells documents (or images) apart by their content: uint64 (n,). A `Time` stands for itself."""
    data = b"".join(content if isinstance(content, Time) else hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(data, ">u8").astype(np.uint64)


def splits_of(file: InputFile | ExamplePart, contents: Any, val_fraction: float, held_out: np.ndarray | None = None) -> Splits:
    """The splits that a file's documents go to, with which ones; those of equal contents (their own, or their groups') go to the same."""
    if file.split != "hash":
        yield file.split, np.ones(len(contents), bool)
        return
    keys = content_hashes(contents)
    is_val = keys.astype(np.float64) < val_fraction * 2.0**64 if held_out is None else np.isin(keys, held_out)
    for split, chosen in (("train", ~is_val), ("val", is_val)):
        if chosen.any():
            yield split, chosen
