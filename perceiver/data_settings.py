"""What of an experiment determines the content of its prepared data set."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from perceiver.config import DataConfig, Experiment, UserError
from perceiver.data.examples import is_code
from perceiver.data.order import STREAM_BLOCKS
from perceiver.data.rows import KINDS, ArrayRows
from perceiver.data.sources import mixture_sources, source_label
from perceiver.data.tokenizers import tokenizer_of


def task_kind(experiment: Experiment) -> str:
    """Which kind of rows the experiment's task reads.

    Raises:
        UserError: data for this task cannot be prepared.
    """
    kind = experiment.task.kind
    task = type(experiment.task).__name__
    if not kind:
        raise UserError(f"{experiment.preset}: data for {task.removesuffix('Config')} cannot be prepared yet")
    if kind not in KINDS:
        raise UserError(f"{task}.kind is {kind!r} and must be one of {', '.join(KINDS)}")
    return kind


def array_rows(experiment: Experiment) -> ArrayRows:
    """The columns that a task of arrays reads.

    Raises:
        UserError: the task names none.
    """
    rows = experiment.task.rows(experiment.model, experiment.data)
    if not isinstance(rows, ArrayRows):
        method = f"{type(experiment.task).__name__}.rows(model, data)"
        raise UserError(f"{method} returns {'nothing' if rows is None else f'a {type(rows).__name__}'} and must return ArrayRows(...)")
    return rows


def text_limits(experiment: Experiment) -> tuple[int, int]:
    """Longest input in tokens and number of ids of the experiment's text model.

    Raises:
        UserError: the model does not read text.
    """
    limits = experiment.model.text_limits()
    if limits is None:
        raise UserError(f"{experiment.preset}: the task reads text, but the model ({type(experiment.model).__name__}) does not")
    return limits


def prepare_settings(experiment: Experiment) -> dict[str, Any]:
    """What determines the content of the experiment's data set, apart from the input files' content.

    Raises:
        UserError: the task's data cannot be prepared, the tokenizer's file is missing, or it has more ids than the
            model.
    """
    settings = settings_without_tokenizer(experiment)
    if not KINDS[settings["kind"]].is_text:
        return settings
    name, (_, vocab_size) = experiment.data.tokenizer, text_limits(experiment)
    tokenizer = tokenizer_of(experiment.data)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"data.tokenizer {name} has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}")
    return settings | {"tokenizer": tokenizer.fingerprint}


def settings_without_tokenizer(experiment: Experiment) -> dict[str, Any]:
    """`prepare_settings` without the tokenizer."""
    data, kind = experiment.data, task_kind(experiment)
    if not data.source and not data.val_source and not data.mixture:
        raise UserError(f"{experiment.preset}: data.source is empty: name a data set or your own files (see docs/data.md)")
    if data.rows_per_block < 1 or data.blocks_per_shard < 1:
        raise UserError("data.rows_per_block and data.blocks_per_shard must be at least 1")
    if not 0 <= data.val_fraction < 1:
        raise UserError(f"data.val_fraction is {data.val_fraction}, it must be at least 0 and below 1")
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
    settings |= _held_out_settings(data, kind)
    if KINDS[kind].has_labels:
        settings |= _label_settings(experiment)
    settings |= experiment.task.prepared_settings(experiment.model)
    if KINDS[kind].has_columns:
        return settings | {"columns": array_rows(experiment).to_json()} | _encoding(data) | _tokenizer_beside(experiment)
    if not KINDS[kind].is_text and not KINDS[kind].is_stream:
        return settings
    max_seq_len, vocab_size = text_limits(experiment)
    if (needed := KINDS[kind].num_ids) is not None and vocab_size <= needed:
        raise UserError(f"model.vocab-size is {vocab_size} and must be at least {needed + 1}: {needed} {kind} and one id for padding")
    least, why = KINDS[kind].least_length
    if max_seq_len < least:
        section = "model.input" if hasattr(experiment.model, "input") else "model"
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
    return settings | {"row_length": max_seq_len, "document_marks": experiment.task.document_marks}


def _tokenizer_beside(experiment: Experiment) -> dict[str, Any]:
    """The tokenizer of texts that stand beside other inputs, whose file lies with the data; nothing of bytes, which have none."""
    num_ids, data = experiment.model.num_text_ids(), experiment.data
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


def _label_settings(experiment: Experiment) -> dict[str, Any]:
    """What labels and pictures become, as far as it is not what it always was."""
    task: Any = experiment.task
    found: dict[str, Any] = {}
    usual = next((field.default for field in fields(task) if field.name == "class_names"), None)
    if (names := getattr(task, "class_names", None)) and names != usual:
        found["class_names"] = list(names)
    if left_out := getattr(task, "leave_out", ()):
        found["leave_out"] = sorted(left_out)
    if KINDS[experiment.task.kind].new_rows not in ("image", "audio"):
        return found
    if experiment.data.label_column != "label":
        found["label_column"] = experiment.data.label_column
    if experiment.data.image_size is not None:
        found |= {"image_size": experiment.data.image_size, "channels": _channels(experiment)}
    return found


def _channels(experiment: Experiment) -> int:
    shape = getattr(getattr(experiment.model, "input", None), "image_shape", (0, 0, 3))
    return int(shape[-1])


def stored_shape(experiment: Experiment, first: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape that pictures are stored with, of which the first is as given."""
    size, channels = experiment.data.image_size, _channels(experiment)
    if size is not None:
        return size, size, channels
    return first if first[2] == 3 else (*first[:2], max(channels, 1))
