"""Reads performances from MIDI files. Every fault names the file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perceiver.data.midi import NotMidi, read_midi
from perceiver.data.spans import Problems, Span, Unreadable, whole


def read_performance(span: Span, problems: Problems) -> Iterator[np.ndarray]:
    """The events of a MIDI file: uint16 (n,); nothing where it is faulty and faults are skipped.

    Raises:
        UserError: a fault, where faults are not skipped.
    """
    file = span.input_file
    try:
        yield read_midi(whole(span))
    except NotMidi as error:
        problems.report(error.reason, f"{file.name} {error}")
    except Unreadable as error:
        problems.report(*error.args)
