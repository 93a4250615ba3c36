"""Text as arrays of ids: packing, windows, words, masking. Pure functions on numpy arrays, without loops over tokens.

Shapes: n rows, T ids a row. Random choices come from `order.uniforms`, so that they depend on (seed, epoch, row) alone.
"""

from __future__ import annotations

import string

import numpy as np

from perceiver.data.order import uniforms
from perceiver.data.tokenizer_base import WordTable

IGNORE = -100
"""Label of positions without a target."""

_BLANK = np.isin(np.arange(256), np.frombuffer(string.whitespace.encode(), np.uint8))
_CHOICE, _IDS = 11, 12
"""Streams of random numbers of masking: which words, which random ids."""


# -------------------------------------------------------------------------------------------------------------- packing


def join_documents(
    ids: np.ndarray,
    lengths: np.ndarray,
    begins: np.ndarray,
    complete: np.ndarray,
    before: int | None = None,
    after: int | None = None,
) -> np.ndarray:
    """The stream of some documents (or parts of documents), with marks where they begin and end.

    Args:
        ids: uint16, all joined.
        lengths: int64 (n,), the lengths of the parts.
        begins, complete: bool (n,), whether a document begins, or ends, with the part.
        before: id where a document begins, or None.
        after: id where a document ends, or None.
    """
    num_before = begins.astype(np.int64) * (before is not None)
    num_after = complete.astype(np.int64) * (after is not None)
    if not num_before.any() and not num_after.any():
        return ids
    ends = np.cumsum(lengths + num_before + num_after)
    stream = np.empty(int(ends[-1]), np.uint16)
    is_text = np.ones(len(stream), bool)
    starts = ends - lengths - num_before - num_after
    for mark, places in ((before, starts[num_before > 0]), (after, ends[num_after > 0] - 1)):
        if mark is not None:
            stream[places] = mark
            is_text[places] = False
    stream[is_text] = ids
    return stream


