"""Where data comes from: named data sets, names on the hub, a user's own files or functions. Finds files and splits; reads none."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs

from perceiver.config import DataConfig, UserError
from perceiver.data.examples import ExamplePart, find_parts, is_code, name_of
from perceiver.data.rows import KINDS, ImageRows
from perceiver.data.storage import open_folder

Format = Literal["text", "wikitext", "jsonl", "parquet", "wikitext-rows", "idx"]

SMALLEST_SHARE = 1e-3
"""Of a source in a mixture."""
SHIPPED = Path(__file__).parent / "quickstart"
"""The digits that come with the package."""


@dataclass(frozen=True, kw_only=True)
class _Hub:
    """A data set on the Hugging Face hub; `marks`: what its splits are used for where the usual rule does not fit."""

    repository: str
    config: str | None = None
    format: Format | None = None
    marks: dict[str, str] | None = None


NAMED: dict[str, _Hub | Path] = {
    "mnist-mini": SHIPPED,
    "mnist": _Hub(repository="ylecun/mnist"),
    "wikitext-103-raw": _Hub(repository="Salesforce/wikitext", config="wikitext-103-raw-v1", format="wikitext-rows"),
    "wikitext-2-raw": _Hub(repository="Salesforce/wikitext", config="wikitext-2-raw-v1", format="wikitext-rows"),
    "wikitext-2": _Hub(repository="Salesforce/wikitext", config="wikitext-2-v1", format="wikitext-rows"),
    "imdb": _Hub(repository="stanfordnlp/imdb", marks={"train": "train", "test": "val"}),
    "imdb-unsupervised": _Hub(repository="stanfordnlp/imdb", marks={"unsupervised": "train", "test": "val"}),
    "c4": _Hub(repository="allenai/c4", config="en"),
}

_FORMATS: dict[str, Format] = {
    ".txt": "text", ".raw": "wikitext", ".tokens": "wikitext", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
_SAME = "same file"
"""Mark of a path that leads to a file which another path leads to: for no split."""
_HIDDEN, _DOTTED = re.compile(r"(^|/)[._]"), re.compile(r"(^|/)[.]")
_MARKS = {
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
    format: Format
    size: int
    """Bytes, as stored."""
    split: str = ""
    """"train", "val", or "hash": each document goes where its hash says."""
    labels_path: str | None = None
    """The labels that belong to an idx file of images."""

    @property
    def compressed(self) -> bool:
        return self.path.lower().endswith(".gz")


@dataclass(frozen=True, kw_only=True)
class Source:
    """All that a data set is made from."""

    files: tuple[InputFile, ...] = ()
    parts: tuple[ExamplePart, ...] = ()
    """Of sources that are code."""
    ignored: tuple[str, ...] = ()
    """Names of files that lie there and are not used (a test split beside a validation split, say)."""
    origin: dict[str, Any] | None = None
    """Name and revision on the hub."""

    @property
    def inputs(self) -> tuple[InputFile | ExamplePart, ...]:
        """Files and parts together."""
        return (*self.files, *self.parts)


@dataclass(frozen=True)
class _Found:
    file: InputFile
    mark: str | None
    """Split that the file's name tells: train, val, test, unsupervised, or None."""


def is_path(source: str) -> bool:
    """Whether a source means files, and not a named data set or a name on the hub."""
    return source not in NAMED and not source.startswith("hub:") and not is_code(source)


def is_shipped(source: str) -> bool:
    """Whether a source comes with the package."""
    return isinstance(NAMED.get(source), Path)


def source_label(source: str) -> str | None:
    """A source without its place on this machine: named data sets and hub names as they are, else "files:NAME" or "code:MODULE:NAME"."""
    if is_code(source):
        return f"code:{name_of(source)}"
    return f"files:{_short(source)}" if source and is_path(source) else source or None


def source_name(source: str) -> str:
    """What messages, metrics and folders call a source: of files their last part, of code module and name."""
    return re.sub("^(files|hub|code):", "", source_label(source) or "")


