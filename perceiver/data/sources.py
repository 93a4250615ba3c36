"""Where data comes from: named data sets, names on the hub, a user's own files or functions. Finds files and splits; reads none."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perceiver.config import DataConfig, UserError
from perceiver.data.examples import ExamplePart, find_parts, is_code, name_of
from perceiver.data.files import MARKS, UNCUT, Format, Found, InputFile, files_of, format_of, is_glob, list_files, real_place, split_glob
from perceiver.data.hub import why_unreachable
from perceiver.data.picture_folders import picture_folder
from perceiver.data.read_tables import is_json_array
from perceiver.data.rows import KINDS
from perceiver.data.sound_folders import sound_folder
from perceiver.data.storage import open_folder
from perceiver.data.times import together_by

_UTF_8 = ("utf-8", "utf8")
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
    "imagenet": _Hub(repository="ILSVRC/imagenet-1k", marks={"train": "train", "validation": "val"}),
    "wikitext-103-raw": _Hub(repository="Salesforce/wikitext", config="wikitext-103-raw-v1", format="wikitext-rows"),
    "wikitext-2-raw": _Hub(repository="Salesforce/wikitext", config="wikitext-2-raw-v1", format="wikitext-rows"),
    "wikitext-2": _Hub(repository="Salesforce/wikitext", config="wikitext-2-v1", format="wikitext-rows"),
    "imdb": _Hub(repository="stanfordnlp/imdb", marks={"train": "train", "test": "val"}),
    "imdb-unsupervised": _Hub(repository="stanfordnlp/imdb", marks={"unsupervised": "train", "test": "val"}),
    "c4": _Hub(repository="allenai/c4", config="en"),
}


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
        raise UserError("data.mixture and data.val-source are both given: a mixture's sources each have their own validation data")
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
    return "/".join(parts[-2:] if is_glob(parts[-1]) else parts[-1:])


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
    data.check_encoding()
    train: list[InputFile | ExamplePart] = []
    val: list[InputFile | ExamplePart] = []
    ignored: list[str] = []
    origin = None
    if data.source:
        train, val, ignored, origin = _resolved(data.source, kind, "data.source", data)
        if not train:
            what = "examples" if is_code(data.source) else "files"
            raise UserError(f"data.source {data.source} has no {what} to train on, only {', '.join(f.name for f in val)}")
    if data.val_source:
        unmarked, marked, more, _ = _resolved(data.val_source, kind, "data.val-source", data)
        ignored += [f.name for f in val] + more + ([f.name for f in unmarked] if marked else [])
        val = marked or unmarked
    if not val and data.val_fraction <= 0:
        what = "examples for validation" if is_code(data.source) else "validation files"
        raise UserError(f"data.source {data.source} has no {what}: give them as data.val-source, or set data.val-fraction above 0")
    by_place = {real_place(f.path): f for f in train if isinstance(f, InputFile)}
    for file in val:
        if isinstance(file, InputFile) and (same := by_place.get(real_place(file.path))) is not None:
            raise UserError(same_file(same.name, file.name))
    inputs = [*(replace(f, split="train" if val else "hash") for f in train), *(replace(f, split="val") for f in val)]
    if KINDS[kind].new_rows not in ("image", "audio"):
        inputs = [_encoded(f, data) for f in inputs]
    return Source(
        files=tuple(f for f in inputs if isinstance(f, InputFile)),
        parts=tuple(f for f in inputs if isinstance(f, ExamplePart)),
        ignored=tuple(sorted(ignored)),
        origin=origin,
    )


def _encoded(file: InputFile | ExamplePart, data: DataConfig) -> InputFile | ExamplePart:
    """A file with its encoding.

    Raises:
        UserError: the text is to be streamed, and the file has none whose middle can be found.
    """
    if isinstance(file, ExamplePart):
        return file
    if data.prepare == "stream" and (file.format in UNCUT or is_json_array(file)):
        raise UserError(f"--data.prepare is stream, and {file.name} can only be read from its beginning: leave it out")
    if data.prepare == "stream" and data.encoding.lower() not in _UTF_8:
        raise UserError(f"--data.prepare is stream, which reads UTF-8 alone, and --data.encoding is {data.encoding}: leave one of them out")
    text = file.format in ("text", "wikitext", "jsonl", "csv")
    return replace(file, encoding=data.encoding) if text and data.encoding.lower() not in _UTF_8 else file


def _resolved(source: str, kind: str, field: str, data: DataConfig) -> tuple[list[Any], list[Any], list[str], dict[str, Any] | None]:
    """What there is for training, for validation, names of what is for neither, and where on the hub it comes from."""
    if is_code(source):
        if not KINDS[kind].takes_code:
            raise UserError(
                f"{field} {source} is code, but {kind} are made from {KINDS[kind].expected}: a task of your own can read arrays"
            )
        return *find_parts(source, field), [], None
    found, origin = _find(source, kind, field, data)
    return *_assign(found, kind), origin


def same_file(train: str, val: str) -> str:
    """What is said of a file that is for training and for validation."""
    what = f"{train} is" if train == val else f"{train} and {val} hold the same, which is"
    return f"{what} both for training (data.source) and for validation (data.val-source): give validation files that are not trained on"


def _assign(found: list[Found], kind: str) -> tuple[list[InputFile], list[InputFile], list[str]]:
    """Files for training, files for validation, and names of those that are for neither."""
    by_mark: dict[str | None, list[InputFile]] = {}
    for item in found:
        by_mark.setdefault(item.mark, []).append(item.file)
    unsupervised = by_mark.get("unsupervised", []) if KINDS[kind].takes_unlabelled else []
    train = unsupervised or by_mark.get("train") or by_mark.get(None, [])
    val = by_mark.get("val") or by_mark.get("test", [])
    used = {f.path for f in (*train, *val)}
    return train, val, [item.file.name for item in found if item.file.path not in used]


def _find(source: str, kind: str, field: str, data: DataConfig) -> tuple[list[Found], dict[str, Any] | None]:
    named = NAMED.get(source)
    if isinstance(named, Path):
        return files_of(str(named), source, kind, field, NAMED), None
    if named is not None:
        return _hub_files(named, source, kind)
    if source.startswith("hub:"):
        name, _, config = source.removeprefix("hub:").partition(":")
        return _hub_files(_Hub(repository=name, config=config or None), source, kind)
    root, pattern = split_glob(source)
    label = _short(str(root)).rpartition("/")[2] if pattern else _short(source)
    together = KINDS[kind].found(list_files(source, field, NAMED), label, f"{field} {source}")
    if together is not None:
        return together, None
    if KINDS[kind].new_rows == "image":
        pictures = picture_folder(list_files(source, field, NAMED), label, f"{field} {source}", data.label_column, together_by(data))
        if pictures:
            return pictures, None
    if KINDS[kind].new_rows == "audio":
        listed = list_files(source, field, NAMED)
        return sound_folder(listed, label, f"{field} {source}", data.label_column, together_by(data), data.val_fold), None
    return files_of(source, label, kind, field, NAMED), None


def _hub_files(hub: _Hub, source: str, kind: str) -> tuple[list[Found], dict[str, Any]]:
    """The files of a data set on the hub, as its `datasets` configuration lists them. They are read where they lie."""
    import datasets

    try:
        if not Path(hub.repository).exists() and (reason := why_unreachable()):
            raise OSError(reason)
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
            form = hub.format or format_of(path)
            if form not in KINDS[kind].formats:
                raise UserError(f"data set {hub.repository} has {path}: {kind} are made from {KINDS[kind].expected}")
            name = re.sub(r"^hf://datasets/[^@]+@[^/]+/", "", path)
            revisions.update(re.findall(r"^hf://datasets/[^@]+@([^/]+)/", path))
            mark = (hub.marks or {}).get(split, "skip") if hub.marks else MARKS.get(split.lower(), split)
            inner = name if name != path else Path(path).name
            file = InputFile(path=path, name=f"{source}/{inner}", format=form, size=_size(path))
            result.append(Found(file, mark))
    return result, {"hub": hub.repository, "config": hub.config, "revision": ",".join(sorted(revisions)) or None}


def _size(path: str) -> int:
    filesystem, inner = open_folder(path)
    return filesystem.get_file_info(inner).size