def truncate(ids: np.ndarray, lengths: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Joined documents, each cut to its first `limit` ids: the ids and the new lengths."""
    if not len(lengths) or lengths.max() <= limit:
        return ids, lengths
    ends = np.cumsum(lengths)
    position = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    return ids[position < limit], np.minimum(lengths, limit)


def split_long(lengths: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Joined documents, each split into parts of `limit` ids (the last one shorter): number of parts of each, and the parts' lengths."""
    parts = np.maximum(1, -(-lengths // limit))
    sizes = np.full(int(parts.sum()), limit, lengths.dtype)
    sizes[np.cumsum(parts) - 1] = lengths - (parts - 1) * limit
    return parts, sizes


def stride_long(ids: np.ndarray, lengths: np.ndarray, limit: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joined documents, each longer one as parts of `limit` ids that begin `stride` ids after each other, until one reaches its end.

    Args:
        ids: of all documents, joined.
        lengths: of each document.
        limit: ids of a part; the last one of a document may be shorter.
        stride: 1 .. limit.

    Returns:
        Number of parts of each document, the parts' ids, joined, and their lengths.
    """
    parts = 1 + np.maximum(0, -(-(lengths - limit) // stride))
    document = np.repeat(np.arange(len(lengths)), parts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    sizes = np.minimum(limit, lengths[document] - number * stride)
    begins = (np.cumsum(lengths) - lengths)[document] + number * stride
    places = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
    return parts, ids[places], sizes


def windows(block: np.ndarray, shift: int = 0) -> np.ndarray:
    """Windows of T + 1 ids that overlap by one, from `shift` on: a row's ids and the next one's first.

    Args:
        block: (R + 1, T), rows of a stream and the row after them.
        shift: 0 .. T - 1.

    Returns:
        A read-only view (R, T + 1). Ids beyond the last row's T are 0.

    Raises:
        ValueError: shift out of range.
    """
    num_rows, length = block.shape
    if not 0 <= shift < length:
        raise ValueError(f"shift is {shift}, it must be in 0 .. {length - 1}")
    flat = np.ascontiguousarray(block).reshape(-1)[shift:]
    return np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length][: num_rows - 1]


def count_words(data: bytes) -> int:
    """Words in UTF-8 text, separated by ASCII white space."""
    if not data:
        return 0
    blank = _BLANK[np.frombuffer(data, np.uint8)]
    return int(not blank[0]) + int(np.count_nonzero(blank[:-1] & ~blank[1:]))


# ---------------------------------------------------------------------------------------------------------------- words


def word_starts(ids: np.ndarray, table: WordTable) -> np.ndarray:
    """Where words begin: bool (n, T). White space belongs to the word after it; special ids belong to no word.

    A row's first id begins a word, and so does the first one after a special id: words do not reach across documents.
    """
    return _word_starts(np.take(table.flags, ids))


def _word_starts(flags: np.ndarray) -> np.ndarray:
    starts = np.ones(flags.shape, bool)
    here, before = flags[:, 1:], flags[:, :-1]
    blank_begins = (here & WordTable.STARTS_BLANK != 0) & (before & WordTable.ALL_BLANK == 0)
    np.logical_or(before & (WordTable.SPECIAL | WordTable.ENDS_WORD) != 0, blank_begins, out=starts[:, 1:])
    return starts & (flags & WordTable.SPECIAL == 0)


def word_ids(ids: np.ndarray, table: WordTable) -> np.ndarray:
    """The number of the word in its row that each id belongs to, -1 for special ids: int32 (n, T)."""
    numbers = np.cumsum(word_starts(ids, table), axis=1, dtype=np.int32) - np.int32(1)
    return np.where(np.take(table.flags, ids) & WordTable.SPECIAL, np.int32(-1), numbers)


# -------------------------------------------------------------------------------------------------------------- masking


def mask_words(
    ids: np.ndarray,
    table: WordTable,
    *,
    mask_id: int,
    probability: float,
    seed: int,
    epoch: np.ndarray | int,
    rows: np.ndarray,
    whole_words: bool = True,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks ids for masked language modelling (BERT's 80/10/10, arXiv 1810.04805, by whole words as in Perceiver IO).

    Each word (or each id) is chosen with `probability`, independently. A chosen word becomes `mask_id` (80%), random
    ids of the whole vocabulary, drawn anew for each of its ids (10%), or stays (10%). Special ids are never chosen.

    Args:
        ids: (n, T).
        table: what the tokenizer knows about words.
        seed, epoch, rows: what the choice depends on: rows are the rows' numbers in the data set, (n,).
        valid: bool (n, T), where there is text; None: everywhere.

    Returns:
        The model's input, (n, T), and the labels: the original ids where chosen and IGNORE elsewhere, int64 (n, T).
    """
    num_rows, length = ids.shape
    flags = np.take(table.flags, ids) if valid is None else np.where(valid, np.take(table.flags, ids), WordTable.SPECIAL)
    special = (flags & WordTable.SPECIAL) != 0
    starts = _word_starts(flags) if whole_words else ~special
    # Words as runs of flat positions: from a start to the next start or special id.
    borders = np.flatnonzero(starts | special)
    sizes = np.diff(borders, append=ids.size)
    is_word = starts.reshape(-1)[borders]
    first, sizes = borders[is_word], sizes[is_word]
    row = first // max(length, 1)
    number = np.arange(len(first)) - np.searchsorted(row, np.arange(num_rows))[row]
    epochs = np.broadcast_to(np.asarray(epoch), np.shape(rows))
    drawn = uniforms(seed, epochs, rows, int(number.max(initial=0)) + 1, _CHOICE)[row, number]

    chosen = drawn < probability
    first, sizes, fate = first[chosen], sizes[chosen], drawn[chosen] / probability
    labels = np.full(ids.shape, IGNORE, np.int64)
    inputs = ids.copy()
    flat_ids, flat_labels, flat_inputs = ids.reshape(-1), labels.reshape(-1), inputs.reshape(-1)
    places = _runs(first, sizes)
    flat_labels[places] = flat_ids[places]
    masked = fate < 0.8
    flat_inputs[_runs(first[masked], sizes[masked])] = mask_id
    random = ~masked & (fate < 0.9)
    places = _runs(first[random], sizes[random])
    row, column = np.divmod(places, max(length, 1))
    counter = rows[row].astype(np.int64) * length + column
    flat_inputs[places] = uniforms(seed, epochs[row], counter, 1, _IDS)[:, 0] * len(table.flags)
    return inputs, labels


def _runs(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The positions first .. first + size - 1 of all runs, one after the other."""
    ends = np.cumsum(sizes)
    return np.repeat(first - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
