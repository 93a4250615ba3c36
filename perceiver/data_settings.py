"""What of an experiment determines the content of a prepared data set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.data.examples import is_code
from perceiver.data.order import STREAM_BLOCKS
from perceiver.data.rows import KINDS, ArrayRows
from perceiver.data.sources import mixture_sources, source_label
from perceiver.data.tokenizers import tokenizer_of


class DataSpec(Protocol):
    """What a prepared data set follows from: an `Experiment`, or `OtherData`."""

    @property
    def preset(self) -> str:
        """What the experiment is called in messages and commands."""
        ...

    @property
    def task(self) -> TaskConfig:
        """The task that reads it."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The task's model."""
        ...

    @property
    def data(self) -> DataConfig:
        """Where it comes from, and how it is prepared."""
        ...


@dataclass(frozen=True, kw_only=True)
class OtherData:
    """Data for an experiment's task and model that are not the experiment's own: one source of its mixture, files to evaluate it on."""

    preset: str
    task: TaskConfig
    model: ModelConfig
    data: DataConfig

    @classmethod
    def of(cls, spec: DataSpec, data: DataConfig) -> OtherData:
        """For the task and model of an experiment."""
        return cls(preset=spec.preset, task=spec.task, model=spec.model, data=data)


def task_kind(spec: DataSpec) -> str:
    """Which kind of rows the experiment's task reads.

    Raises:
        UserError: data for this task cannot be prepared.
    """
    kind = spec.task.kind
    task = type(spec.task).__name__
    if not kind:
        raise UserError(f"{spec.preset}: data for {task.removesuffix('Config')} cannot be prepared yet")
    if kind not in KINDS:
        raise UserError(f"{task}.kind is {kind!r} and must be one of {', '.join(KINDS)}")
    return kind


def array_rows(spec: DataSpec) -> ArrayRows:
    """The columns that a task of arrays reads.

    Raises:
        UserError: the task names none.
    """
    rows = spec.task.rows(spec.model, spec.data)
    if not isinstance(rows, ArrayRows):
        method = f"{type(spec.task).__name__}.rows(model, data)"
        raise UserError(f"{method} returns {'nothing' if rows is None else f'a {type(rows).__name__}'} and must return ArrayRows(...)")
    return rows


def text_limits(spec: DataSpec) -> tuple[int, int]:
    """Longest input in tokens and number of ids of the experiment's text model.

    Raises:
        UserError: the model does not read text.
    """
    limits = spec.model.text_limits()
    if limits is None:
        raise UserError(f"{spec.preset}: the task reads text, but the model ({type(spec.model).__name__}) does not")
    return limits


def prepare_settings(spec: DataSpec) -> dict[str, Any]:
    """What determines the content of the experiment's data set, apart from the input files' content.

    Raises:
        UserError: the task's data cannot be prepared, the tokenizer's file is missing, or it has more ids than the
            model.
    """
    settings = settings_without_tokenizer(spec)
    if not KINDS[settings["kind"]].is_text:
        return settings
    name, (_, vocab_size) = spec.data.tokenizer, text_limits(spec)
    tokenizer = tokenizer_of(spec.data)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"data.tokenizer {name} has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}")
    return settings | {"tokenizer": tokenizer.fingerprint}


