"""Symbolic audio with Perceiver AR: the next event of a performance (arXiv 2202.07765, Section 5.3)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.data.columns import fixed_array, fixed_column
from perceiver.data.manifest import Manifest, Split
from perceiver.data.midi import (
    FROM_NOTHING,
    MAX_SHIFT,
    NOTE_OFF,
    PAD,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    decode,
    midi_file,
    write_midi,
)  # fmt: skip
from perceiver.data.order import uniforms
from perceiver.generation.generate import generate
from perceiver.generation.options import Sampling
from perceiver.models import PerceiverARConfig
from perceiver.plots import frame, new_figure, pixels
from perceiver.tasks.base import Sample, Task
from perceiver.tasks.baselines import Guess, unigram_guess
from perceiver.tasks.next_token import NextToken, NextTokenConfig

TRANSPOSE, STRETCH, LOUDNESS = 3, 4, 5
"""Streams of random numbers of the augmentation."""
MOST_STRETCH = 0.5
"""Largest change of tempo that makes sense as augmentation."""


class SymbolicAudioConfig(NextTokenConfig):
    """Next-event prediction on windows of performances, of which none has events of two."""

    kind: ClassVar[str] = "events"
    abilities: ClassVar[tuple[str, ...]] = ("play",)

    transpose: int = 0
    """Transpose each training window by a random number of semitones, at most this many up or down; 0: not."""
    stretch: float = 0.0
    """Play each training window faster or slower by a random factor of at most 1 + this; 0: not."""
    loudness: int = 0
    """Play each training window louder or softer by a random number of steps (of 32), at most this many; 0: not."""
    sample_prompt: str = ""
    """MIDI file whose first events (at most max_latents) the validation's sample continues; it must be there on every worker's
    machine. "": the sample begins from nothing."""
    sample_tokens: int = 256
    """Events of that sample; 0: none."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        return cls() if isinstance(model, PerceiverARConfig) and model.vocab_size == VOCAB_SIZE else None

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task:
        if not isinstance(model, PerceiverARConfig):
            raise UserError("symbolic audio needs a Perceiver AR model")
        return SymbolicAudio(self, model, data, seed)


class SymbolicAudio(NextToken[SymbolicAudioConfig]):
    """Windows of at most max_seq_len + 1 events of one performance; the last max_latents are predicted."""

    metric_directions = {"loss": "min", "bits_per_event": "min", "perplexity": "min"}

    def check(self) -> None:
        super().check()
        settings = self.config
        for name, value, most in (("transpose", settings.transpose, 24), ("loudness", settings.loudness, 16)):
            if not 0 <= value <= most:
                raise UserError(f"task.{name} is {value} and must be from 0 to {most}")
        if not 0 <= settings.stretch <= MOST_STRETCH:
            raise UserError(f"task.stretch is {settings.stretch} and must be from 0 to {MOST_STRETCH}")
        self._prompt()

    def examples(self, block: pa.Table, split: Split, first_row: int, epoch: int, train: bool) -> pa.Table:
        """Windows "tokens" as those of texts, "length", how many of their events are real (from the first on), and "head", whether
        the first of them begins a performance.

        A window that the epoch's shift takes across the border of two performances has the events of one: the one with more of them.
        """
        stream = fixed_array(block, "tokens").reshape(-1)
        length, num_rows = split.row_length, block.num_rows - split.lookahead
        shift = self._shift(epoch, length) if train and self.config.random_shift else 0
        size = length + 1 if train else length + 1 + length - self._stride
        windows = np.lib.stride_tricks.sliding_window_view(stream[shift:], size)[::length][:num_rows]
        result = np.full((num_rows, size), PAD, np.uint16)
        real, head = np.zeros(num_rows, np.int64), np.zeros(num_rows, bool)
        for i, window in enumerate(windows):
            start, stop = longest_run(window) if train else first_run(window)
            events = self._augmented(window[start:stop], first_row + i, epoch) if train else window[start:stop]
            real[i] = min(len(events), size)
            result[i, : real[i]] = events[: real[i]]
            head[i] = start > 0
        return pa.table({"tokens": fixed_column(result), "length": pa.array(real), "head": pa.array(head)})

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """Loss in nats per event, the same in bits, and perplexity."""
        loss = Task.metrics(self, sums, split)["loss"]
        return {"loss": loss, "bits_per_event": loss / math.log(2), "perplexity": math.exp(min(loss, 700))}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        """A continuation as a MIDI file and as a piano roll."""
        if self.config.sample_tokens < 1:
            return []
        prompt = torch.from_numpy(self._prompt().astype(np.int64))[None].to(next(model.parameters()).device)
        num_latents = max(1, prompt.shape[1] - (self.model_config.max_seq_len - self.model_config.max_latents))
        # Not the most likely few alone: the hundred events that let time pass share their probability, and none would be among them.
        sampling = Sampling(top_p=0.98, seed=0)
        ids = generate(model, prompt, max_new_tokens=self.config.sample_tokens, num_latents=num_latents, sampling=sampling)
        events = np.concatenate([prompt[0].cpu().numpy(), ids[0].cpu().numpy()])
        return [Sample("performance", image=piano_roll(events)), Sample("performance", file=write_midi(events), suffix=".mid")]

    def guess(self, manifest: Manifest, trained_on: Manifest) -> Guess | None:
        guess = unigram_guess(manifest, tuple(self.metric_directions))
        return guess and replace(guess, means=dict.fromkeys(guess.means, "guessing by the frequencies of single events"))

    def throughput_unit(self) -> tuple[str, int]:
        return "events", self._mean_length

    def _heads(self, rows: pa.Table) -> np.ndarray:
        return np.flatnonzero(rows["head"].to_numpy())

    def _prompt(self) -> np.ndarray:
        """Events that the validation's sample continues.

        Raises:
            UserError: a file that is not there, or is no MIDI file with notes.
        """
        if not self.config.sample_prompt:
            return FROM_NOTHING
        return midi_file(self.config.sample_prompt, "task.sample-prompt")[: self.model_config.max_latents]

    def _augmented(self, events: np.ndarray, row: int, epoch: int) -> np.ndarray:
        """A window's events transposed, stretched and louder as the configuration says and (seed, epoch, row) decides."""

        def drawn(stream: int) -> float:
            return float(uniforms(self.seed, epoch, np.array([row]), 1, stream=stream)[0, 0])

        settings, factor = self.config, 1.0
        semitones = steps = 0
        if settings.transpose:
            semitones = int(drawn(TRANSPOSE) * (2 * settings.transpose + 1)) - settings.transpose
        if settings.stretch:
            factor = (1 + settings.stretch) ** (2 * drawn(STRETCH) - 1)
        if settings.loudness:
            steps = int(drawn(LOUDNESS) * (2 * settings.loudness + 1)) - settings.loudness
        return stretched(louder(transposed(events, semitones), steps), factor)


