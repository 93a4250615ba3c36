"""A model that answers requests: rows as JSON in, what `perceiver predict` says of such rows as JSON out. Needs no Ray.

A row is an object: a text, or the base64 text of an image, sound or MIDI file, under the name of the model's column; two frames (base64) as
first and second; or the columns of a table or of a task's arrays by their names. And "id" if you like, on which random draws depend,
besides the seed.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.rows import KINDS, ArrayRows
from perceiver.generation.options import GenerationOptions
from perceiver.inference.frames import FRAMES
from perceiver.inference.predict import MODES, PredictOptions, predict_rows
from perceiver.inference.rows import Kind, Row, Wanted, checked_row
from perceiver.inference.trained import TrainedModel

OPTIONS = {
    "generate": tuple(field.name for field in fields(GenerationOptions)),
    "fill-mask": ("top_k",),
    "play": ("max_new_tokens", "temperature", "top_k", "top_p", "seed"),
}
"""Options that a request may give, by mode; the other modes have none."""


_FILES = {"image": "an image", "audio": "a sound file", "midi": "a MIDI file", "frames": "an image"}
"""What a row has as base64, by its kind."""


@dataclass(frozen=True)
class Interface:
    """What a served model takes, for whoever checks requests before they come to it."""

    name: str
    checkpoint: str
    mode: str
    kind: Kind
    column: str
    """The field of a row with its text or file; "" of rows of arrays and of frames."""
    columns: tuple[str, ...]
    """Fields of a row of arrays, or of frames."""
    options: tuple[str, ...]
    """Options that a request may give."""
    streams: bool
    """Whether it continues texts piece by piece."""
    example: str = ""
    """A row of arrays, as JSON: zeros and empty texts in the columns that go in."""

    def to_json(self) -> dict[str, Any]:
        """For whoever asks what is served here."""
        rows = {"id": "text, may be left out", **dict.fromkeys(self.columns or (self.column,), self.kind)}
        return {"model": self.name, "checkpoint": self.checkpoint, "mode": self.mode, "row": rows, "options": list(self.options)} | (
            {"example": json.loads(self.example)} if self.example else {}
        )


def interface_of(
    name: str, checkpoint: str, task: Any, rows: ArrayRows | None, column: str, abilities: Sequence[str], mode: str
) -> Interface:
    """The interface of a model.

    Args:
        task: its settings; None: published weights, whose column tells what they read.
        rows: the columns that the task reads, where it reads arrays.
        column: that the model's texts were read from in training.

    Raises:
        UserError: its rows cannot be given as JSON.
    """
    kind: Kind = KINDS[task.kind].new_rows if task is not None else "text"
    if kind == "arrays" and rows is None:
        raise UserError(f"{name} cannot be served: its task names no columns ({type(task).__name__}.rows gives none)")
    columns = tuple(rows.columns) if kind == "arrays" and rows is not None else tuple(FRAMES.columns) if kind == "frames" else ()
    own = "" if columns else {"text": column}.get(kind, kind)
    example = "" if kind != "arrays" or rows is None else json.dumps(_example(rows, task))
    streams = mode == "generate" and "stream" in abilities
    return Interface(name, checkpoint, mode, kind, own, columns, OPTIONS.get(mode, ()), streams, example)


def _example(rows: ArrayRows, task: Any) -> dict[str, Any]:
    """A row of zeros, without what is to be predicted."""
    targets = (*getattr(task, "targets", ()), *(part.name for part in getattr(task, "parts", ())))
    found = {}
    for name, column in rows.columns.items():
        if name not in targets and column.dtype != "binary":
            found[name] = np.zeros(column.shape, column.dtype).tolist() if column.is_number else ""
    return found


class ServedModel:
    """A loaded model with one mode.

    Args:
        model: the model.
        interface: what it takes.
        options: what is computed by default; a request may give some of its own (`OPTIONS`).
        arrays: the columns of rows of arrays.
    """

    def __init__(self, model: TrainedModel, interface: Interface, options: PredictOptions, arrays: ArrayRows | None) -> None:
        self.model, self.interface, self.options = model, interface, options
        self._wanted = Wanted(interface.kind, interface.column, "id", FRAMES if interface.kind == "frames" else arrays)

    def answers(self, items: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """An answer to each row, whatever request it is of: the mode's columns, its "id", and "error" (None where all is well).

        Args:
            items: of each row the object and the options of its request.
        """
        found: list[dict[str, Any] | None] = [None] * len(items)
        groups: dict[PredictOptions, list[int]] = {}
        rows = [self._row(row) for row, _ in items]
        for number, (_, given) in enumerate(items):
            try:
                groups.setdefault(self.options_of(given), []).append(number)
            except UserError as error:
                found[number] = {"id": rows[number].id, "error": str(error)}
        for options, numbers in groups.items():
            table = predict_rows(self.model, [rows[number] for number in numbers], options)
            for number, answer in zip(numbers, table.to_pylist(), strict=True):
                found[number] = {name: _finite(value) for name, value in answer.items() if value is not None or name == "error"}
        return [answer for answer in found if answer is not None]

    def stream(self, text: str, given: Mapping[str, Any], identity: str = "0") -> Iterator[str]:
        """The continuation of a text piece by piece; together what `answers` has for a row of this id.

        Raises:
            UserError: the text or an option is refused.
        """
        options = self.options_of(given)
        return self.model.stream(text, row_id=identity, **{name: getattr(options, name) for name in OPTIONS["generate"]})

    def options_of(self, given: Mapping[str, Any]) -> PredictOptions:
        """The options of a request.

        Raises:
            UserError: there is no such option, or it is out of range.
        """
        if unknown := [name for name in given if name not in self.interface.options]:
            raise UserError(f"options has {unknown[0]}, but mode {self.interface.mode} has {', '.join(self.interface.options) or 'none'}")
        stop = {"stop": tuple(given["stop"])} if "stop" in given else {}
        options = replace(self.options, **{**given, **stop})
        options.check()
        return options

    def _row(self, row: Mapping[str, Any]) -> Row:
        identity = str(row.get("id", "0"))
        values = {name: row.get(name) for name in self._wanted.columns if not self.interface.columns or name in row}
        if self.interface.kind in _FILES:
            for name in self.interface.columns or (self.interface.column,):
                try:
                    values[name] = base64.b64decode(str(row.get(name) or ""), validate=True)
                except (binascii.Error, ValueError):
                    return Row(identity, None, f"{name!r} is not the base64 text of {_FILES[self.interface.kind]}")
        return checked_row(values, identity, identity, self._wanted)


def _finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: null in their place; bytes as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mode_of(abilities: Sequence[str], wanted: str | None, name: str) -> str:
    """The mode to serve: the one that is wanted, else that of what the model was trained for.

    Raises:
        UserError: the model has no such mode, or none at all.
    """
    modes = {mode.ability: mode_name for mode_name, mode in MODES.items()}
    able = [modes[ability] for ability in abilities if ability in modes]
    if wanted is None and not able:
        raise UserError(f"{name} cannot be served: it can {', '.join(abilities) or 'nothing'} and none of {', '.join(MODES)}")
    if wanted is not None and wanted not in able:
        raise UserError(f"--mode is {wanted}, but {name} can only {', '.join(able) or 'be loaded'}")
    return wanted or able[0]
