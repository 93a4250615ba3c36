"""Reads sounds with labels from spans of files or from code, at one rate and length. Every fault names the file or the example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver.data.examples import ExamplePart
from perceiver.data.sounds import BadSound, as_samples, decode_sound, resampled, to_stored, with_length
from perceiver.data.spans import Problems, Span, Unreadable, chunks
from perceiver.data.tables import BadLabel, Columns, NoGroup, group_of, label_of


@dataclass(frozen=True)
class Sound:
    """A sound as it is stored."""

    samples: np.ndarray
    """int16 (length,)."""
    label: int
    original_length: int
    """Samples at the stored rate before it was cut or filled up."""
    group: bytes | None = None


def read_sounds(span: Span, columns: Columns, length: int, problems: Problems) -> Iterator[Sound]:
    """The sounds of a span: that of a file, or those that code yields as {"audio": samples, "label": class, "sample_rate": rate}.

    Args:
        columns: with the stored rate; an example without "sample_rate" has it already.
        length: of what is stored, see `with_length`.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    for place, value, rate, label, group in _given(span, problems):
        try:
            samples, own_rate = decode_sound(value) if isinstance(value, bytes) else (as_samples(value), rate)
            wanted = columns.sample_rate or own_rate or 0
            samples = resampled(samples, own_rate or wanted, wanted)
            number = label_of(label, columns)
            key = group_of(group, columns.group) if columns.group else None
            yield Sound(to_stored(with_length(samples, length)), number, len(samples), key)
        except (BadSound, BadLabel, NoGroup) as error:
            problems.report(error.reason, f"{place}: {error}")


def _given(span: Span, problems: Problems) -> Iterator[tuple[str, Any, int | None, Any, Any]]:
    """What messages call each sound, its bytes or samples, its rate where known, its label and its group."""
    if not isinstance(span.file, ExamplePart):
        file = span.input_file
        try:
            yield file.name, b"".join(chunks(span, 0)), None, file.label, file.group
        except Unreadable as error:
            problems.report(*error.args)
        return
    for number, example in enumerate(span.file.examples()):
        place = f"{span.file.place}, example {number:,}"
        if not isinstance(example, Mapping) or "audio" not in example or "label" not in example:
            there = ", ".join(map(str, example)) if isinstance(example, Mapping) else type(example).__name__
            problems.report("missing column", f"{place} must be a mapping with audio and label (it has: {there})")
            continue
        rate = example.get("sample_rate")
        if rate is not None and (not isinstance(rate, (int, np.integer)) or rate < 1):
            problems.report("wrong value", f"{place} has the sample_rate {rate!r}, and it must be a whole number of at least 1")
            continue
        yield place, example["audio"], None if rate is None else int(rate), example["label"], None
