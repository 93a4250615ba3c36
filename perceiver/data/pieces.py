"""Pass 1 of a preparation: the input is cut into pieces, each of which becomes files of ids (or pixels) and counts. Knows no Ray.

See `prepare.py` for the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from perceiver.data import (  # noqa: F401  (they make themselves known)
    make_arrays,
    make_documents,
    make_flow,
    make_images,
    make_photos,
    make_sounds,
    make_streams,
)
from perceiver.data.examples import ExamplePart
from perceiver.data.files import CUT, InputFile
from perceiver.data.manifest import SPLITS
from perceiver.data.preparation import Job, PieceWriter, Selection
from perceiver.data.spans import SECTION, Problems, Span, Unreadable
from perceiver.data.storage import list_folder, read_file, write_file
from perceiver.data.tables import parquet_rows

PIECE_BYTES = 32 << 20
"""Input bytes of a piece, about: small files are taken together, large plain files and parquet files cut."""
FAULTS_AT_ONCE = 10
"""Faults of a piece that one message names, so that not each of them takes an attempt."""


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
    elif file.format not in CUT or file.compressed:
        yield Span(file, 0, file.size), file.size
    else:
        step = -(-piece_bytes // SECTION) * SECTION
        for first in range(0, max(file.size, 1), step):
            yield Span(file, first, min(first + step, file.size)), min(step, file.size - first)


def make_piece(job: Job, index: int, piece: Piece, selection: Selection | None = None) -> dict[str, Any]:
    """Pass 1 for one piece: its files in the staging folder, and the note on it, which is also returned.

    Args:
        selection: what leaves out duplicates.

    Raises:
        UserError: faults in the input, the first few together.
    """
    problems, preparation = Problems(job.skip, FAULTS_AT_ONCE), job.preparation(job)
    preparation.selection = selection
    with ExitStack() as stack:
        writers = {split: PieceWriter(job, index, split, stack) for split in SPLITS}
        for span in piece.spans:
            preparation.add(span, problems, writers)
        problems.end()
        counts = {split: writer.finish() for split, writer in writers.items()}
    note = {"splits": counts, "skipped": dict(problems.counts)}
    write_file(job.staging, _piece_note(index), json.dumps(note).encode())
    return note


def finished_pieces(job: Job, num: int) -> dict[int, dict[str, Any]]:
    """The notes on the pieces that are finished, of `num`."""
    there = list_folder(job.staging)
    names = {i: _piece_note(i) for i in range(num)}
    return {i: json.loads(read_file(job.staging, name)) for i, name in names.items() if name in there}


def _piece_note(index: int) -> str:
    return f"piece-{index:06d}.json"
