"""Batch inference without Ray: rows in, a table with exactly one row for each out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from perceiver.config import UserError
from perceiver.generation.continuations import check_stop
from perceiver.generation.generate import Sampling
from perceiver.generation.masks import check_top_k
from perceiver.inference.rows import Row
from perceiver.inference.trained import TrainedModel


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What is computed of each row, and how."""

    mode: str
    """One of `MODES`."""
    batch_size: int = 16
    """Rows computed at once."""
    top_k: int | None = None
    """fill-mask: fills a row (None: 1); generate: draw among the k likeliest tokens."""
    top_p: float | None = None
    """generate: draw among the fewest tokens with this probability together."""
    temperature: float = 1.0
    """generate: 0 takes the likeliest token."""
    max_new_tokens: int = 200
    """generate: length of continuations."""
    num_latents: int | None = None
    """generate: prompt tokens that start as latents; None: as many as there are."""
    stop: tuple[str, ...] = ()
    """generate: strings that end a continuation."""
    seed: int = 0
    """generate: of the drawing."""

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
        if self.mode != "generate":
            return
        Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed).check()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens} and must be at least 1")
        if self.num_latents is not None and self.num_latents < 1:
            raise UserError(f"num_latents is {self.num_latents} and must be at least 1")
        check_stop(self.stop)


@dataclass(frozen=True)
class Mode:
    """A way to use a model on rows."""

    ability: str
    """The method of `TrainedModel`."""
    columns: tuple[tuple[str, pa.DataType], ...]
    """What it adds to an output row."""
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
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        num_latents=options.num_latents,
        stop=options.stop,
        seed=options.seed,
        row_ids=places,
        batch_size=len(values),
    )
    return [(text,) for text in texts]


MODES: dict[str, Mode] = {
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
    "embed": Mode("embed", (("embedding", pa.list_(pa.float32())),), _embed),
    "score": Mode("score", (("loss", pa.float64()), ("bits_per_byte", pa.float64()), ("tokens", pa.int64())), _score),
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
    # Neighbours of like length need little padding.
    todo = sorted((i for i, row in enumerate(rows) if row.error is None), key=lambda i: len(rows[i].value or ""))
    for start in range(0, len(todo), options.batch_size):
        batch = todo[start : start + options.batch_size]
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
    columns: dict[str, pa.Array] = {"id": pa.array([row.id for row in rows], pa.string())}
    for number, (name, kind) in enumerate(mode.columns):
        columns[name] = pa.array([None if r is None else r[number] for r in results], kind)
    return pa.table(columns | {"error": pa.array(errors, pa.string())})


def output_schema(mode: str) -> pa.Schema:
    """The columns of `predict_rows`."""
    return pa.schema([("id", pa.string()), *MODES[mode].columns, ("error", pa.string())])
