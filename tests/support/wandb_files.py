"""Reads what Weights & Biases writes offline, without its own (private) reader."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 2**15, 7


def _records(path: Path) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's log, which has a header of its own before its first block's."""
    content, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_offline(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """All rows of history, each with "_step", and the records of the runs, of all files below a folder in the order of their starts."""
    from wandb.proto import wandb_internal_pb2

    history, runs = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for content in _records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            elif record.WhichOneof("record_type") == "run":
                runs.append(record.run)
    return history, runs
