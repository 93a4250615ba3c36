"""Batch inference without Ray: rows in, a table with exactly one row for each out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import pyarrow as pa

from perceiver.config import UserError
from perceiver.generation.masks import check_top_k
from perceiver.generation.options import GenerationOptions
from perceiver.inference.rows import Row
from perceiver.inference.trained import TrainedModel

CLASS_NAMES = "class_names"
"""Of the metadata of a column of lists: what their numbers are of, in order; of the column "probabilities" the classes."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(GenerationOptions):
    """What is computed of each row, and how. For fill-mask `top_k` is the number of fills a row (None: 1)."""

    mode: str
    """One of `MODES`."""
    batch_size: int = 16
    """Rows computed at once."""
    seed: int | None = 0
    """Of the drawing."""

    def check(self) -> None:
        """Checks what the mode uses; needs no model.

        Raises:
            UserError: an unknown mode or a value out of range.
        """
        if self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r} and must be one of {', '.join(MODES)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size} and must be at least 1")
        if self.mode == "fill-mask" and self.top_k is not None:
            check_top_k(self.top_k)
        if self.mode not in ("generate", "play"):
            return
        super().check()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens} and must be at least 1")
        if self.num_latents is not None and self.num_latents < 1:
            raise UserError(f"num_latents is {self.num_latents} and must be at least 1")


@dataclass(frozen=True)
class Mode:
    """A way to use a model on rows."""

    ability: str
    """The method of `TrainedModel`."""
    columns: tuple[tuple[str, pa.DataType], ...] | None
    """What it adds to an output row; None: the task's own predictions tell."""
    run: Callable[[TrainedModel, list[Any], PredictOptions, list[str]], list[tuple]]
    """(model, values, options, places of the rows) -> the columns' values of each row."""


