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
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from perceiver.data.manifest import COUNTS, Shard, Split, shard_name, stream_rows
from perceiver.data.preparation import Job, ShardParts, ShardPlan
from perceiver.data.shards import describe_shard, write_blocks
from perceiver.data.storage import atomic_file, list_folder, read_file, write_file


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
    preparation, parts = job.preparation(job), ShardParts(job, plan)
    for first in range(0, plan.rows, job.rows_per_block):
        yield preparation.block(parts, first, min(job.rows_per_block, plan.rows - first))


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
