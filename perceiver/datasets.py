"""From an experiment to its prepared data set: what determines it, where it lies, whether it fits, and the command that makes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Generic, TypeVar, cast

import pyarrow.fs as pafs

from perceiver.config import DataConfig, Experiment, UserError, differences, digest, flatten, to_dict
from perceiver.data.components import Component, components
from perceiver.data.examples import is_code
from perceiver.data.manifest import MANIFEST, DamagedData, Manifest
from perceiver.data.rows import KINDS
from perceiver.data.shards import broken_files, read_block
from perceiver.data.sources import is_path, is_shipped, mixture_sources, resolve
from perceiver.data.storage import list_folder, open_folder
from perceiver.data.tokenizers import kept_file, tokenizer_is_there
from perceiver.data_settings import DataSpec, prepare_settings, settings_without_tokenizer, task_kind
from perceiver.experiments import command_words

_READING_ONLY = ("shuffle_window_blocks", "lanes", "balance")
"""Fields of the data's configuration that preparation does not depend on."""

S = TypeVar("S", bound=DataSpec)


class NotPrepared(UserError):
    """Data that has to be prepared, or again: the message has the command that does it."""

    def __init__(self, before: str, command: str, after: str = "") -> None:
        super().__init__(f"{before}: run `{command}`{after}")
        self.before, self.after = before, after

    def by(self, command: str) -> NotPrepared:
        """The same with another command, such as one in the user's own words."""
        return NotPrepared(self.before, command, self.after)


@dataclass(frozen=True)
class Dataset(Generic[S]):
    """The prepared data of an experiment, or of an `OtherData`."""

    experiment: S
    """With a tokenizer that is there (`with_tokenizer`)."""
    folder: str
    manifest: Manifest

    @classmethod
    def find(cls, experiment: S) -> Dataset[S]:
        """The data that was prepared for an experiment.

        Raises:
            UserError: it is not prepared (then the sentence has the command that does it, or why that cannot be done), was
                prepared with other settings (and which), or does not fit the model.
        """
        experiment = with_tokenizer(experiment)
        settings = prepare_settings(experiment)
        folder = _folder(experiment, settings)
        if MANIFEST not in list_folder(folder):
            check_sources(experiment)
            raise _not_prepared(experiment, settings)
        try:
            manifest = Manifest.load(folder)
        except DamagedData as error:
            raise NotPrepared(str(error), preprocess_command(experiment)) from None
        if broken := broken_files(folder, manifest):
            raise NotPrepared(f"{folder}/{broken[0]} is missing or damaged", preprocess_command(experiment))
        check_fits(experiment, manifest)
        return cls(experiment, folder, manifest)

    @classmethod
    def find_early(cls, experiment: S) -> Dataset[S] | None:
        """The same before anything is held; None where the job itself prepares it, at once: shipped data, text that is streamed, and,
        where they are not prepared yet, what a function of the user's makes and arrays, pictures and texts with classes in files.

        Raises:
            UserError: see `find`.
        """
        at_once = is_shipped(experiment.data.source) or experiment.data.prepare == "stream"
        source, rows = experiment.data.source, KINDS.get(experiment.task.kind)
        readable = is_code(source) or (rows is not None and rows.prepared_by_training and is_path(source))
        if not at_once and not experiment.data.mixture and readable:
            at_once = MANIFEST not in list_folder(data_folder(experiment))
        if not at_once:
            return cls.find(experiment)
        check_sources(experiment)
        return None

    @classmethod
    def find_prepared(cls, experiment: S) -> Dataset[S] | None:
        """The same where it is prepared, whoever does that; else None."""
        return cls.find(experiment) if MANIFEST in list_folder(data_folder(experiment)) else None

    @property
    def parts(self) -> list[Component]:
        """The data sets of a mixture; of other prepared data itself alone."""
        return components(self.folder, self.manifest)

    def measured(self: Dataset[Experiment]) -> Experiment:
        """The experiment with what its task measures of the training split.

        Raises:
            DamagedData: a shard is missing, or not as it was written.
        """
        experiment = self.experiment
        if not experiment.task.measured:
            return experiment
        task = experiment.task.counted(train_counts([part.manifest for part in self.parts]))
        splits = [(part.folder, part.manifest.splits["train"]) for part in self.parts]
        blocks = (read_block(folder, split, block) for folder, split in splits for block in range(split.num_blocks))
        return replace(experiment, task=task.measure(experiment.model, blocks))


def train_counts(manifests: Sequence[Manifest]) -> list[int]:
    """How often each class occurs in the training splits together; empty where rows have none."""
    found = [manifest.stats.get("labels", {}).get("train", []) for manifest in manifests]
    return [sum(column) for column in zip_longest(*found, fillvalue=0)]


def check_sources(experiment: DataSpec) -> None:
    """Looks whether the local files of an experiment's data are there, and are what its task is made from.

    Raises:
        UserError: the first source that is not.
    """
    data, kind = experiment.data, task_kind(experiment)
    alone = [replace(data, source=part.source, mixture=()) for part in mixture_sources(data)] if data.mixture else [data]
    for part in alone:
        if all("://" not in source and is_path(source) for source in (part.source, part.val_source) if source):
            resolve(part, kind)