def settings_without_tokenizer(spec: DataSpec) -> dict[str, Any]:
    """`prepare_settings` without the tokenizer."""
    data, kind = spec.data, task_kind(spec)
    if not data.source and not data.val_source and not data.mixture:
        raise UserError(f"{spec.preset}: data.source is empty: name a data set or your own files (see docs/data.md)")
    if data.rows_per_block < 1 or data.blocks_per_shard < 1:
        raise UserError("data.rows-per-block and data.blocks-per-shard must be at least 1")
    if not 0 <= data.val_fraction < 1:
        raise UserError(f"data.val-fraction is {data.val_fraction}, it must be at least 0 and below 1")
    settings: dict[str, Any] = {
        "kind": kind,
        "source": None if data.mixture else source_label(data.source),
        "val_source": source_label(data.val_source) if data.val_source else None,
        "val_fraction": None if data.val_source else data.val_fraction,
        "rows_per_block": data.rows_per_block,
        "blocks_per_shard": data.blocks_per_shard,
    }
    if data.mixture:
        settings["mixture"] = {part.name: part.share for part in mixture_sources(data)}
    if data.prepare == "stream" and not KINDS[kind].can_stream:
        raise UserError("data.prepare is stream, which language models alone can read: leave it out")
    if data.prepare == "stream" and (is_code(data.source) or any(is_code(entry.rpartition("=")[0]) for entry in data.mixture)):
        raise UserError("data.prepare is stream, which reads files alone: leave it out for a data.source that is code")
    if data.duplicates != "keep":
        if data.prepare == "stream":
            raise UserError(f"--data.duplicates is {data.duplicates}, and --data.prepare stream does not look for any: leave one out")
        settings |= {"duplicates": data.duplicates}
    settings |= _held_out_settings(data, kind)
    if KINDS[kind].has_labels:
        settings |= _label_settings(spec)
    settings |= spec.task.prepared_settings(spec.model)
    if KINDS[kind].has_columns:
        return settings | {"columns": array_rows(spec).to_json()} | _encoding(data) | _tokenizer_beside(spec)
    if not KINDS[kind].is_text and not KINDS[kind].is_stream:
        return settings
    max_seq_len, vocab_size = text_limits(spec)
    if (needed := KINDS[kind].num_ids) is not None and vocab_size <= needed:
        raise UserError(f"model.vocab-size is {vocab_size} and must be at least {needed + 1}: {needed} {kind} and one id for padding")
    least, why = KINDS[kind].least_length
    if max_seq_len < least:
        section = "model.input" if hasattr(spec.model, "input") else "model"
        raise UserError(f"{section}.max-seq-len is {max_seq_len} and must be at least {least}: {why}")
    if not KINDS[kind].is_text:
        return settings | {"row_length": max_seq_len}
    settings |= {"text_column": data.text_column}
    if data.special_tokens != "text":
        settings |= {"special_tokens": data.special_tokens}
    settings |= _encoding(data)
    if KINDS[kind].has_labels:
        if data.long_texts != "cut":  # the usual way has no mark in the settings: it is older than the others
            settings |= {"long_texts": data.long_texts}
        if data.long_texts == "stride":
            row_length = max_seq_len - KINDS[kind].added_ids
            if (stride := data.text_stride or max(1, row_length // 2)) > row_length:
                raise UserError(
                    f"--data.text-stride is {stride} and must be at most {row_length}, the tokens of a text that the model takes: what "
                    "lies between two parts would be lost"
                )
            settings |= {"text_stride": stride}
        return settings | {"label_column": data.label_column, "row_length": max_seq_len - KINDS[kind].added_ids}
    if data.prepare == "stream":
        settings |= {"prepare": "stream", "most_rows_per_chunk": data.rows_per_block * (data.shuffle_window_blocks or STREAM_BLOCKS)}
    return settings | {"row_length": max_seq_len, "document_marks": spec.task.document_marks}


def _tokenizer_beside(spec: DataSpec) -> dict[str, Any]:
    """The tokenizer of texts that stand beside other inputs, whose file lies with the data; nothing of bytes, which have none."""
    num_ids, data = spec.model.num_text_ids(), spec.data
    if num_ids is None:
        return {}
    fingerprint = tokenizer_of(data).fingerprint
    if fingerprint["vocab_size"] > num_ids:
        raise UserError(f"data.tokenizer {data.tokenizer} has {fingerprint['vocab_size']} ids, but the model's vocab_size is {num_ids}")
    return {} if fingerprint["sha256"] is None else {"tokenizer": fingerprint}


def _encoding(data: DataConfig) -> dict[str, Any]:
    return {} if data.encoding.lower() in ("utf-8", "utf8") else {"encoding": data.encoding}


def _held_out_settings(data: DataConfig, kind: str) -> dict[str, Any]:
    """How validation is held out, as far as that is not the usual way (which the same settings stood for before there was another)."""
    if data.val_source:
        return {}
    found: dict[str, Any] = {name: value for name in ("group_column", "time_column") if (value := getattr(data, name)) is not None}
    if found and data.prepare == "stream":
        ((name, value),) = found.items()
        raise UserError(
            f"--data.{name.replace('_', '-')} is {value}, and --data.prepare stream reads no columns but the text: leave one out"
        )
    if data.val_fold is not None:
        found["val_fold"] = data.val_fold
    return found if data.stratify or not KINDS[kind].has_labels else {**found, "stratify": False}


def _label_settings(spec: DataSpec) -> dict[str, Any]:
    """What labels and pictures become, as far as it is not what it always was."""
    task: Any = spec.task
    found: dict[str, Any] = {}
    usual = next((field.default for field in fields(task) if field.name == "class_names"), None)
    if (names := getattr(task, "class_names", None)) and names != usual:
        found["class_names"] = list(names)
    if left_out := getattr(task, "leave_out", ()):
        found["leave_out"] = sorted(left_out)
    if KINDS[spec.task.kind].new_rows not in ("image", "audio"):
        return found
    if spec.data.label_column != "label":
        found["label_column"] = spec.data.label_column
    if spec.data.image_size is not None:
        found |= {"image_size": spec.data.image_size, "channels": _channels(spec)}
    return found


def _channels(spec: DataSpec) -> int:
    shape = spec.model.picture_shape()
    return 3 if shape is None else shape[-1]


def stored_shape(spec: DataSpec, first: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape that pictures are stored with, of which the first is as given."""
    size, channels = spec.data.image_size, _channels(spec)
    if size is not None:
        return size, size, channels
    return first if first[2] == 3 else (*first[:2], max(channels, 1))
