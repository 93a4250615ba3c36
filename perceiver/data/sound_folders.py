"""Folders of sounds: which file has which class, and which split, by the folder that it lies in or by a table among the files.

Tables are those of common data sets, too: ESC-50 (meta/esc50.csv with filename, fold, category), UrbanSound8K (metadata/*.csv with
slice_file_name, fold, class), or metadata.csv with file_name and label. A table may stand anywhere and names files by their path from
it or from the source's folder, or by their bare name where that is unique.
"""

from __future__ import annotations

from typing import Any

from perceiver.config import UserError
from perceiver.data.files import MARKS, Found, InputFile, format_of
from perceiver.data.picture_folders import Listed, class_folders, rows_of_table

FILE_COLUMNS = ("file_name", "filename", "slice_file_name", "path", "file", "audio")
"""Columns of a table that may name sounds."""
FOLD = "fold"
"""Column of a table that says which of several equal parts a sound belongs to: one of them is held out."""


def sound_folder(
    listed: Listed, label: str, what: str, label_column: str, group_column: str | None = None, val_fold: int | None = None
) -> list[Found]:
    """The sounds with a class among listed files, with their splits.

    Args:
        listed: (path, path inside the source, bytes).
        label: what messages and the manifest call the source.
        what: how the source was given.
        label_column: of the tables.
        group_column: of the tables, where sounds belong to groups.
        val_fold: the fold that is for validation; None: the greatest.

    Raises:
        UserError: no sounds, sounds without a class, a table without the columns or that names what is not there, no such fold.
    """
    sounds = {inner: (path, size) for path, inner, size in listed if inner and format_of(path) == "sound"}
    if not sounds:
        raise UserError(f"{what} holds no sounds in folders: sounds are made from .wav, .flac, .ogg, .mp3 or .aiff files")
    found: list[Found] = []
    for path, inner, _ in listed:
        if format_of(path) in ("csv", "jsonl"):
            rows = list(rows_of_table(path, inner))
            if rows and (column := next((name for name in FILE_COLUMNS if name in rows[0]), None)) is not None:
                found += _in_table(rows, column, inner, sounds, label, what, label_column, group_column, val_fold)
    if found:
        return found
    if val_fold is not None:
        raise UserError(f"--data.val-fold is {val_fold}, and {what} has no table with the columns {FILE_COLUMNS[0]} and {FOLD}")
    found = class_folders(listed, label, "sound")
    if not found:
        raise UserError(
            f"{what} has sounds without a class, such as {next(iter(sounds))}: put those of each class into a folder of its name, or add "
            f"metadata.csv with the columns file_name and {label_column}"
        )
    return found


def _in_table(
    rows: list[dict[str, Any]],
    column: str,
    name: str,
    sounds: dict[str, tuple[str, int]],
    label: str,
    what: str,
    label_column: str,
    group_column: str | None,
    val_fold: int | None,
) -> list[Found]:
    """The sounds that a table names, each once."""
    for field, wanted in (("label-column", label_column), ("group-column", group_column)):
        if wanted is not None and wanted not in rows[0]:
            raise UserError(f"{what}: {name} has no column --data.{field} {wanted} (it has: {', '.join(map(str, rows[0]))})")
    places = _places(sounds, name.rpartition("/")[0])
    folds = [_fold(row.get(FOLD)) for row in rows]
    known = sorted({fold for fold in folds if fold is not None})
    if val_fold is not None and val_fold not in known:
        there = f"has the folds {', '.join(map(str, known))}" if known else f"has no column {FOLD}"
        raise UserError(f"--data.val-fold is {val_fold}, and {what}: {name} {there}")
    held_out = val_fold if val_fold is not None else known[-1] if len(known) > 1 else None
    found = []
    for number, (row, fold) in enumerate(zip(rows, folds, strict=True), 1):
        given = str(row[column]).removeprefix("./")
        inner = places.get(given)
        if inner is None:
            raise UserError(f"{what}: {name} row {number:,} names {given}, which is not there, or there more than once")
        path, size = sounds[inner]
        group = row.get(group_column) if group_column else None
        file = InputFile(
            path=path, name=f"{label}/{inner}", format="sound", size=size, label=str(row[label_column]),
            group=None if group is None else str(group),
        )  # fmt: skip
        mark = MARKS.get(str(row.get("split") or "").strip().lower())
        if mark is None and held_out is not None:
            mark = "val" if fold == held_out else "train"
        found.append(Found(file, mark))
    return found


def _places(sounds: dict[str, tuple[str, int]], folder: str) -> dict[str, str]:
    """Paths of sounds inside the source by what a table in `folder` may call them."""
    bare: dict[str, list[str]] = {}
    for inner in sounds:
        bare.setdefault(inner.rpartition("/")[2], []).append(inner)
    found = {name: inner[0] for name, inner in bare.items() if len(inner) == 1}
    found |= {inner: inner for inner in sounds}
    prefix = f"{folder}/" if folder else ""
    return found | {inner.removeprefix(prefix): inner for inner in sounds if inner.startswith(prefix)}


def _fold(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
