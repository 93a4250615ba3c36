"""Whether files of a source are what they were, and are not those of another split: by their hashes."""

from __future__ import annotations

import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from perceiver.config import DataConfig, UserError
from perceiver.data.examples import is_code
from perceiver.data.files import InputFile, is_glob
from perceiver.data.sources import Source, is_path, same_file
from perceiver.data.storage import (
    file_hash,
    list_folder,
    read_file,
    write_file,
)

logger = logging.getLogger(__name__)


CHECKED_BYTES = 1 << 30
"""Where more of a source would have to be read, a training compares names and sizes alone, if these decide."""
CHECKED_FILES = 20_000
"""The same of more files."""
HASHES = ".source-hashes.json"
"""File in data.root that keeps the hashes of source files by path, size and time, so that they are not read again."""


def source_fingerprint(data: DataConfig, source: Source, most: float = math.inf) -> dict[str, Any]:
    """What the source is: of files names, sizes and hashes; of the hub names, sizes and its revision; of code what stands for it.

    Args:
        most: bytes that are read for hashes that are not known yet, at most: where there are more, those of all files are None.
    """
    paths = [p for f in source.files for p in (f.path, f.labels_path, *f.beside) if p is not None]
    local = [p for p in paths if "://" not in p]
    hashes = _hashes(local, data.root_path, most)

    def entry(file: InputFile) -> dict[str, Any]:
        result: dict[str, Any] = {
            "name": file.name,
            "split": file.split,
            "bytes": file.size,
            "sha256": hashes.get(file.path),
        }
        if file.label is not None:
            result["label"] = file.label
        if file.labels_path is not None:
            result["labels_sha256"] = hashes.get(file.labels_path)
        if file.beside:
            result["beside_sha256"] = [hashes.get(path) for path in file.beside]
        return result

    result = {**(source.origin or {}), "files": [entry(file) for file in source.files]}
    if source.parts:
        firsts = {(part.name, part.split): part for part in source.parts}
        result["examples"] = [{"name": name, "split": split, "content": part.fingerprint()} for (name, split), part in firsts.items()]
    return result


def _hashes(paths: list[str], root: str, most: float = math.inf) -> dict[str, str]:
    """sha256 of local files, remembered by path, size and time of change; none of them where more than `most` bytes would be read.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    known = json.loads(read_file(root, HASHES)) if HASHES in list_folder(root) else {}
    try:
        states = {path: [info.st_size, info.st_mtime_ns] for path, info in ((p, os.stat(p)) for p in paths)}
        new = [path for path in states if known.get(path, [None])[:2] != states[path]]
        total = sum(states[path][0] for path in new)
        if total > most or most < math.inf and len(paths) > CHECKED_FILES:
            return {}
        if total > 1 << 30:
            logger.info(f"reading {len(new):,} source files once for their hashes ({total / 1e9:.1f} GB)")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, (_, sha256) in zip(new, pool.map(_hash, new), strict=True):
                known[path] = [*states[path], sha256]
    except OSError as error:
        raise UserError(f"{error.filename or 'a source file'} cannot be read ({error.strerror or error})") from None
    if new:
        with suppress(OSError):  # data that others prepared may lie where nothing can be written
            write_file(root, HASHES, json.dumps(known, indent=1).encode())
    return {path: known[path][2] for path in paths}


def _hash(path: str) -> tuple[int, str]:
    folder, _, name = path.rpartition("/")
    return file_hash(folder or "/", name)


def refuse_same_files(fingerprint: dict[str, Any]) -> None:
    """Raises UserError where a file for validation has the content of one for training."""
    files = [file for file in fingerprint["files"] if file["sha256"] is not None and file["bytes"]]
    train = {file["sha256"]: file["name"] for file in files if file["split"] == "train"}
    for file in files:
        if file["split"] == "val" and file["sha256"] in train:
            raise UserError(same_file(train[file["sha256"]], file["name"]))


def is_here(source: str) -> bool:
    """Whether a source is code, or files of this machine."""
    if is_code(source):
        return True
    path = Path(source).expanduser()
    return is_path(source) and "://" not in source and (path.exists() or is_glob(source))


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the files and sources that are not the same in two fingerprints. Hashes that are not known (None) fit any."""
    old, new = _entries(before), _entries(now)
    return sorted({key[0] for key in old.keys() | new.keys() if not _same(old.get(key), new.get(key))})


def _same(old: dict[str, Any] | None, new: dict[str, Any] | None) -> bool:
    if old is None or new is None:
        return False
    common = old.keys() & new.keys()
    unknown = {name for name in common if "sha256" in name and (_is_unknown(old[name]) or _is_unknown(new[name]))}
    return all(old[name] == new[name] for name in common - unknown)


def _is_unknown(hashes: str | list[str | None] | None) -> bool:
    return None in hashes if isinstance(hashes, list) else hashes is None


def _entries(fingerprint: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What a fingerprint says of each file or source, by name and split."""
    return {(entry["name"], entry["split"]): entry for entry in (*fingerprint["files"], *fingerprint.get("examples", ()))}
