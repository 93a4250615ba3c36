"""Training text that is not prepared: chunks of the source's files, each of which becomes equally many rows when it is read.

What the order of training needs is known before: how many chunks there are (from the files' sizes and a sample's ids per
byte), and that each has `rows` rows. A chunk's documents become ids, end to end, and these rows; what is left over at its end
is dropped, and a chunk that falls short begins again. So its rows depend on nothing but the chunk, like a block of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, overload

import numpy as np
import pyarrow as pa

from perceiver.config import DataConfig, UserError
from perceiver.data.columns import fixed_column
from perceiver.data.files import InputFile
from perceiver.data.make_streams import document_marks
from perceiver.data.manifest import Manifest, Split
from perceiver.data.pieces import Piece
from perceiver.data.preparation import Job
from perceiver.data.read_documents import read_documents
from perceiver.data.sources import Source, resolve
from perceiver.data.spans import Problems, Span, Unreadable, chunks
from perceiver.data.tables import Columns, parquet_rows
from perceiver.data.text import join_documents
from perceiver.data.tokenizers import tokenizer_of

MARGIN = 0.02
"""A chunk is larger by this share than a chunk of the sample's ids per byte would have to be, so that few fall short."""
FEWEST_CHUNKS = 64
"""Small sources have smaller chunks, so that there are about this number of them."""
MOST_VAL_CHUNKS = 16
"""Chunks held out for validation, at most, where a source has no validation files."""
SAMPLES, SAMPLE_BYTES = 32, 1 << 17
"""Parts of a source, and bytes of each, that tell how many ids a byte makes."""


@dataclass(frozen=True)
class Size:
    """How much a file holds: units are what its spans count, bytes of text or rows of parquet."""

    units: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """A source's chunks, by which training reads it."""

    job: Job
    rows: int
    """Rows of a chunk."""
    pieces: Sequence[Piece]

    def read(self, folder: str, split: Split, block: int) -> pa.Table:
        """A chunk as a block of a shard: its rows, and one more for the windows that begin in the last, (rows + 1) x T ids.

        Where no document begins in it (one is longer than a chunk), it is the chunk before it once more.

        Raises:
            UserError: a fault in the input.
        """
        for number in chain(range(block, -1, -1), range(block + 1, len(self.pieces))):
            ids = chunk_ids(self.job, self.pieces[number])
            if len(ids):
                return pa.table({"tokens": fixed_column(np.resize(ids, (self.rows + 1, self.job.row_length)))})
        raise UserError("the source has no text: everything in it is empty or was skipped")


class SomePieces(Sequence[Piece]):
    """A few of a source's chunks: those that a data task reads. The others are fetched where one of them is asked for after all.

    Args:
        count: of all chunks.
        there: the few, by their number.
        fetch: gives all of them.
    """

    def __init__(self, count: int, there: Mapping[int, Piece], fetch: Callable[[], Sequence[Piece]]) -> None:
        self._count, self._there, self._fetch = count, there, fetch

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Piece: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Piece]: ...

    def __getitem__(self, number: int | slice) -> Piece | Sequence[Piece]:
        found = self._there.get(number) if isinstance(number, int) else None
        return self._fetch()[number] if found is None else found


def measure(file: InputFile) -> Size:
    """Size of a file. A compressed one is unpacked for it.

    Raises:
        UserError: the file is truncated or corrupt.
    """
    try:
        if file.format in ("parquet", "wikitext-rows"):
            return Size(*parquet_rows(file))
        if not file.compressed:
            return Size(file.size, file.size)
        size = sum(map(len, chunks(Span(file, 0, file.size), 0)))
        return Size(size, size)
    except Unreadable as error:
        raise UserError(error.args[1]) from None


def _span(file: InputFile, start: int, stop: int) -> Span:
    return Span(file, start, stop, unpacked=file.compressed)


