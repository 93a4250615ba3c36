"""Performances as events: notes and pedal of a MIDI file to ids and back, and MIDI files read and written.

The event code is that of Music Transformer (arXiv 1808.03715, Section 2.2) as krasserm/perceiver-io has it:

    0..127    note on, by pitch             256..355  time passes, (id - 255) * 10 ms
    128..255  note off                      356..387  loudness of the notes that follow, velocity // 4
    388       padding, never an event
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perceiver.config import UserError

if TYPE_CHECKING:
    import pretty_midi

NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY, PAD = 0, 128, 256, 356, 388
VOCAB_SIZE = 389
MAX_SHIFT = 100
"""Longest time that one event lets pass, in units of 10 ms."""
UNITS_PER_SECOND = 100
_SUSTAIN, _DOWN = 64, 64
"""Controller of the sustain pedal, and the value from which on it is down."""
DEFAULT_VELOCITY = 64
"""Of notes before which no loudness is given."""


FROM_NOTHING = np.array([VELOCITY + DEFAULT_VELOCITY // 4], np.uint16)
"""A beginning that says as little as can be: a note of medium loudness follows."""


@dataclass(frozen=True)
class Note:
    """A note of a performance; times in seconds."""

    velocity: int
    pitch: int
    start: float
    end: float


@dataclass(frozen=True)
class Pedal:
    """A change of the sustain pedal: 0 to 127, down from 64 on."""

    value: int
    time: float


class NotMidi(UserError):
    """A file that is no MIDI file with notes: the reason in two words, and what is said of the file."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


def sustained(notes: Sequence[Note], pedals: Sequence[Pedal]) -> list[Note]:
    """Notes as long as they sound: those struck while the pedal is down end with it, or where their pitch is struck again.

    A pedal that never comes up holds to the end of the piece.
    """
    result = sorted(notes, key=attrgetter("start"))
    starts = [note.start for note in result]
    for down, up in _intervals(pedals, max((note.end for note in notes), default=0.0)):
        struck: dict[int, float] = {}
        for i in reversed(range(bisect.bisect_left(starts, down), bisect.bisect_right(starts, up))):
            note = result[i]
            result[i] = replace(note, end=struck.get(note.pitch, max(up, note.end)))
            struck[note.pitch] = note.start
    return result


def _intervals(pedals: Sequence[Pedal], end: float) -> list[tuple[float, float]]:
    found, down = [], None
    for pedal in sorted(pedals, key=attrgetter("time")):
        if pedal.value >= _DOWN and down is None:
            down = pedal.time
        elif pedal.value < _DOWN and down is not None:
            found.append((down, pedal.time))
            down = None
    return found if down is None else [*found, (down, max(end, down))]


