"""Sounds that are made, the same each time: tones, chirps, noise and others to tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from perceiver.data.examples import Example, ExampleSource

RATE, SAMPLES = 16000, 16000
SOUNDS = ("tone", "vibrato", "tremolo", "rising chirp", "falling chirp", "buzz", "clicks", "white noise", "low noise", "chord")


class Sounds(ExampleSource):
    """Second-long sounds of ten classes, of any pitch, loudness and moment, with a background of noise."""

    class_names: ClassVar[tuple[str, ...]] = SOUNDS

    def examples(self, split: str, part: int) -> Iterator[Example]:
        rng = np.random.default_rng([13, split == "train"])
        for number in range(2000 if split == "train" else 500):
            label = number % len(SOUNDS)
            sound = made(SOUNDS[label], rng)
            # Heard for half a second to a whole one, faded in and out.
            length = int(rng.uniform(0.5, 1) * SAMPLES)
            first = rng.integers(0, SAMPLES - length + 1)
            envelope = np.zeros(SAMPLES)
            envelope[first : first + length] = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / 800)
            sound = sound * envelope
            sound *= rng.uniform(0.05, 0.5) / max(np.abs(sound).max(), 1e-9)
            background = rng.normal(0, 10 ** rng.uniform(-3, -1.7), SAMPLES)
            yield {"audio": np.clip(sound + background, -1, 1).astype(np.float32), "label": label, "sample_rate": RATE}


def made(kind: str, rng: np.random.Generator) -> np.ndarray:
    """The samples of a sound, (SAMPLES,)."""
    time = np.arange(SAMPLES) / RATE
    pitch = 2 ** rng.uniform(np.log2(150), np.log2(3000))
    phase = rng.uniform(0, 2 * np.pi)
    if kind == "tone":
        return np.sin(2 * np.pi * pitch * time + phase)
    if kind == "vibrato":
        speed = rng.uniform(4, 9)
        return np.sin(2 * np.pi * pitch * time + rng.uniform(0.06, 0.12) * pitch / speed * np.sin(2 * np.pi * speed * time + phase))
    if kind == "tremolo":
        return np.sin(2 * np.pi * pitch * time) * (1 + 0.9 * np.sin(2 * np.pi * rng.uniform(5, 14) * time + phase))
    if kind in ("rising chirp", "falling chirp"):
        octaves = rng.uniform(1, 3) * (1 if kind == "rising chirp" else -1)
        start = pitch if octaves < 0 else pitch / 2 ** max(0.0, np.log2(pitch * 2**octaves / 7000))
        return np.sin(2 * np.pi * start * (2 ** (octaves * time) - 1) / (octaves * np.log(2)) + phase)
    if kind == "buzz":
        return 2 * ((pitch / 8 * time + phase) % 1) - 1
    if kind == "clicks":
        every = rng.integers(800, 3000)
        clicks = np.zeros(SAMPLES)
        clicks[rng.integers(0, every) :: every] = 1
        return np.convolve(clicks, rng.normal(size=64) * np.exp(-np.arange(64) / 12))[:SAMPLES]
    if kind == "white noise":
        return rng.normal(size=SAMPLES)
    if kind == "low noise":
        spectrum = np.fft.rfft(rng.normal(size=SAMPLES))
        spectrum[int(2 ** rng.uniform(np.log2(200), np.log2(1500))) :] = 0
        return np.fft.irfft(spectrum, SAMPLES)
    third = rng.choice([3, 4])
    return sum(np.sin(2 * np.pi * pitch / 2 * 2 ** (step / 12) * time + rng.uniform(0, 6)) for step in (0, third, 7))
