"""Rows with the content of another one, where they are left out or refused (`data.duplicates`).

Before the first pass of a preparation the input is read once for the hash of each row's content. Of equal rows one stays: one for
validation where there is any, so that what is measured stays as it was given, else the first of the input. Rows without content (empty
texts) are no duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.pieces import Piece
from perceiver.data.preparation import Job, PieceWriter, Splits, content_hashes
from perceiver.data.spans import Problems
from perceiver.data.storage import atomic_file, list_folder, read_file

_EMPTY = 2
"""Where others have 0 (validation) or 1 (training): a row that is never left out."""


class _Listing:
    """Notes rows instead of letting them be made: their hashes, what they are for, and the spans that they are in."""

    def __init__(self) -> None:
        self.span = 0
        self.found = [np.zeros((3, 0), np.uint64)]

    def __call__(self, splits: Splits, contents: Sequence[bytes]) -> Splits:
        marks = np.ones(len(contents), np.uint64)
        for split, chosen in splits:
            marks[chosen] = split == "train"
        marks[[not len(content) for content in contents]] = _EMPTY
        self.found.append(np.stack([content_hashes(contents), marks, np.full(len(contents), self.span, np.uint64)]))
        yield from ()


class _NoRows(Mapping[str, PieceWriter]):
    """In place of writers where rows are only listed."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getitem__(self, split: str) -> PieceWriter:
        raise UserError(
            f"--data.duplicates must be keep for rows of kind {self._kind}: their Preparation does not take its splits from `self.splits`"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def list_rows(job: Job, index: int, piece: Piece) -> dict[str, Any]:
    """Writes what is known of a piece's rows to the staging folder. Faults are left to the first pass, which names them."""
    preparation, problems, listing = job.preparation(job), Problems(skip=True), _Listing()
    preparation.selection = listing
    for listing.span, span in enumerate(piece.spans):
        preparation.add(span, problems, _NoRows(job.kind))
    found = np.concatenate(listing.found, axis=1)
    with atomic_file(job.staging, _listed(index)) as file:
        file.write(found.tobytes())
    return {"rows": found.shape[1]}


def listed(job: Job, num: int) -> set[int]:
    """The pieces, of `num`, whose rows are listed."""
    there = list_folder(job.staging)
    return {index for index in range(num) if _listed(index) in there}


def leave_out(job: Job, pieces: Sequence[Piece], source: str, refuse: bool) -> dict[str, Any]:
    """Notes for each piece which of its rows are left out, and returns how many of each split are.

    Args:
        source: what messages call the source.
        refuse: there must be none.

    Raises:
        UserError: there are duplicates, and they are refused.
    """
    parts = [np.frombuffer(read_file(job.staging, _listed(index)), np.uint64).reshape(3, -1) for index in range(len(pieces))]
    hashes, marks, spans = np.concatenate(parts, axis=1)
    again, firsts = _again(hashes, marks)
    if refuse and len(again):
        both = int(np.count_nonzero((marks[again] == 1) & (marks[firsts] == 0)))
        files = [_name(pieces, parts, spans, row) for row in (int(firsts[0]), int(again[0]))]
        what = f"two of {files[0]}" if files[0] == files[1] else f"one of {files[0]} and one of {files[1]}"
        more = f", {both:,} of them for training that of one for validation" if both else ""
        raise UserError(
            f"{source} has {len(again):,} rows with the content of another one{more} (such as {what}): --data.duplicates skip leaves them "
            "out, keep takes them"
        )
    begin = 0
    for index, part in enumerate(parts):
        mask = np.zeros(part.shape[1], bool)
        mask[again[(again >= begin) & (again < begin + part.shape[1])] - begin] = True
        with atomic_file(job.staging, _left_out(index)) as file:
            file.write(mask.tobytes())
        begin += part.shape[1]
    counts = {split: int(np.count_nonzero(marks[again] == mark)) for split, mark in (("train", 1), ("val", 0))}
    return {"duplicates": counts} if len(again) else {}


def _again(hashes: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with the content of another one that stays, in order, and these."""
    order = np.lexsort((marks, hashes))  # which keeps the input's order among equals
    order = order[marks[order] != _EMPTY]
    equal = np.zeros(len(order), bool)
    equal[1:] = hashes[order[1:]] == hashes[order[:-1]]
    first = order[np.maximum.accumulate(np.where(equal, 0, np.arange(len(order))))]
    again, firsts = order[equal], first[equal]
    ordered = np.argsort(again)
    return again[ordered], firsts[ordered]


def _name(pieces: Sequence[Piece], parts: Sequence[np.ndarray], spans: np.ndarray, row: int) -> str:
    piece = int(np.searchsorted(np.cumsum([part.shape[1] for part in parts]), row, side="right"))
    return pieces[piece].spans[int(spans[row])].file.name


class LeftOut:
    """Takes the rows of a piece that are left out from what is made."""

    def __init__(self, job: Job, index: int) -> None:
        self._mask = np.frombuffer(read_file(job.staging, _left_out(index)), bool)
        self._next = 0

    def __call__(self, splits: Splits, contents: Sequence[bytes]) -> Splits:
        stay = ~self._mask[self._next : self._next + len(contents)]
        self._next += len(contents)
        for split, chosen in splits:
            if (chosen & stay).any():
                yield split, chosen & stay


def _listed(index: int) -> str:
    return f"rows-{index:06d}"


def _left_out(index: int) -> str:
    return f"left-out-{index:06d}"
