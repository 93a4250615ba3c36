"""Folders of pictures: which file has which class, by the folder that it lies in or by a table beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from perceiver.config import UserError
from perceiver.data.files import MARKS, Format, Found, InputFile, format_of
from perceiver.data.storage import open_folder, whole_place

_TABLES = ("metadata.csv", "metadata.jsonl")
_FILE_COLUMNS = ("file_name", "image", "path", "file")
"""Columns of a table beside pictures that may name them."""
Listed = list[tuple[str, str, int]]
"""(path, path inside the source, bytes) of files."""


def picture_folder(listed: Listed, label: str, what: str, label_column: str, group_column: str | None = None) -> list[Found]:
    """The pictures with a class among listed files, with their splits; none where the source is no folder of pictures.

    A picture's class is the folder that it lies in, or stands in metadata.csv or metadata.jsonl (columns file_name and label). The
    split is that of the first folder, if that is called train, val (validation, dev) or test.

    Args:
        label: what messages and the manifest call the source.
        what: how the source was given.
        label_column: of the tables.
        group_column: of the tables, where pictures belong to groups.

    Raises:
        UserError: only pictures without a class, a table that cannot be read or names what is not there.
    """
    if len(listed) == 1 and not listed[0][1]:
        path, _, _ = listed[0]
        if format_of(path) not in ("csv", "jsonl"):
            return []
        folder, _, name = path.rpartition("/")
        return _in_table(name, rows_of_table(path, name), folder, _there(folder), label, what, label_column, group_column)
    tables = [item for item in listed if item[1].rpartition("/")[2].lower() in _TABLES]
    found = []
    for path, inner, _ in tables:
        folder = inner.rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
        inside = {name.removeprefix(prefix): (place, size) for place, name, size in listed if name.startswith(prefix)}
        named = f"{label}/{prefix}".rstrip("/")
        found += _in_table(
            inner,
            rows_of_table(path, inner),
            path.rpartition("/")[0],
            inside,
            named,
            what,
            label_column,
            group_column,
            _mark(f"{prefix}x/x"),
        )
    if tables:
        return found
    found, pictures = class_folders(listed, label, "picture"), [item for item in listed if format_of(item[0]) == "picture"]
    if pictures and not found and not any(format_of(path) in ("idx", "parquet", "arrow", "tar") for path, _, _ in listed):
        raise UserError(
            f"{what} has pictures without a class, such as {pictures[0][1]}: put those of each class into a folder of its name, or "
            f"add metadata.csv with the columns file_name and {label_column}"
        )
    return found


def class_folders(listed: Listed, label: str, form: Format) -> list[Found]:
    """The files of a format that lie in a folder which is their class; none where all of them lie in folders of splits alone."""
    files = [item for item in listed if format_of(item[0]) == form]
    splits_alone, found = _mark_of_all(files), []
    for path, inner, size in files:
        parts = inner.split("/")
        if len(parts) > 1 and not (len(parts) == 2 and splits_alone):
            file = InputFile(path=path, name=f"{label}/{inner}", format=form, size=size, label=parts[-2])
            found.append(Found(file, _mark(inner)))
    return found


def _mark(inner: str) -> str | None:
    """The split that the first folder of a path is for; folders that pictures lie in are classes and no splits."""
    parts = inner.lower().split("/")
    return MARKS.get(parts[0]) if len(parts) > 2 else None


def _mark_of_all(pictures: Listed) -> bool:
    """Whether all pictures lie in folders of splits with no folders of classes in them."""
    folders = {inner.lower().partition("/")[0] for _, inner, _ in pictures if "/" in inner}
    return all(inner.count("/") == 1 for _, inner, _ in pictures) and all(name in MARKS for name in folders)


def rows_of_table(path: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table (.csv, .jsonl) beside files, as mappings. Raises UserError where it cannot be read."""
    filesystem, inner = open_folder(path)
    try:
        with filesystem.open_input_stream(inner) as source:
            text = source.read().decode("utf-8-sig")
        if path.lower().partition(".csv")[1]:
            yield from csv.DictReader(io.StringIO(text, newline=""))
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{name} cannot be read as a table ({str(error).splitlines()[0]})") from None


def names_pictures(path: str, name: str) -> bool:
    """Whether the first row of a table (.csv, .jsonl) names a picture in one of the columns for it."""
    if not path.lower().endswith((".csv", ".jsonl")):
        return False
    try:
        row = next(rows_of_table(path, name), None)
    except UserError:
        return False
    if not isinstance(row, dict):
        return False
    column = next((column for column in _FILE_COLUMNS if column in row), None)
    return column is not None and isinstance(row[column], str) and format_of(row[column]) == "picture"


def _in_table(
    name: str,
    rows: Iterator[dict[str, Any]],
    folder: str,
    there: dict[str, tuple[str, int]],
    label: str,
    what: str,
    label_column: str,
    group_column: str | None,
    mark: str | None = None,
) -> list[Found]:
    """The pictures that a table names."""
    found = []
    for number, row in enumerate(rows, 1):
        column = next((column for column in _FILE_COLUMNS if column in row), None)
        if column is None or label_column not in row:
            missing = f"--data.label-column {label_column}" if column else f"of pictures ({' or '.join(_FILE_COLUMNS)})"
            raise UserError(f"{what}: {name} has no column {missing} (it has: {', '.join(map(str, row))})")
        if group_column is not None and group_column not in row:
            raise UserError(f"{what}: {name} has no column --data.group-column {group_column} (it has: {', '.join(map(str, row))})")
        inner = str(row[column]).removeprefix("./")
        if inner not in there:
            raise UserError(f"{what}: {name} row {number:,} names {inner}, which is not in {folder}")
        path, size = there[inner]
        value = row[label_column]
        text = json.dumps(value) if not isinstance(value, str) else value
        group = row.get(group_column) if group_column else None
        file = InputFile(
            path=path, name=f"{label}/{inner}", format="picture", size=size, label=text, group=None if group is None else str(group)
        )
        split = MARKS.get(str(row.get("split") or "").strip().lower(), mark)
        found.append(Found(file, split))
    return found


def _there(folder: str) -> dict[str, tuple[str, int]]:
    import pyarrow.fs as pafs

    filesystem, place = open_folder(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(place, recursive=True))
    return {i.path[len(place) :].strip("/"): (whole_place(folder, i.path), i.size) for i in infos if i.type == pafs.FileType.File}