def sample_pieces(files: list[InputFile], sizes: list[Size]) -> list[Piece]:
    """What tells how many ids a byte makes: parts of the files, evenly over the source, or all of a small one."""
    total = sum(size.bytes for size in sizes)
    if total <= SAMPLES * SAMPLE_BYTES:
        return [Piece((_span(file, 0, size.units),), size.bytes) for file, size in zip(files, sizes, strict=True)]
    ends = np.cumsum([size.bytes for size in sizes])
    pieces = []
    for place in (total * (2 * i + 1) // (2 * SAMPLES) for i in range(SAMPLES)):
        number = int(np.searchsorted(ends, place, side="right"))
        file, size = files[number], sizes[number]
        start = size.units * (place - int(ends[number]) + size.bytes) // size.bytes
        stop = min(start + max(1, size.units * SAMPLE_BYTES // size.bytes), size.units)
        pieces.append(Piece((_span(file, start, stop),), size.bytes * (stop - start) // size.units))
    return pieces


def chunk_rows(total_bytes: int, ids_per_byte: float, row_length: int, most: int) -> int:
    """Rows of a chunk."""
    rows = int(total_bytes * ids_per_byte * (1 - MARGIN)) // row_length
    return max(1, min(most, rows // FEWEST_CHUNKS))


def cut_chunks(files: list[InputFile], sizes: list[Size], chunk_bytes: float) -> list[Piece]:
    """All files, end to end, in equal chunks of at least `chunk_bytes`.

    What cannot be cut, a row of parquet, belongs to the chunk that it ends in.
    """
    total = sum(size.bytes for size in sizes)
    count = int(total // chunk_bytes)
    if not count:
        return []
    edges = [total * i // count for i in range(count + 1)]
    parts: list[list[Span]] = [[] for _ in range(count)]
    first, number = 0, 0
    for file, size in zip(files, sizes, strict=True):
        start = 0
        while start < size.units:
            end = edges[number + 1] - first  # of the chunk, in this file
            stop = size.units if end >= size.bytes else size.units * end // size.bytes
            if start < stop:
                parts[number].append(_span(file, start, stop))
            start = stop
            if end <= size.bytes and number + 1 < count:
                number += 1
        first += size.bytes
    return [Piece(tuple(spans), high - low) for spans, low, high in zip(parts, edges[:-1], edges[1:], strict=True)]


def chunks_of(files: list[InputFile], described: dict[str, Any], row_length: int) -> tuple[list[Piece], list[Piece]]:
    """The chunks to train on, and those held out for validation (none where the source has validation files).

    Args:
        files: the source's files to train on.
        described: what the manifest says about them, `Manifest.stream`.

    Raises:
        UserError: too little text, or a file that cannot be cut.
    """
    sizes, prepare_it = [Size(*size) for size in described["sizes"]], "prepare it (without --data.prepare stream)"
    chunk_bytes = described["rows"] * row_length / described["ids_per_byte"] / (1 - MARGIN)
    for file, size in zip(files, sizes, strict=True):
        if size.units == 1 and size.bytes > 2 * chunk_bytes:
            raise UserError(
                f"{file.name} cannot be streamed: it is a single row with the text of {size.bytes / chunk_bytes:.0f} chunks: {prepare_it}"
            )
    pieces = cut_chunks(files, sizes, chunk_bytes)
    if len(pieces) < 2:
        raise UserError(f"data.source has too little text to be streamed: {prepare_it}")
    if not described["val_fraction"]:
        return [marked(piece, "train") for piece in pieces], []
    return hold_out(pieces, described["val_fraction"])


def open_chunks(data: DataConfig, source: str, manifest: Manifest) -> Chunks:
    """The chunks of a source that is streamed, where a training reads them.

    Raises:
        UserError: its files are not those that the manifest was made of.
    """
    data = replace(data, source=source, mixture=())
    found = resolve(data, "tokens")
    if fingerprint(found)["files"] != manifest.source["files"]:
        raise UserError(f"data.source {source} has other files now than when it was looked at: prepare into another --data.root")
    files = [file for file in found.files if file.split != "val"]
    split = manifest.splits["train"]
    job = Job(
        kind="tokens", folder="", staging="", columns=Columns(text=data.text_column, label=None), skip=data.on_error == "skip",
        val_fraction=0.0, row_length=split.row_length, rows_per_block=split.rows_per_block,
        blocks_per_shard=split.blocks_per_shard, tokenizer=tokenizer_of(data),
        document_marks=manifest.settings["document_marks"],
    )  # fmt: skip
    assert manifest.stream is not None  # it is of a source that is streamed
    train, _ = chunks_of(files, manifest.stream, split.row_length)
    return Chunks(job=job, rows=split.rows_per_block, pieces=tuple(train))


def fingerprint(source: Source) -> dict[str, Any]:
    """What a source's files are: names and sizes (hashing them would take reading them)."""
    entries = [{"name": file.name, "split": file.split, "bytes": file.size} for file in source.files]
    return {**(source.origin or {}), "files": entries}


def hold_out(pieces: list[Piece], fraction: float) -> tuple[list[Piece], list[Piece]]:
    """Chunks to train on, at least one, and some held out for validation, evenly over the source."""
    count = max(1, min(MOST_VAL_CHUNKS, len(pieces) - 1, round(len(pieces) * fraction)))
    chosen = {len(pieces) * (2 * i + 1) // (2 * count) for i in range(count)}
    train = [marked(piece, "train") for i, piece in enumerate(pieces) if i not in chosen]
    return train, [marked(pieces[i], "val") for i in sorted(chosen)]


def marked(piece: Piece, split: str) -> Piece:
    """A piece with all of its documents in one split."""
    return Piece(tuple(replace(span, file=_marked_file(span.file, split)) for span in piece.spans), piece.size)


@lru_cache(maxsize=4096)  # one for all chunks of a file: large sources have hundreds of thousands of them
def _marked_file(file: InputFile, split: str) -> InputFile:
    return replace(file, split=split)


def no_tokens(row_length: int) -> pa.Table:
    """A chunk of one empty row."""
    return pa.table({"tokens": fixed_column(np.zeros((2, row_length), np.uint16))})


def chunk_ids(job: Job, piece: Piece) -> np.ndarray:
    """The ids of a chunk's documents, with the marks of their ends: uint16."""
    assert job.tokenizer is not None
    problems, parts = Problems(job.skip), []
    for span in piece.spans:
        for documents in read_documents(span, job.columns, problems):
            ids, lengths = job.tokenizer.encode_batch(documents.texts)
            parts.append(join_documents(ids, lengths, documents.begins, documents.complete, *document_marks(job, span.file)))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)