@dataclass(frozen=True)
class MixtureSource:
    """One of the sources of a mixture."""

    source: str
    name: str
    """What metrics call it, see `source_name`."""
    share: float
    """Its share of the rows of a batch."""


def mixture_sources(data: DataConfig) -> list[MixtureSource]:
    """The sources of `data.mixture`.

    Raises:
        UserError: an entry that is not SOURCE=WEIGHT, a weight that is not above 0, names that occur twice, or
            validation data for all of them.
    """
    if data.val_source:
        raise UserError("data.mixture and data.val_source are both given: a mixture's sources each have their own validation data")
    found = []
    for entry in data.mixture:
        source, equals, weight = entry.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not equals or not source or not 0 < value < float("inf"):
            raise UserError(f"data.mixture has {entry!r}, it must be SOURCE=WEIGHT with a weight above 0, such as c4=0.7")
        found.append((source, source_name(source), value))
    names = [name for _, name, _ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.mixture has two sources called {twice[0]}: give their folders different names")
    total = sum(value for _, _, value in found)
    if tiny := [name for _, name, value in found if value / total < SMALLEST_SHARE]:
        raise UserError(f"data.mixture gives {tiny[0]} less than {SMALLEST_SHARE:g} of the whole, the smallest share there is")
    return [MixtureSource(source, name, round(value / total, 6)) for source, name, value in found]


def _short(source: str) -> str:
    """The last part of a path; of a glob the last two."""
    parts = [part for part in re.split(r"[\\/]+", source.rstrip("/")) if part not in ("", ".", "..")]
    parts = parts or [Path(source).expanduser().resolve().name]
    return "/".join(parts[-2:] if _is_glob(parts[-1]) else parts[-1:])


def _is_glob(text: str) -> bool:
    return any(c in text for c in "*?[")


def resolve(data: DataConfig, kind: str) -> Source:
    """The files (or the parts of code) of an experiment's data and the split that each belongs to.

    Of a folder or glob, files with "train" in their name (or the names of folders in it) are for training and those
    with "valid", "validation", "val" or "dev" for validation, else those with "test" or "t10k"; without any "train"
    the unmarked ones are for training. Files marked "unsupervised" are what language models train on. Without
    validation files `val_fraction` of the documents is held out, and so where code yields no example for "val".

    Raises:
        UserError: no such data set or files, nothing of a format that `kind` can be made from, nothing to validate on,
            a file that is both for training and for validation.
    """
    train: list[InputFile | ExamplePart] = []
    val: list[InputFile | ExamplePart] = []
    ignored: list[str] = []
    origin = None
    if data.source:
        train, val, ignored, origin = _resolved(data.source, kind, "data.source")
        if not train:
            what = "examples" if is_code(data.source) else "files"
            raise UserError(f"data.source {data.source} has no {what} to train on, only {', '.join(f.name for f in val)}")
    if data.val_source:
        unmarked, marked, more, _ = _resolved(data.val_source, kind, "data.val_source")
        ignored += [f.name for f in val] + more + ([f.name for f in unmarked] if marked else [])
        val = marked or unmarked
    if not val and data.val_fraction <= 0:
        what = "examples for validation" if is_code(data.source) else "validation files"
        raise UserError(f"data.source {data.source} has no {what}: give them as data.val_source, or set data.val_fraction above 0")
    by_place = {real_place(f.path): f for f in train if isinstance(f, InputFile)}
    for file in val:
        if isinstance(file, InputFile) and (same := by_place.get(real_place(file.path))) is not None:
            raise UserError(same_file(same.name, file.name))
    inputs = [*(replace(f, split="train" if val else "hash") for f in train), *(replace(f, split="val") for f in val)]
    return Source(
        files=tuple(f for f in inputs if isinstance(f, InputFile)),
        parts=tuple(f for f in inputs if isinstance(f, ExamplePart)),
        ignored=tuple(sorted(ignored)),
        origin=origin,
    )


def _resolved(source: str, kind: str, field: str) -> tuple[list[Any], list[Any], list[str], dict[str, Any] | None]:
    """What there is for training, for validation, names of what is for neither, and where on the hub it comes from."""
    if is_code(source):
        if kind == ImageRows.kind:
            raise UserError(f"{field} {source} is code, but {kind} are made from {ImageRows.expected}: a task of your own can read arrays")
        return *find_parts(source, field), [], None
    found, origin = _find(source, kind, field)
    return *_assign(found, kind), origin


def same_file(train: str, val: str) -> str:
    """What is said of a file that is for training and for validation."""
    what = f"{train} is" if train == val else f"{train} and {val} hold the same, which is"
    return f"{what} both for training (data.source) and for validation (data.val_source): give validation files that are not trained on"


def real_place(path: str) -> str:
    """A path without links; a URI as it is."""
    return path if "://" in path else os.path.realpath(path)


def _assign(found: list[_Found], kind: str) -> tuple[list[InputFile], list[InputFile], list[str]]:
    """Files for training, files for validation, and names of those that are for neither."""
    by_mark: dict[str | None, list[InputFile]] = {}
    for item in found:
        by_mark.setdefault(item.mark, []).append(item.file)
    unsupervised = by_mark.get("unsupervised", []) if kind == "tokens" else []
    train = unsupervised or by_mark.get("train") or by_mark.get(None, [])
    val = by_mark.get("val") or by_mark.get("test", [])
    used = {f.path for f in (*train, *val)}
    return train, val, [item.file.name for item in found if item.file.path not in used]


def _find(source: str, kind: str, field: str) -> tuple[list[_Found], dict[str, Any] | None]:
    named = NAMED.get(source)
    if isinstance(named, Path):
        return _files(str(named), source, kind, field), None
    if named is not None:
        return _hub_files(named, source, kind)
    if source.startswith("hub:"):
        name, _, config = source.removeprefix("hub:").partition(":")
        return _hub_files(_Hub(repository=name, config=config or None), source, kind)
    root, pattern = _split_glob(source)
    return _files(source, _short(str(root)).rpartition("/")[2] if pattern else _short(source), kind, field), None


# ---------------------------------------------------------------------------------------------------------------- files


def _files(source: str, label: str, kind: str, field: str) -> list[_Found]:
    """The files of a path, folder or glob, sorted by name."""
    listed = _list(source, field)
    single = listed[0][1] == "" if len(listed) == 1 else False
    if single and _format(listed[0][0]) is None:
        raise UserError(f"{field} {source} is of no known format: {kind} are made from {KINDS[kind].expected}")
    result = []
    sizes = {path: size for path, _, size in listed}
    again = set() if single else _again(listed)
    for path, inner, size in listed:
        form = _format(path)
        if form not in KINDS[kind].formats or (form == "idx" and not _labels_paths(path)):
            continue
        labels = _labels_beside(path, None if single else sizes) if form == "idx" else None
        name = f"{label}/{inner}" if inner else label
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise UserError(f"{field} {source} has a file whose name is not UTF-8, {name!r}: rename it")
        file = InputFile(path=path, name=name, format=form, size=size, labels_path=labels)
        result.append(_Found(file, _SAME if path in again else None if single else _mark(inner)))
    if not result:
        raise UserError(f"{field} {source} holds nothing that {kind} are made from: {KINDS[kind].expected}")
    return result


def _again(listed: list[tuple[str, str, int]]) -> set[str]:
    """Paths that lead by links to a file that another path leads to, for the same split: all but one of each file's paths."""
    groups: dict[tuple[str, str | None], list[tuple[bool, str]]] = {}
    for path, inner, _ in listed:
        real = real_place(path)
        groups.setdefault((real, _mark(inner)), []).append((not real.endswith(f"/{inner}"), path))
    return {path for group in groups.values() for _, path in sorted(group)[1:]}


def _list(source: str, field: str) -> list[tuple[str, str, int]]:
    """(path, path inside the source, size) of all files, sorted; a single file has no path inside."""
    root, pattern = _split_glob(source)
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
    filesystem, path = open_folder(source)
    prefix = source.partition("://")[0] + "://" if "://" in source else ""
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        near = difflib.get_close_matches(source, NAMED, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"{field} {source} does not exist: it is no file, folder or glob, and no named data set ({', '.join(NAMED)}){hint}")
    if info.type == pafs.FileType.File:
        return [(prefix + path, "", info.size)]
    if not prefix:
        visible = sorted(_walk(path, f"{field} {source}"))
    else:
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        inner = {i.path: i.path[len(path) :].strip("/") for i in infos if i.type == pafs.FileType.File}
        visible = sorted((prefix + i.path, inner[i.path], i.size) for i in infos if i.path in inner and not _HIDDEN.search(inner[i.path]))
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
    """The files of a local folder and the folders in it, as `_list` has them. Links are followed.

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
            key = (info.st_dev, info.st_ino, _mark(inside))
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
                elif entry.is_symlink() and _format(entry.name) is not None:
                    raise UserError(f"{what} has {inner}, a link to a file that does not exist: remove it")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.filename} ({error.strerror})") from None


def _split_glob(source: str) -> tuple[Path, str]:
    """The folder that a glob starts in, and the rest of it; "" where the source is no glob, or a file with such a name."""
    path = Path(source).expanduser()
    if "://" in source or not _is_glob(source) or path.exists():
        return path, ""
    root = Path(path.anchor)
    parts = list(path.parts[1:] if path.anchor else path.parts)
    while parts and (not _is_glob(parts[0]) or (root / parts[0]).exists()):
        root /= parts.pop(0)
    return root, "/".join(parts)


def _format(path: str) -> Format | None:
    name = path.rpartition("/")[2].lower()
    bare = name.removesuffix(".gz")
    if re.search(r"idx[13]-ubyte$|\.idx[13]?$|^(train|t10k)-(images|labels)", bare):
        return "idx"
    form = _FORMATS.get(Path(bare).suffix)
    return None if form == "parquet" and bare != name else form


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


def _mark(inner: str) -> str | None:
    """The split that a path tells, the innermost name first."""
    for part in reversed(inner.lower().split("/")):
        for word in re.split(r"[^a-z0-9]+", part):
            if word in _MARKS:
                return _MARKS[word]
    return None


# ------------------------------------------------------------------------------------------------------------------ hub


def _hub_files(hub: _Hub, source: str, kind: str) -> tuple[list[_Found], dict[str, Any]]:
    """The files of a data set on the hub, as its `datasets` configuration lists them. They are read where they lie."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(hub.repository, hub.config)
        listed = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data set {hub.repository} could not be found on the hub ({reason}): without a network give local files, "
            "--data.source PATH (docs/data.md has their formats)"
        ) from error
    if not listed:
        raise UserError(f"data set {hub.repository} has no files that can be read without its own code: give local files")
    result, revisions = [], set()
    for split, paths in listed.items():
        for path in paths:
            form = hub.format or _format(path)
            if form not in KINDS[kind].formats:
                raise UserError(f"data set {hub.repository} has {path}: {kind} are made from {KINDS[kind].expected}")
            name = re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", path)
            revisions.update(re.findall(r"^hf://datasets/[^@]+@([^/]+)/", path))
            mark = (hub.marks or {}).get(split, "skip") if hub.marks else _MARKS.get(split.lower(), split)
            inner = name if name != path else Path(path).name
            file = InputFile(path=path, name=f"{source}/{inner}", format=form, size=_size(path))
            result.append(_Found(file, mark))
    return result, {"hub": hub.repository, "config": hub.config, "revision": ",".join(sorted(revisions)) or None}


def _size(path: str) -> int:
    filesystem, inner = open_folder(path)
    return filesystem.get_file_info(inner).size
