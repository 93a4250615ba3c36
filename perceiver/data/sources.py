"""Where data comes from: named data sets, names on the hub, and a user's own files."""

from __future__ import annotations

import re
from pathlib import Path

NAMED = (
    "mnist-mini", "mnist", "wikitext-103-raw", "wikitext-2-raw", "wikitext-2", "imdb", "imdb-unsupervised", "c4",
)  # fmt: skip


def is_path(source: str) -> bool:
    """Whether a source means files, and not a named data set or a name on the hub."""
    return source not in NAMED and not source.startswith("hub:")


def source_label(source: str) -> str:
    """A source without its place on this machine: named data sets and hub names as they are, else "files:NAME"."""
    if not is_path(source):
        return source
    parts = [part for part in re.split(r"[\\/]+", source.rstrip("/")) if part not in ("", ".", "..")]
    parts = parts or [Path(source).expanduser().resolve().name]
    return "files:" + "/".join(parts[-2:] if any(c in parts[-1] for c in "*?[") else parts[-1:])
