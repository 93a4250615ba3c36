"""Pass 1 of a preparation: the input is cut into pieces, each of which becomes files of ids (or pixels) and counts. Knows no Ray.

See `prepare.py` for the whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from perceiver.data.examples import ExamplePart
from perceiver.data.files import UNCUT, InputFile
from perceiver.data.manifest import SPLITS
from perceiver.data.midi import NOTE_OFF
from perceiver.data.read_arrays import read_arrays
from perceiver.data.read_documents import Documents, read_documents
from perceiver.data.read_images import Images, read_images
from perceiver.data.read_midi import read_performance
from perceiver.data.rows import ArrayRows, EventRows, RowKind, rows_of
from perceiver.data.spans import SECTION, Problems, Span, Unreadable
from perceiver.data.storage import atomic_file, list_folder, read_file, write_file
from perceiver.data.tables import Columns, parquet_rows
from perceiver.data.text import count_words, join_documents, truncate
from perceiver.data.tokenizers import ByteTokenizer, Tokenizer

PIECE_BYTES = 32 << 20
"""Input bytes of a piece, about: small files are taken together, large plain files and parquet files cut."""
_MOST_ROWS, _BATCH_BYTES = 1024, 8 << 20
"""Rows of arrays that are gathered before they are written, at most, and their bytes."""
_COUNTED_AT_ONCE = 1 << 16
"""Values counted by one call: what it makes of them then stays in the cache."""
COUNTS = ("rows", "tokens", "bytes", "words", "documents")


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

    @property
    def rows(self) -> RowKind:
        """What the rows are."""
        return rows_of(self.kind, self.row_length, self.arrays)

    @property
    def rows_per_shard(self) -> int:
        return self.rows_per_block * self.blocks_per_shard


@dataclass(frozen=True)
class Piece:
    """What one task of pass 1 reads."""

    spans: tuple[Span, ...]
    size: int
    """Input bytes, about."""


def cut_pieces(inputs: Sequence[InputFile | ExamplePart], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The input in pieces of about `piece_bytes`, in order. A part of a source that is code is a piece of its own."""
    pieces: list[Piece] = []
    spans: list[Span] = []
    size = 0
    for file in inputs:
        for span, more in _spans(file, piece_bytes) if isinstance(file, InputFile) else [(Span(file, 0, 0), piece_bytes)]:
            if spans and size + more > piece_bytes:
                pieces.append(Piece(tuple(spans), size))
                spans, size = [], 0
            spans.append(span)
            size += more
    return [*pieces, Piece(tuple(spans), size)] if spans else pieces


