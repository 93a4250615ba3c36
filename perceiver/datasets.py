"""From an experiment to its prepared data set: what determines it, where it lies, whether it fits, and the command that makes it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Generic, TypeVar, cast

from perceiver.config import DataConfig, Experiment, UserError, differences, flatten, to_dict
from perceiver.data.components import Component, components
from perceiver.data.examples import is_code
from perceiver.data.manifest import DamagedData, Manifest
from perceiver.data.rows import KINDS
from perceiver.data.shards import broken_files, read_block
from perceiver.data.sources import is_path, is_shipped, mixture_sources, resolve
from perceiver.data.storage import check_store, list_folder
from perceiver.data.tokenizers import kept_file, tokenizer_is_there
from perceiver.data_settings import DataSpec, prepare_settings, settings_without_tokenizer, task_kind
from perceiver.experiments import command_words
from perceiver.prepared_folders import find_folder, others_of_the_name, plain_folder, prepared, what_changed

logger = logging.getLogger(__name__)

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
    def find(cls, experiment: S, digest: str | None = None) -> Dataset[S]:
        """The data that was prepared for an experiment.

        Args:
            digest: of the data that is meant where it is there, whatever the source is now: that which a run was trained on.

        Raises:
            UserError: it is not prepared (then the sentence has the command that does it, or why that cannot be done), was
                prepared with other settings (and which), or does not fit the model.
        """
        experiment = with_tokenizer(experiment)
        settings = prepare_settings(experiment)
        folder = find_folder(experiment, settings, digest)
        if folder is None:
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
    def find_early(cls, experiment: S, digest: str | None = None) -> Dataset[S] | None:
        """The same before anything is held; None where the job itself prepares it, at once: shipped data, text that is streamed, and,
        where they are not prepared yet, what a function of the user's makes and arrays, pictures and texts with classes in files.

        Args:
            digest: see `find`.

        Raises:
            UserError: see `find`.
        """
        at_once = is_shipped(experiment.data.source) or experiment.data.prepare == "stream"
        source, rows = experiment.data.source, KINDS.get(experiment.task.kind)
        readable = is_code(source) or (rows is not None and rows.prepared_by_training and is_path(source))
        if not at_once and not experiment.data.mixture and readable:
            spec = with_tokenizer(experiment)
            at_once = find_folder(spec, prepare_settings(spec), digest) is None
        if not at_once:
            return cls.find(experiment, digest)
        check_sources(experiment)
        return None

    @classmethod
    def find_prepared(cls, experiment: S, digest: str | None = None) -> Dataset[S] | None:
        """The same where it is prepared, whoever does that; else None."""
        spec = with_tokenizer(experiment)
        return cls.find(spec, digest) if find_folder(spec, prepare_settings(spec), digest) is not None else None

    def warn_of_changes(self) -> None:
        """Says so where the source is not any more what the data was prepared from, which is used nevertheless."""
        if sentence := what_changed(self.experiment, self.folder, self.manifest):
            logger.warning(f"{sentence}: the training continues with what it was prepared from")

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
    """Looks whether the local files of an experiment's data are there, and are what its task is made from; of others, whether their object
    store can be reached.

    Raises:
        UserError: the first source that is not.
    """
    data, kind = experiment.data, task_kind(experiment)
    alone = [replace(data, source=part.source, mixture=()) for part in mixture_sources(data)] if data.mixture else [data]
    for part in alone:
        sources = [source for source in (part.source, part.val_source) if source]
        for source in sources:
            if "://" in source:
                check_store(source)
        if all("://" not in source and is_path(source) for source in sources):
            resolve(part, kind)


def _not_prepared(experiment: DataSpec, settings: dict[str, Any]) -> NotPrepared:
    others = [
        f"{name} ({'; '.join(differences(flatten(other.settings), flatten(settings)))})" for name, other in _others(experiment, settings)
    ]
    after = f" (prepared with other settings: {', '.join(others)})" if others else ""
    after += "".join(f" ({other})" for other in others_of_the_name(experiment, settings))
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
    by_content: dict[str, str] = {}
    for name, other in _others(experiment, settings):
        folder = f"{data.root_path.rstrip('/')}/{name}"
        kept = kept_file(list_folder(folder))
        if kept is not None and {**other.settings, "tokenizer": None} == {**settings, "tokenizer": None}:
            by_content.setdefault(str(other.settings["tokenizer"]), f"{folder}/{kept}")
    found = list(by_content.values())
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
    """Where the experiment's prepared data lies: its name holds the source, the kind, and a hash of the settings (and one of the source's
    content, where other content has that name already). Where it is not prepared yet: the name without.
    """
    settings = prepare_settings(experiment)
    return find_folder(experiment, settings) or plain_folder(experiment.data, settings)


def _others(experiment: DataSpec, settings: dict[str, Any]) -> list[tuple[str, Manifest]]:
    """Data sets of the same source and kind that were prepared with other settings."""
    found = [(each.folder, each.manifest) for each in prepared(experiment.data, settings, others=True)]
    return [(folder.rpartition("/")[2], manifest) for folder, manifest in found if manifest is not None and manifest.settings != settings]


def check_fits(experiment: DataSpec, manifest: Manifest) -> None:
    """Whether prepared data suits the experiment's model.

    Raises:
        UserError: images of another shape, or more classes than the model has.
    """
    classes = experiment.model.number_of_classes()
    if manifest.num_classes is not None and classes is not None and manifest.num_classes > classes:
        raise UserError(f"the data has labels up to {manifest.num_classes - 1}, but model.output.num-classes is {classes}")
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
