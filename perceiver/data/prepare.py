"""Makes prepared data from input files in two passes of small jobs that do not depend on each other. Knows no Ray.

Pass 1: the input is cut into pieces; each becomes a few files of ids (or pixels) and counts in a staging folder.
Pass 2: from the sums of the counts it is known what each shard holds; each shard takes it from the pieces' files.

Every job writes its files under temporary names and its `.json` last, so that a finished job is known by it; jobs
that were killed are done again. Results do not depend on how the input is cut, on the number of processes, or on
interruptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from perceiver.data.manifest import Shard, Split, shard_name, stream_rows
from perceiver.data.pieces import COUNTS, Job, rows_at_once
from perceiver.data.rows import ArrayRows, fixed_column
from perceiver.data.shards import describe_shard, write_blocks
from perceiver.data.storage import atomic_file, list_folder, open_folder, read_file, read_range, write_file


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to make: its rows, and where in which pieces they lie."""

    split: str
    number: int
    first_row: int
    rows: int
    parts: tuple[tuple[int, int, int], ...]
    """(piece, first, last + 1): ids of a stream, or rows, counted in the piece."""


def split_rows(job: Job, notes: list[dict[str, Any]], split: str) -> int:
    """Logical rows of a split, from the notes on all pieces."""
    counts = [note["splits"][split] for note in notes]
    if job.rows.is_stream:
        tokens = sum(count["tokens"] for count in counts)
        return stream_rows(tokens, job.row_length) if tokens else 0
    return sum(count["rows"] for count in counts)


def plan_shards(job: Job, notes: list[dict[str, Any]], split: str) -> list[ShardPlan]:
    """The shards of a split."""
    stream = job.rows.is_stream
    sizes = [note["splits"][split]["tokens" if stream else "rows"] for note in notes]
    ends = np.cumsum(sizes)
    rows = split_rows(job, notes, split)
    plans = []
    for number, first_row in enumerate(range(0, rows, job.rows_per_shard)):
        num = min(job.rows_per_shard, rows - first_row)
        scale = job.row_length if stream else 1
        start, stop = first_row * scale, (first_row + num + job.rows.lookahead) * scale
        parts = []
        for piece in range(int(np.searchsorted(ends, start, side="right")), len(sizes)):
            begin = int(ends[piece]) - sizes[piece]
            if begin >= stop:
                break
            parts.append((piece, max(start - begin, 0), min(stop - begin, sizes[piece])))
        plans.append(ShardPlan(split=split, number=number, first_row=first_row, rows=num, parts=tuple(parts)))
    return plans


def make_shard(job: Job, plan: ShardPlan) -> dict[str, Any]:
    """Pass 2 for one shard: its file, and the note on it, which is also returned."""
    name = shard_name(plan.split, plan.number)
    with atomic_file(job.folder, name) as file:
        write_blocks(file, job.rows, _blocks(job, plan))
    note = asdict(describe_shard(job.folder, name, plan.rows))
    write_file(job.staging, _shard_note(plan), json.dumps(note).encode())
    return note


def _blocks(job: Job, plan: ShardPlan) -> Iterator[pa.Table]:
    for first in range(0, plan.rows, job.rows_per_block):
        num = min(job.rows_per_block, plan.rows - first)
        if job.rows.is_stream:
            block = np.full((num + job.rows.lookahead) * job.row_length, job.rows.fill_id, np.uint16)
            start = first * job.row_length
            ids = _read_part(job, plan, "values", np.uint16, start, start + len(block))
            block[: len(ids)] = ids
            yield pa.table({"tokens": fixed_column(block.reshape(-1, job.row_length))})
            continue
        if job.arrays is not None:
            yield _read_rows(job, job.arrays, plan, first, first + num)
            continue
        labels = pa.array(_read_part(job, plan, "labels", np.int32, first, first + num))
        if job.kind == "images":
            pixels = _read_part(job, plan, "values", np.uint8, first, first + num, width=job.row_length)
            yield pa.table({"image": fixed_column(pixels.reshape(num, -1)), "label": labels})
        else:
            yield pa.table({"tokens": _read_documents(job, plan, first, first + num), "label": labels})


def _read_part(job: Job, plan: ShardPlan, part: str, dtype: type, start: int, stop: int, width: int = 1) -> np.ndarray:
    """Values start .. stop - 1 of a shard (each of `width` numbers), from the pieces that they lie in."""
    size = np.dtype(dtype).itemsize * width
    found = []
    for piece, low, high in _parts(plan, start, stop):
        data = read_range(job.staging, f"piece-{piece:06d}-{plan.split}.{part}", low * size, high * size)
        found.append(np.frombuffer(data, dtype))
    return np.concatenate(found) if found else np.empty(0, dtype)