def longest_run(window: np.ndarray) -> tuple[int, int]:
    """Where the longest run of events without padding begins and ends; (0, 0) where there is none. Of equal ones the first."""
    runs = _runs(window)
    best = int(np.argmax(runs[:, 1] - runs[:, 0])) if len(runs) else 0
    return (int(runs[best, 0]), int(runs[best, 1])) if len(runs) else (0, 0)


def first_run(window: np.ndarray) -> tuple[int, int]:
    """The same of the first run."""
    runs = _runs(window)
    return (int(runs[0, 0]), int(runs[0, 1])) if len(runs) else (0, 0)


def _runs(window: np.ndarray) -> np.ndarray:
    """Where runs of events begin and end: int64 (n, 2)."""
    return np.flatnonzero(np.diff(np.concatenate([[True], window == PAD, [True]]).astype(np.int8))).reshape(-1, 2)


def transposed(events: np.ndarray, semitones: int) -> np.ndarray:
    """Events with all notes this much higher, or by less where one would leave MIDI's range."""
    notes = events < TIME_SHIFT
    if not semitones or not notes.any():
        return events
    pitches = events[notes] % NOTE_OFF
    semitones = min(max(semitones, -int(pitches.min())), NOTE_OFF - 1 - int(pitches.max()))
    result = events.copy()
    result[notes] = (events[notes].astype(np.int64) + semitones).astype(np.uint16)
    return result


def louder(events: np.ndarray, steps: int) -> np.ndarray:
    """Events with all loudness this many of 32 steps higher, within the range that there is."""
    if not steps:
        return events
    result = events.astype(np.int64)
    loud = events >= VELOCITY
    result[loud] = np.clip(result[loud] + steps, VELOCITY, PAD - 1)
    return result.astype(np.uint16)


def stretched(events: np.ndarray, factor: float) -> np.ndarray:
    """Events of the same notes, played in this multiple of the time; as many more or fewer as that takes."""
    passing = (events >= TIME_SHIFT) & (events < VELOCITY)
    if factor == 1 or not passing.any():
        return events
    units = np.where(passing, events.astype(np.int64) - TIME_SHIFT + 1, 0)
    others = np.flatnonzero(~passing)
    # The time before each other event, and after the last one, is written anew.
    times = np.rint(np.append(np.cumsum(units)[others], units.sum()) * factor).astype(np.int64)
    passed = np.diff(times, prepend=0)
    whole, rest = passed // MAX_SHIFT, passed % MAX_SHIFT
    found = []
    for event, full, more in zip([*events[others], None], whole, rest, strict=True):
        found += [TIME_SHIFT + MAX_SHIFT - 1] * int(full)
        if more:
            found.append(TIME_SHIFT + int(more) - 1)
        if event is not None:
            found.append(int(event))
    return np.array(found, np.uint16)


def piano_roll(events: np.ndarray) -> np.ndarray:
    """Notes over time as a picture: uint8 (height, width, 3)."""
    notes = decode(events)
    figure = new_figure(900, 360)
    axes = figure.subplots()
    for note in notes:
        axes.plot([note.start, note.end], [note.pitch, note.pitch], color="C0", alpha=0.3 + 0.7 * note.velocity / 127, linewidth=2.5)
    frame(axes, f"{len(notes):,} notes", "seconds", "pitch (60 is middle C)")
    return pixels(figure)
