"""What Weights & Biases has written of a run offline: the steps in its files, which are a log of records in the format of LevelDB's."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 2**15, 7
"""Bytes of a block of such a log, and of the header of a record; the first block begins with a header of W&B's of the same size."""
WHOLE, LAST = 1, 4
"""Kinds of records: in one part, or the last part of several."""


def steps_of(folder: Path, run_id: str) -> set[int] | None:
    """The steps of which a run's offline files have values; None: it has no such files.

    Args:
        folder: in which W&B keeps its own folder "wandb".
        run_id: W&B's name of the run.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
    found: set[int] = set()
    for path in files:
        for content in _records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                found |= {int(item.value_json) for item in record.history.item if "_step" in (item.key, *item.nested_key)}
    return found if files else None


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a log; what a killed process has left of a last one is left out."""
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK  # no header fits into the rest of a block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        end = at + HEADER + length
        if not kind or end > len(content):
            return
        parts += content[at + HEADER : end]
        at = end
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