def _read_documents(job: Job, plan: ShardPlan, start: int, stop: int) -> pa.ListArray:
    """Rows start .. stop - 1 of a shard as lists of ids."""
    ids, lengths = [], []
    for piece, low, high in _parts(plan, start, stop):
        name = f"piece-{piece:06d}-{plan.split}"
        sizes = np.frombuffer(read_range(job.staging, f"{name}.lengths", 0, high * 4), np.int32).astype(np.int64)
        first = int(sizes[:low].sum())
        last = first + int(sizes[low:].sum())
        ids.append(np.frombuffer(read_range(job.staging, f"{name}.values", first * 2, last * 2), np.uint16))
        lengths.append(sizes[low:])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    item = pa.list_(pa.field("element", pa.uint16(), nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)), type=item)


def _read_rows(job: Job, rows: ArrayRows, plan: ShardPlan, start: int, stop: int) -> pa.Table:
    """Rows start .. stop - 1 of a shard of arrays."""
    filesystem, staging = open_folder(job.staging)
    size, found = rows_at_once(rows), []
    for piece, low, high in _parts(plan, start, stop):
        with filesystem.open_input_file(f"{staging}/piece-{piece:06d}-{plan.split}.rows") as source:
            reader = pa.ipc.open_file(source)
            first = low // size
            batches = [reader.get_batch(i) for i in range(first, (high - 1) // size + 1)]
            found.append(pa.Table.from_batches(batches).slice(low - first * size, high - low))
    return pa.concat_tables(found).combine_chunks()


def _parts(plan: ShardPlan, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """What values start .. stop - 1 of a shard are in the pieces: (piece, first, last + 1)."""
    begin = 0
    for piece, low, high in plan.parts:
        first, last = max(start - begin, 0), min(stop - begin, high - low)
        if first < last:
            yield piece, low + first, low + last
        begin += high - low


def make_split(job: Job, notes: list[dict[str, Any]], shards: list[dict[str, Any]], split: str) -> Split:
    """A split's part of the manifest."""
    counts = {name: sum(note["splits"][split][name] for note in notes) for name in COUNTS}
    counts["rows"] = split_rows(job, notes, split)
    return Split(
        name=split,
        kind=job.kind,
        row_length=job.row_length,
        rows_per_block=job.rows_per_block,
        blocks_per_shard=job.blocks_per_shard,
        lookahead=job.rows.lookahead,
        shards=tuple(Shard(**shard) for shard in shards),
        **counts,
    )


def histogram(job: Job, split: str) -> np.ndarray:
    """How often each id (or label) occurs in a split: int64."""
    total = np.zeros(0, np.int64)
    for name in sorted(list_folder(job.staging)):
        if name.startswith("piece-") and name.endswith(f"-{split}.histogram"):
            part = np.frombuffer(read_file(job.staging, name), np.int64).copy()
            longer, shorter = (part, total) if len(part) > len(total) else (total, part)
            longer[: len(shorter)] += shorter
            total = longer
    return total


def shared_documents(job: Job) -> int | None:
    """How many validation documents (or images; of plain text sections) have the content of a training one.

    None where it cannot be: equal documents of the same files go to the same split.
    """
    names = sorted(list_folder(job.staging))
    train, val = ([name for name in names if name.endswith(f"-{split}.hashes")] for split in ("train", "val"))
    if not train or not val:
        return None
    wanted = np.concatenate([np.frombuffer(read_file(job.staging, name), np.uint64) for name in val])
    shared = np.zeros(len(wanted), bool)
    for name in train:
        shared |= np.isin(wanted, np.frombuffer(read_file(job.staging, name), np.uint64))
    return int(np.count_nonzero(shared))


def unigram_nats(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of the validation ids under the training ids' frequencies (plus one each), in nats per id."""
    counts = np.ones(vocab_size)
    counts[: len(train)] += train
    weights = np.zeros(vocab_size)
    weights[: len(val)] = val
    return float(-(weights * np.log(counts / counts.sum())).sum() / max(weights.sum(), 1))


def finished_shards(job: Job, plans: list[ShardPlan]) -> dict[int, dict[str, Any]]:
    """The notes on the shards that are finished, by their place in `plans`."""
    notes, shards = list_folder(job.staging), list_folder(job.folder)
    done = {}
    for i, plan in enumerate(plans):
        if _shard_note(plan) in notes:
            note = json.loads(read_file(job.staging, _shard_note(plan)))
            if shards.get(note["file"]) == note["bytes"]:
                done[i] = note
    return done


def _shard_note(plan: ShardPlan) -> str:
    return f"shard-{plan.split}-{plan.number:06d}.json"
