"""Whether files of a source are what they were, and are not those of another split: by their hashes."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from perceiver.config import DataConfig, UserError
from perceiver.data.files import InputFile
from perceiver.data.manifest import Manifest
from perceiver.data.sources import Source, same_file
from perceiver.data.storage import (
    file_hash,
    list_folder,
    read_file,
    write_file,
)

logger = logging.getLogger(__name__)


HASHES = ".source-hashes.json"
"""File in data.root that keeps the hashes of source files by path, size and time, so that they are not read again."""


def source_fingerprint(data: DataConfig, source: Source) -> dict[str, Any]:
    """What the source is: of files names, sizes and hashes; of the hub names, sizes and its revision; of code what stands for it."""
    paths = [p for f in source.files for p in (f.path, f.labels_path, *f.beside) if p is not None]
    local = [p for p in paths if "://" not in p]
    hashes = _hashes(local, data.root_path)

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


def _hashes(paths: list[str], root: str) -> dict[str, str]:
    """sha256 of local files, remembered by path, size and time of change.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    known = json.loads(read_file(root, HASHES)) if HASHES in list_folder(root) else {}
    try:
        states = {path: [info.st_size, info.st_mtime_ns] for path, info in ((p, os.stat(p)) for p in paths)}
        new = [path for path in states if known.get(path, [None])[:2] != states[path]]
        total = sum(states[path][0] for path in new)
        if total > 1 << 30:
            logger.info(f"reading {len(new):,} source files once for their hashes ({total / 1e9:.1f} GB)")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, (_, sha256) in zip(new, pool.map(_hash, new), strict=True):
                known[path] = [*states[path], sha256]
    except OSError as error:
        raise UserError(f"{error.filename or 'a source file'} cannot be read ({error.strerror or error})") from None
    if new:
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


def refuse_changed_source(data: DataConfig, folder: str, old: Manifest, fingerprint: dict[str, Any]) -> None:
    """Raises UserError where prepared data was made from other files than the source has now."""
    before, now = _entries(old.source), _entries(fingerprint)
    changed = sorted({name for name, split in before.keys() | now.keys() if before.get((name, split)) != now.get((name, split))})
    if changed:
        what, more = data.source or data.val_source, ", ..." if len(changed) > 5 else ""
        hint = ""
        if any(entry["content"].startswith("code:") for entry in now.values() if "content" in entry):
            hint = " (of code without a method fingerprint() the source file counts, with all that it imports from beside it)"
        raise UserError(
            f"data.source {what} has changed since {folder} was prepared from it ({', '.join(changed[:5])}{more}){hint}: "
            "remove that folder, or prepare into another --data.root"
        )


def _entries(fingerprint: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What a fingerprint says of each file or source, by name and split."""
    return {(entry["name"], entry["split"]): entry for entry in (*fingerprint["files"], *fingerprint.get("examples", ()))}