def _spans(file: InputFile, piece_bytes: int) -> Iterator[tuple[Span, int]]:
    """A file's spans with their bytes. What cannot be entered in the middle stays whole."""
    if file.format in ("parquet", "wikitext-rows"):
        try:
            rows, size = parquet_rows(file)
        except Unreadable:  # whoever reads it will say so
            rows, size = 0, file.size
        step = max(1, min(rows, rows * piece_bytes // max(size, 1)))
        for first in range(0, max(rows, 1), step):
            stop = min(first + step, rows)
            yield Span(file, first, stop), size * (stop - first) // max(rows, 1)
    elif file.format in ("idx", "midi") or file.format in UNCUT or file.compressed:
        yield Span(file, 0, file.size), file.size
    else:
        step = -(-piece_bytes // SECTION) * SECTION
        for first in range(0, max(file.size, 1), step):
            yield Span(file, first, min(first + step, file.size)), min(step, file.size - first)


def make_piece(job: Job, index: int, piece: Piece) -> dict[str, Any]:
    """Pass 1 for one piece: its files in the staging folder, and the note on it, which is also returned.

    Raises:
        UserError: a fault in the input.
    """
    problems = Problems(job.skip)
    with ExitStack() as stack:
        writers = {split: _PieceWriter(job, index, split, stack) for split in SPLITS}
        for span in piece.spans:
            if job.kind == "images":
                for images in read_images(span, job.columns, problems):
                    _add_images(job, span.file, images, writers)
            elif job.kind == EventRows.kind:
                for events in read_performance(span, problems):
                    _add_performance(job, span.file, events, writers)
            elif job.arrays is not None:
                for example in read_arrays(span, job.arrays, problems):
                    _add_example(job.arrays, span.file, example, job.val_fraction, writers)
            else:
                for documents in read_documents(span, job.columns, problems):
                    _add_documents(job, span.file, documents, writers)
        counts = {split: writer.finish() for split, writer in writers.items()}
    note = {"splits": counts, "skipped": dict(problems.counts)}
    write_file(job.staging, _piece_note(index), json.dumps(note).encode())
    return note


class _PieceWriter:
    """The files of one piece for one split: values (ids or pixels), and where rows have labels, lengths and labels."""

    def __init__(self, job: Job, index: int, split: str, stack: ExitStack) -> None:
        self._job, self._stack, self._name = job, stack, f"piece-{index:06d}-{split}"
        self._files: dict[str, BinaryIO] = {}
        self._counts = dict.fromkeys((*COUNTS, "empty"), 0)
        self._histogram = np.zeros(0, np.int64)
        self._examples: list[dict[str, Any]] = []
        self._tables: pa.RecordBatchWriter | None = None

    def add_example(self, example: dict[str, Any], content: bytes, digest: np.ndarray | None) -> None:
        """A row of arrays."""
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


def _add_images(job: Job, file: InputFile | ExamplePart, images: Images, writers: dict[str, _PieceWriter]) -> None:
    pixels = np.ascontiguousarray(images.pixels)
    contents = [image.tobytes() for image in pixels]
    for split, chosen in splits_of(file, contents, job.val_fraction):
        values = pixels[chosen].reshape(-1)
        num = int(np.count_nonzero(chosen))
        counts = {"rows": num, "bytes": values.nbytes, "documents": num}
        hashes = None if file.split == "hash" else content_hashes(contents)
        writers[split].add(values, counts, images.labels[chosen], None, hashes)


def rows_at_once(rows: ArrayRows) -> int:
    """Rows of a batch in the files of pieces: all batches but the last have this number."""
    return max(1, min(_MOST_ROWS, _BATCH_BYTES // rows.bytes_per_row))


def _add_example(
    rows: ArrayRows, file: InputFile | ExamplePart, example: dict[str, Any], val_fraction: float, writers: dict[str, _PieceWriter]
) -> None:
    content = rows.contents(example)
    for split, _ in splits_of(file, [content], val_fraction):
        writers[split].add_example(example, content, None if file.split == "hash" else content_hashes([content]))


def _add_performance(job: Job, file: InputFile | ExamplePart, events: np.ndarray, writers: dict[str, _PieceWriter]) -> None:
    content = events.tobytes()
    size = -(-(len(events) + 1) // job.row_length) * job.row_length
    ids = np.full(size, job.rows.fill_id, np.uint16)
    ids[1 : len(events) + 1] = events
    for split, _ in splits_of(file, [content], job.val_fraction):
        counts = {"tokens": size, "bytes": len(content), "words": int(np.count_nonzero(events < NOTE_OFF)), "documents": 1}
        writers[split].add(ids, counts, None, None, None if file.split == "hash" else content_hashes([content]))


def _add_documents(job: Job, file: InputFile | ExamplePart, documents: Documents, writers: dict[str, _PieceWriter]) -> None:
    assert job.tokenizer is not None
    encoded = [text.encode() for text in documents.texts]
    for split, chosen in splits_of(file, encoded, job.val_fraction):
        places = np.flatnonzero(chosen)
        ids, lengths = job.tokenizer.encode_batch([documents.texts[i] for i in places])
        complete = documents.complete[chosen]
        counts = {
            "bytes": sum(len(encoded[i]) for i in places),
            "words": count_words(b"\n".join(encoded[i] for i in places)),
            "documents": int(np.count_nonzero(complete)),
            "empty": int(np.count_nonzero(lengths == 0)),
        }
        hashes = None if file.split == "hash" else content_hashes([content for content in encoded if content])
        if job.kind == "tokens":
            ids = join_documents(ids, lengths, documents.begins[chosen], complete, *document_marks(job, file))
            writers[split].add(ids, {**counts, "tokens": len(ids)}, None, None, hashes)
        else:
            assert documents.labels is not None
            ids, lengths = truncate(ids, lengths, job.row_length)
            counts |= {"rows": len(places), "tokens": len(ids)}
            writers[split].add(ids, counts, documents.labels[chosen], lengths, hashes)


def document_marks(job: Job, file: InputFile | ExamplePart) -> tuple[int | None, int | None]:
    """Ids before and after each document. WikiText as bytes stays as it is: its articles begin with a title anyway."""
    tokenizer = job.tokenizer
    assert tokenizer is not None
    if job.document_marks == "cls-sep":
        return tokenizer.cls_id, tokenizer.sep_id
    running = isinstance(tokenizer, ByteTokenizer) and file.format in ("wikitext", "wikitext-rows")
    return None, None if running else tokenizer.eos_id


def content_hashes(contents: Sequence[bytes]) -> np.ndarray:
    """What tells documents (or images) apart by their content: uint64 (n,)."""
    data = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(data, ">u8").astype(np.uint64)


def splits_of(file: InputFile | ExamplePart, contents: Any, val_fraction: float) -> Iterator[tuple[str, np.ndarray]]:
    """The splits that a file's documents go to, with which ones; equal documents go to the same."""
    if file.split != "hash":
        yield file.split, np.ones(len(contents), bool)
        return
    is_val = content_hashes(contents).astype(np.float64) < val_fraction * 2.0**64
    for split, chosen in (("train", ~is_val), ("val", is_val)):
        if chosen.any():
            yield split, chosen


def finished_pieces(job: Job, num: int) -> dict[int, dict[str, Any]]:
    """The notes on the pieces that are finished, of `num`."""
    there = list_folder(job.staging)
    names = {i: _piece_note(i) for i in range(num)}
    return {i: json.loads(read_file(job.staging, name)) for i, name in names.items() if name in there}


def _piece_note(index: int) -> str:
    return f"piece-{index:06d}.json"