def _not_prepared(experiment: DataSpec, settings: dict[str, Any]) -> NotPrepared:
    others = [
        f"{name} ({'; '.join(differences(flatten(other.settings), flatten(settings)))})" for name, other in _others(experiment, settings)
    ]
    after = f" (prepared with other settings: {', '.join(others)})" if others else ""
    return NotPrepared(f"data of {experiment.preset} is not prepared", preprocess_command(experiment), after)


def needs_tokenizer(spec: DataSpec) -> bool:
    """Whether the experiment's data is made from text, or has some."""
    kind = KINDS.get(spec.task.kind)
    return kind is not None and kind.is_text or spec.model.num_text_ids() is not None


def with_tokenizer(experiment: S) -> S:
    """The experiment with a tokenizer that is there: its own, else the copy in the one data set prepared for it.

    So a prepared data set is enough to train on another machine. Without any, the experiment as it is.

    Raises:
        UserError: its own is not there, and several prepared data sets differ in nothing but the tokenizer.
    """
    data = experiment.data
    if not needs_tokenizer(experiment) or tokenizer_is_there(data.tokenizer):
        return experiment
    settings = settings_without_tokenizer(experiment)
    found = []
    for name, other in _others(experiment, settings):
        folder = f"{data.root_path.rstrip('/')}/{name}"
        kept = kept_file(list_folder(folder))
        if kept is not None and {**other.settings, "tokenizer": None} == {**settings, "tokenizer": None}:
            found.append(f"{folder}/{kept}")
    if len(found) > 1:
        raise UserError(
            f"data.tokenizer is {data.tokenizer}, which is not there, and data was prepared with {len(found)} others: give "
            f"--data.tokenizer {' or '.join(found)}"
        )
    return _with_data(experiment, replace(data, tokenizer=found[0])) if found else experiment


def with_prepared_tokenizer(experiment: S, folder: str, manifest: Manifest) -> S:
    """The experiment with the copy of its tokenizer that lies beside its shards, where all workers read."""
    if (manifest.tokenizer or {}).get("sha256") is None:
        return experiment
    return _with_data(experiment, replace(experiment.data, tokenizer=f"{folder}/{kept_file(list_folder(folder))}"))


def _with_data(experiment: S, data: DataConfig) -> S:
    return cast(S, replace(cast(Any, experiment), data=data))


def data_folder(experiment: DataSpec) -> str:
    """Where the experiment's prepared data lies: its name holds the source, the kind, and a hash of the settings."""
    return _folder(experiment, prepare_settings(experiment))


def _folder(experiment: DataSpec, settings: dict[str, Any]) -> str:
    return f"{experiment.data.root_path.rstrip('/')}/{_slug(settings)}-{digest(settings, 8)}"


def _slug(settings: dict[str, Any]) -> str:
    name = (settings["source"] or settings["val_source"] or "mixture").removeprefix("files:").removeprefix("hub:").removeprefix("code:")
    name = re.sub(r"\.(gz|bz2|zst|txt|raw|tokens|jsonl|json|csv|tsv|arrow|parquet)\b", "", name)
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or 'data'}-{settings['kind']}"


def _others(experiment: DataSpec, settings: dict[str, Any]) -> list[tuple[str, Manifest]]:
    """Data sets of the same source and kind that were prepared with other settings."""
    filesystem, root = open_folder(experiment.data.root_path)
    infos = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    pattern = re.compile(re.escape(_slug(settings)) + "-[0-9a-f]{8}")
    names = sorted(info.base_name for info in infos if pattern.fullmatch(info.base_name))
    found = []
    for name in names:
        try:
            found.append((name, Manifest.load(f"{experiment.data.root_path.rstrip('/')}/{name}")))
        except UserError:  # not finished, or of another version of the format: nothing to compare
            continue
    return found


def check_fits(experiment: DataSpec, manifest: Manifest) -> None:
    """Whether prepared data suits the experiment's model.

    Raises:
        UserError: images of another shape, or more classes than the model has.
    """
    classes = experiment.model.number_of_classes()
    if manifest.num_classes is not None and classes is not None and manifest.num_classes > classes:
        raise UserError(f"the data has labels up to {manifest.num_classes - 1}, but model.output.num_classes is {classes}")
    if manifest.image_shape is not None:
        check_image_shape(experiment, manifest.image_shape)


def check_image_shape(experiment: DataSpec, image_shape: tuple[int, int, int]) -> None:
    """Whether images of this shape (height, width, channels) are what the task and its model take.

    Raises:
        UserError: they are not.
    """
    experiment.task.check_images(experiment.model, image_shape)


def preprocess_command(experiment: DataSpec) -> str:
    """The command that prepares the experiment's data, with what differs from what it started from."""

    def matters(name: str) -> bool:
        section, _, field = name.partition(".")
        stream = experiment.data.prepare == "stream" and field == "shuffle_window_blocks"
        return stream or not (section == "data" and field in _READING_ONLY)

    sections = {name: to_dict(getattr(experiment, name)) for name in ("task", "model", "data")}
    return shlex.join(["perceiver", "preprocess", *command_words(experiment.preset, sections, matters)])
