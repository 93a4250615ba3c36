"""Small videos with sound that are made, the same each time: a shape that moves over a ground, and a tone that is its kind's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perceiver.data.examples import Example, ExampleSource

FRAMES, SIZE, SAMPLES = 4, 24, 512
"""Frames, their height and width, and samples of the sound."""
CLASSES = ("disc low", "disc high", "square low", "square high", "bar low", "bar high")
"""A shape, and whether its tone is a low or a high one: neither video nor sound alone tells the class."""
_TONES = {"low": (6.0, 10.0), "high": (18.0, 26.0)}
"""Periods of a tone in the whole sound, from the least on."""
_PARTS = 4


class SoundingShapes(ExampleSource):
    """Rows "video" (4, 24, 24, 3) uint8, "audio" (512,) float32 from -1 to 1, "label"."""

    def __init__(self, train: int = 4096, val: int = 384) -> None:
        self.sizes = {"train": train, "val": val}

    def parts(self, split: str) -> int:
        return _PARTS

    def examples(self, split: str, part: int) -> Iterator[Example]:
        size = self.sizes[split]
        for number in range(part * size // _PARTS, (part + 1) * size // _PARTS):
            yield sounding_shape(np.random.default_rng([23, split == "train", number]), number % len(CLASSES))


def sounding_shape(rng: np.random.Generator, label: int) -> Example:
    """A video with its sound: the tone sounds from the side to which the shape goes, louder the faster it is."""
    shape, tone = CLASSES[label].split()
    ground, colour = rng.uniform(0, 110, 3), rng.uniform(130, 255, 3)
    start, velocity = rng.uniform(7, SIZE - 8, 2), rng.uniform(-1.5, 1.5, 2)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.0
    shade = np.linspace(0, rng.uniform(-40, 40), SIZE)[None, :, None]
    frames = []
    for frame in range(FRAMES):
        dy, dx = y - start[0] - frame * velocity[0], x - start[1] - frame * velocity[1]
        distance = {"disc": np.hypot(dx, dy) - 5, "square": np.maximum(abs(dx), abs(dy)) - 4.5, "bar": np.maximum(abs(dx) - 8, abs(dy) - 2)}
        inside = np.clip(0.5 - distance[shape], 0, 1)[..., None]
        frames.append((1 - inside) * (ground + shade) + inside * colour)
    time = np.linspace(0, 1, SAMPLES, endpoint=False)
    periods, phase = rng.uniform(*_TONES[tone]), rng.uniform(0, 2 * np.pi)
    loud = 0.3 + 0.25 * np.hypot(*velocity)
    audio = np.clip(loud * np.sin(2 * np.pi * periods * time + phase) * np.sin(np.pi * time) ** 0.5, -1, 1)
    return {"video": np.clip(np.round(frames), 0, 255).astype(np.uint8), "audio": audio.astype(np.float32), "label": label}