def encode(notes: Sequence[Note], pedals: Sequence[Pedal] = ()) -> np.ndarray:
    """A performance as ids: uint16 (n,).

    As in the reference each note is preceded by its loudness, unless that, as a number from 0 to 31, is the velocity of a note that
    begins immediately before: published weights have learned from such events.
    """
    ends = []
    for note in sustained(notes, pedals):
        ends += [(note.start, note.pitch, note.velocity), (note.end, note.pitch, None)]
    ids: list[int] = []
    now, before = 0.0, -1
    for time, pitch, velocity in sorted(ends, key=lambda event: event[0]):
        units = round((time - now) * UNITS_PER_SECOND)
        ids += [TIME_SHIFT + MAX_SHIFT - 1] * (units // MAX_SHIFT)
        if units % MAX_SHIFT:
            ids.append(TIME_SHIFT + units % MAX_SHIFT - 1)
        now = time
        if velocity is None:
            ids.append(NOTE_OFF + pitch)
            before = -1
            continue
        if velocity // 4 != before:
            ids.append(VELOCITY + velocity // 4)
        before = velocity
        ids.append(NOTE_ON + pitch)
    return np.array(ids, np.uint16)


def decode(ids: Iterable[int]) -> list[Note]:
    """The notes of events, by their start. Anything can be decoded: a note that is never let go ends with the last event, one that
    is struck again while it sounds ends there, and a note off without its note says nothing.
    """
    notes: list[Note] = []
    sounding: dict[int, tuple[int, int]] = {}
    now, velocity = 0, DEFAULT_VELOCITY

    def end(pitch: int) -> None:
        start, loudness = sounding.pop(pitch)
        if now > start:
            notes.append(Note(loudness, pitch, start / UNITS_PER_SECOND, now / UNITS_PER_SECOND))

    for event in map(int, ids):
        if event < NOTE_OFF:
            if event in sounding:
                end(event)
            sounding[event] = (now, velocity)
        elif event < TIME_SHIFT:
            if event - NOTE_OFF in sounding:
                end(event - NOTE_OFF)
        elif event < VELOCITY:
            now += event - TIME_SHIFT + 1
        elif event < PAD:
            velocity = (event - VELOCITY) * 4
    for pitch in list(sounding):
        end(pitch)
    return sorted(notes, key=lambda note: (note.start, note.pitch))


def read_midi(data: bytes) -> np.ndarray:
    """The events of a MIDI file: all its instruments but drums, as one.

    Raises:
        NotMidi: no MIDI file, a damaged one, one of type 2 (independent sequences), or one without notes.
    """
    pretty_midi = _library()
    if data[:4] != b"MThd":
        raise NotMidi("no MIDI", "is no MIDI file" if data else "is empty")
    if data[8:10] == b"\x00\x02":
        raise NotMidi("type 2", "is a MIDI file of type 2 (several independent sequences), which is no one performance")
    try:
        music = pretty_midi.PrettyMIDI(io.BytesIO(data))
    except EOFError:
        raise NotMidi("damaged MIDI", "is a damaged MIDI file (it ends too early)") from None
    except Exception as error:  # a parser of foreign bytes: what it raises is not said anywhere
        reason = str(error) or type(error).__name__
        raise NotMidi("damaged MIDI", f"is a damaged MIDI file ({reason.splitlines()[0]})") from None
    played = [instrument for instrument in music.instruments if not instrument.is_drum]
    notes = [Note(n.velocity, n.pitch, float(n.start), float(n.end)) for instrument in played for n in instrument.notes]
    if not notes:
        raise NotMidi("no notes", "has no notes")
    controls = [change for instrument in played for change in instrument.control_changes if change.number == _SUSTAIN]
    return encode(notes, [Pedal(change.value, float(change.time)) for change in controls])


def midi_file(path: str | Path | bytes, what: str) -> np.ndarray:
    """The events of a MIDI file on this machine, or of its content; `what` is what messages call it.

    Raises:
        UserError: it is not there, or no MIDI file with notes.
    """
    name = what if isinstance(path, bytes) else f"{what} {path}"
    try:
        return read_midi(path if isinstance(path, bytes) else Path(path).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror})") from None
    except NotMidi as error:
        raise UserError(f"{name} {error}") from None


def write_midi(ids: Iterable[int]) -> bytes:
    """Events as a MIDI file for a piano."""
    file = io.BytesIO()
    to_pretty(ids).write(file)
    return file.getvalue()


def to_pretty(ids: Iterable[int]) -> pretty_midi.PrettyMIDI:
    """Events as pretty_midi's object: to be drawn, or heard."""
    pretty_midi = _library()
    music = pretty_midi.PrettyMIDI(resolution=480)
    piano = pretty_midi.Instrument(program=0, name="Piano")
    piano.notes = [pretty_midi.Note(max(n.velocity, 1), n.pitch, n.start, n.end) for n in decode(ids)]
    music.instruments.append(piano)
    return music


def _library() -> Any:
    try:
        import pretty_midi
    except ImportError:
        raise UserError("reading and writing MIDI files needs pretty_midi: pip install 'perceiver-ray[music]'") from None
    return pretty_midi
