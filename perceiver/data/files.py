"""Files of a source: finds them, their formats, and what their names say of splits. Reads none."""

from __future__ import annotations

import csv
import difflib
import fnmatch
import glob
import io
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.fs as pafs

from perceiver.config import UserError
from perceiver.data import media_rows  # noqa: F401  (its kinds make themselves known)
from perceiver.data.row_kind import ENDINGS
from perceiver.data.rows import KINDS
from perceiver.data.storage import find_place, open_folder, whole_place

Format = Literal["text", "wikitext", "jsonl", "csv", "arrow", "parquet", "wikitext-rows", "idx", "picture", "tar", "midi", "flow", "sound"]
FORMATS: dict[str, Format] = {
    ".txt": "text", ".raw": "wikitext", ".tokens": "wikitext", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
    ".csv": "csv", ".tsv": "csv", ".xlsx": "csv", ".xlsm": "csv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".mid": "midi", ".midi": "midi", ".tar": "tar",
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"), "sound"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"), "picture"),
}  # fmt: skip
PACKINGS = (".gz", ".bz2", ".zst")
"""Endings of packed files."""
CUT = ("text", "wikitext", "jsonl")
"""Formats of files of which several tasks read a part each, where they are not packed."""
_NEVER_PACKED = ("parquet", "arrow", "midi", "picture", "tar", "sound")
UNCUT: tuple[Format, ...] = ("csv", "arrow", "tar")
"""Formats of tables and archives that are read from their beginning, by one task each."""
OF_SAVED = re.compile(r"(^|/)((dataset_info|state|dataset_dict)\.json|cache-[^/]*\.arrow)$")
"""Files that `datasets.save_to_disk` and the cache of `datasets` write beside the rows."""
SAME = "same file"
"""Mark of a path that leads to a file which another path leads to: for no split."""
_HIDDEN, _DOTTED = re.compile(r"(^|/)[._]"), re.compile(r"(^|/)[.]")
MARKS = {
    "train": "train", "training": "train", "unsupervised": "unsupervised",
    "valid": "val", "validation": "val", "val": "val", "dev": "val", "test": "test", "testing": "test", "t10k": "test",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to prepare."""

    path: str
    """Absolute path or URI."""
    name: str
    """How the manifest and messages call it: the source's last part and the path in it."""
    format: str
    """One of `Format`, or of a kind of rows of the user's."""
    size: int
    """Bytes, as stored."""
    split: str = ""
    """"train", "val", or "hash": each document goes where its hash says."""
    labels_path: str | None = None
    """The labels that belong to an idx file of images."""
    label: str | None = None
    """The class of a picture or sound, where its folder or a table beside it says it."""
    group: str | None = None
    """The group that a picture or sound belongs to, where a table beside it says it."""
    beside: tuple[str, ...] = ()
    """Other files that are read with it: the frames of an optical flow."""
    encoding: str = "utf-8"
    """Of text; other than UTF-8 it is converted while it is read."""

    @property
    def packing(self) -> str:
        """How the file is packed: ".gz", ".bz2" or ".zst"; "" for a plain one."""
        return next((ending for ending in PACKINGS if self.path.lower().endswith(ending)), "")

    @property
    def compressed(self) -> bool:
        """Whether its bytes are not those of its text, so that it is read from its beginning."""
        return bool(self.packing) or self.encoding != "utf-8"


@dataclass(frozen=True)
class Found:
    """A file of a source, and what its name says of it."""

    file: InputFile
    mark: str | None
    """Split that the file's name tells: train, val, test, unsupervised, or None."""


def real_place(path: str) -> str:
    """A path without links; a URI as it is."""
    return path if "://" in path else os.path.realpath(path)


def files_of(source: str, label: str, kind: str, field: str, names: Collection[str]) -> list[Found]:
    """The files of a path, folder or glob, sorted by name."""
    listed = list_files(source, field, names)
    single = listed[0][1] == "" if len(listed) == 1 else False
    if single and format_of(listed[0][0]) is None:
        raise UserError(f"{field} {source} is of no known format: {kind} are made from {KINDS[kind].expected}")
    result = []
    sizes = {path: size for path, _, size in listed}
    marks = _splits_in_table(listed) if KINDS[kind].has_split_tables and not single else {}
    again = set() if single else _again(listed)
    saved = any(re.search(r"(^|/)state\.json$", inner) for _, inner, _ in listed)
    for path, inner, size in listed:
        form = format_of(path)
        if saved and OF_SAVED.search(inner):
            continue
        if form not in KINDS[kind].formats or (form == "idx" and not _labels_paths(path)):
            continue
        labels = _labels_beside(path, None if single else sizes) if form == "idx" else None
        name = f"{label}/{inner}" if inner else label
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise UserError(f"{field} {source} has a file whose name is not UTF-8, {name!r}: rename it")
        file = InputFile(path=path, name=name, format=form, size=size, labels_path=labels)
        result.append(Found(file, SAME if path in again else None if single else marks.get(inner, mark_of(inner))))
    if not result:
        raise UserError(f"{field} {source} holds nothing that {kind} are made from: {KINDS[kind].expected}")
    return result


def _splits_in_table(listed: list[tuple[str, str, int]]) -> dict[str, str | None]:
    """What a table beside the files says of their splits, as MAESTRO has one: a .csv with the columns split and midi_filename (or
    file_name, or file).
    """
    found: dict[str, str | None] = {}
    for path, inner, _ in listed:
        if "/" in inner or not inner.lower().endswith(".csv"):
            continue
        filesystem, place = open_folder(path)
        with filesystem.open_input_stream(place) as source:
            rows = list(csv.DictReader(io.StringIO(source.read().decode("utf-8-sig", "replace"), newline="")))
        for row in rows:
            name = row.get("midi_filename") or row.get("file_name") or row.get("file")
            if name and row.get("split"):
                found[name] = MARKS.get(row["split"].strip().lower())
    return found


def _again(listed: list[tuple[str, str, int]]) -> set[str]:
    """Paths that lead by links to a file that another path leads to, for the same split: all but one of each file's paths."""
    groups: dict[tuple[str, str | None], list[tuple[bool, str]]] = {}
    for path, inner, _ in listed:
        real = real_place(path)
        groups.setdefault((real, mark_of(inner)), []).append((not real.endswith(f"/{inner}"), path))
    return {path for group in groups.values() for _, path in sorted(group)[1:]}


def list_files(source: str, field: str, names: Collection[str]) -> list[tuple[str, str, int]]:
    """(path, path inside the source, size) of all files, sorted; a single file has no path inside."""
    root, pattern = split_glob(source)
    if pattern:
        if "**" in pattern.split("/"):  # glob would follow links to a folder above them up and down
            files = _walk(str(root), f"{field} {source}", _DOTTED) if root.is_dir() else ()
            found = [path for path, inner, _ in files if _matches(inner.split("/"), pattern.split("/"))]
        else:
            found = glob.glob(f"{glob.escape(str(root))}/{pattern}")
        paths = sorted(p for p in found if Path(p).is_file())
        if not paths:
            raise UserError(f"{field} {source} matches no file")
        return [(str(Path(p).absolute()), Path(p).relative_to(root).as_posix(), Path(p).stat().st_size) for p in paths]
    filesystem, path, info = find_place(source, field)
    if info.type == pafs.FileType.NotFound:
        near = difflib.get_close_matches(source, names, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"{field} {source} does not exist: it is no file, folder or glob, and no named data set ({', '.join(names)}){hint}")
    if info.type == pafs.FileType.File:
        return [(whole_place(source, path), "", info.size or 0)]
    if "://" not in source:
        visible = sorted(_walk(path, f"{field} {source}"))
    else:
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        inner = {i.path: i.path[len(path) :].strip("/") for i in infos if i.type == pafs.FileType.File}
        visible = sorted(
            (whole_place(source, i.path), inner[i.path], i.size) for i in infos if i.path in inner and not _HIDDEN.search(inner[i.path])
        )
    if not visible:
        raise UserError(f"{field} {source} is a folder without files")
    return visible


def _matches(names: list[str], pattern: list[str]) -> bool:
    """Whether a path is what a glob means, part by part."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _walk(root: str, what: str, hidden: re.Pattern[str] = _HIDDEN) -> Iterator[tuple[str, str, int]]:
    """The files of a local folder and the folders in it, as `list_files` has them. Links are followed.

    A real folder is entered once, or once for each split that the names of links to it mark it for: so a link to a folder
    above it does no harm, and what is linked into both splits is found in both.
    """
    folders, entered = [""], set()
    links: list[str] = []
    try:
        while folders or links:
            inside = folders.pop() if folders else links.pop(0)
            here = f"{root}/{inside}".rstrip("/") or "/"
            info = os.stat(here)
            key = (info.st_dev, info.st_ino, mark_of(inside))
            if key in entered:
                continue
            entered.add(key)
            for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
                inner = f"{inside}/{entry.name}".lstrip("/")
                if hidden.search(inner):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(inner)
                elif entry.is_file():
                    yield entry.path, inner, entry.stat().st_size
                elif entry.is_symlink() and format_of(entry.name) is not None:
                    raise UserError(f"{what} has {inner}, a link to a file that does not exist: remove it")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.filename} ({error.strerror})") from None


def is_glob(text: str) -> bool:
    """Whether a text is a pattern of paths."""
    return any(c in text for c in "*?[")


def split_glob(source: str) -> tuple[Path, str]:
    """The folder that a glob starts in, and the rest of it; "" where the source is no glob, or a file with such a name."""
    path = Path(source).expanduser()
    if "://" in source or not is_glob(source) or path.exists():
        return path, ""
    root = Path(path.anchor)
    parts = list(path.parts[1:] if path.anchor else path.parts)
    while parts and (not is_glob(parts[0]) or (root / parts[0]).exists()):
        root /= parts.pop(0)
    return root, "/".join(parts)


def format_of(path: str) -> str | None:
    """The format that a file's name says; None for one that is not read."""
    name = path.rpartition("/")[2].lower()
    bare = name
    for ending in PACKINGS:
        bare = bare.removesuffix(ending)
    if re.search(r"idx[13]-ubyte$|\.idx[13]?$|^(train|t10k)-(images|labels)", bare):
        return "idx"
    form = FORMATS.get(Path(bare).suffix) or ENDINGS.get(Path(bare).suffix)
    return None if bare != name and (form in _NEVER_PACKED or bare.endswith((".xlsx", ".xlsm"))) else form


def _labels_paths(path: str) -> list[str]:
    """Where the labels that belong to an idx file of images may be; none if it is itself one of labels."""
    folder, slash, name = path.rpartition("/")
    if "images" not in name:
        return []
    packed = name.lower().endswith(".gz")
    bare = folder + slash + (name[:-3] if packed else name).replace("images", "labels").replace("idx3", "idx1")
    return [bare + name[-3:], bare] if packed else [bare, bare + ".gz"]


def _labels_beside(path: str, there: dict[str, int] | None) -> str:
    """The labels of an idx file of images, among `there`, or where it lies.

    Raises:
        UserError: there are none.
    """
    for labels in _labels_paths(path):
        filesystem, inner = open_folder(labels)
        if labels in there if there is not None else filesystem.get_file_info(inner).type == pafs.FileType.File:
            return labels
    name = _labels_paths(path)[0].rpartition("/")[2]
    raise UserError(f"{path} has no file of labels beside it: {name} is missing")


def mark_of(inner: str) -> str | None:
    """The split that a path tells, the innermost name first."""
    for part in reversed(inner.lower().split("/")):
        for word in re.split(r"[^a-z0-9]+", part):
            if word in MARKS:
                return MARKS[word]
    return None