def _classify(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    results = model.classify(values, batch_size=len(values))
    return [(r.label, r.index, r.probability, r.probabilities) for r in results]


def _fill_mask(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    results = model.fill_mask(values, top_k=1 if options.top_k is None else options.top_k, batch_size=len(values))
    return [([f.text for f in fills], [f.probability for f in fills]) for fills in results]


def _embed(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    return [(vector,) for vector in model.embed(values, batch_size=len(values))]


def _score(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    return [(s.loss, s.bits_per_byte, s.tokens) for s in model.score(values, batch_size=len(values))]


def _generate(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    texts = model.generate(
        values,
        row_ids=places,
        batch_size=len(values),
        **{field.name: getattr(options, field.name) for field in fields(GenerationOptions)},
    )
    return [(text,) for text in texts]


def _play(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    from perceiver.data.midi import decode, write_midi

    found = []
    for value, place in zip(values, places, strict=True):
        events = model.play(
            value or None, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, seed=options.seed, row_id=place,
        )  # fmt: skip
        notes = decode(events)
        found.append((write_midi(events), len(notes), max((note.end for note in notes), default=0.0)))
    return found


def _flow(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    found = model.flow([(value["first"], value["second"]) for value in values], batch_size=options.batch_size)
    return [(*flow.shape[:2], flow.reshape(-1)) for flow in found]


def _predict(model: TrainedModel, values: list[Any], options: PredictOptions, places: list[str]) -> list[tuple]:
    results, wanted = model.predict(values, batch_size=len(values)), model.predictor.example
    for name, example in wanted.items():
        if results[name].shape[1:] != example.shape[1:]:
            raise UserError(f"{name} has shape {results[name].shape[1:]}, but of other rows it has {example.shape[1:]}")
    columns = []
    for name in wanted:
        columns.append(results[name].reshape(len(values), -1) if results[name].ndim > 1 else results[name].tolist())
        if names := _label_names(model, name):
            columns.append([names[number] for number in columns[-1]])
    return list(zip(*columns, strict=True))


def _label_names(model: TrainedModel, name: str) -> tuple[str, ...]:
    """The classes that a prediction numbers: each row gets the name of its class, too."""
    example = model.predictor.example[name]
    return model.predictor.task.prediction_names().get(name, ()) if example.ndim == 1 and example.dtype.kind == "i" else ()


MODES: dict[str, Mode] = {
    "predict": Mode("predict", None, _predict),
    "classify": Mode(
        "classify",
        (
            ("label", pa.string()),
            ("index", pa.int32()),
            ("probability", pa.float32()),
            ("probabilities", pa.list_(pa.float32())),
        ),
        _classify,
    ),
    "fill-mask": Mode("fill_mask", (("texts", pa.list_(pa.string())), ("probabilities", pa.list_(pa.float32()))), _fill_mask),
    "flow": Mode("flow", (("height", pa.int32()), ("width", pa.int32()), ("flow", pa.list_(pa.float32()))), _flow),
    "embed": Mode("embed", (("embedding", pa.list_(pa.float32())),), _embed),
    "score": Mode("score", (("loss", pa.float64()), ("bits_per_byte", pa.float64()), ("tokens", pa.int64())), _score),
    "play": Mode("play", (("midi", pa.binary()), ("notes", pa.int32()), ("seconds", pa.float32())), _play),
    "generate": Mode("generate", (("text", pa.string()),), _generate),
}


def predict_rows(model: TrainedModel, rows: Sequence[Row], options: PredictOptions) -> pa.Table:
    """One output row for each input row, in order: "id", the mode's columns, and "error" (null where all is well).

    A row that the model refuses has an error and nulls; the others of its batch are computed without it. What comes out
    of a row does not depend on the others: random draws depend on the seed and the row's place.

    Raises:
        UserError: the model's task does not allow the mode.
    """
    mode = MODES[options.mode]
    if mode.ability not in model.abilities:
        getattr(model, mode.ability)("")  # says what it can do instead
    results: list[tuple | None] = [None] * len(rows)
    errors = [row.error for row in rows]
    for batch in _batches(rows, options.batch_size):
        for group in (batch, *([i] for i in batch)):
            values, places = [rows[i].value for i in group], [rows[i].place for i in group]
            try:
                for i, result in zip(group, mode.run(model, values, options, places), strict=True):
                    results[i] = result
            except UserError as error:
                # The batch is taken apart, and the one that is refused alone is the bad row.
                if len(group) == 1:
                    errors[group[0]] = str(error)
                continue
            if len(group) == len(batch):
                break
    schema = output_schema(options.mode, model)
    columns = [pa.array([row.id for row in rows], pa.string())]
    for number, field in enumerate(list(schema)[1:-1]):
        columns.append(pa.array([None if r is None else r[number] for r in results], field.type))
    return pa.table([*columns, pa.array(errors, pa.string())], schema=schema)


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Numbers of the rows that are computed at once: neighbours of like length, which need little padding, or of the same columns."""

    def alike(i: int) -> Any:
        return sorted(value) if isinstance(value := rows[i].value, dict) else 0

    todo = sorted((i for i, row in enumerate(rows) if row.error is None), key=lambda i: (alike(i), len(rows[i].value or "")))
    for _, group in groupby(todo, key=alike):
        found = list(group)
        yield from (found[first : first + size] for first in range(0, len(found), size))


def output_schema(mode: str, model: TrainedModel) -> pa.Schema:
    """The columns of `predict_rows`. A prediction of several dimensions is a flat list, with its "shape" in the column's metadata."""
    columns = MODES[mode].columns
    middle = _prediction_fields(model) if columns is None else [pa.field(name, kind) for name, kind in columns]
    if MODES[mode].ability == "classify":
        names = {CLASS_NAMES: json.dumps(model.class_names)}
        middle = [field.with_metadata(names) if field.name == "probabilities" else field for field in middle]
    return pa.schema([pa.field("id", pa.string()), *middle, pa.field("error", pa.string())])


def _prediction_fields(model: TrainedModel) -> list[pa.Field]:
    found = []
    for name, values in model.predictor.example.items():
        if name in ("id", "error"):
            raise UserError(f"the task of {model.name} predicts {name!r}, a name that the output has itself: choose another")
        kind, shape = pa.from_numpy_dtype(values.dtype), values.shape[1:]
        if not shape:
            found.append(pa.field(name, kind))
            if _label_names(model, name):
                found.append(pa.field(name.removesuffix("class") + "label", pa.string()))
            continue
        metadata, names = {"shape": json.dumps(shape)}, model.predictor.task.prediction_names().get(name, ())
        if shape == (len(names),):
            metadata[CLASS_NAMES] = json.dumps(names)
        found.append(pa.field(name, pa.list_(kind), metadata=metadata))
    return found
