"""Data that is made, the same each time: seasonal series to forecast, and point clouds of shapes to tell apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perceiver.data.examples import Example, ExampleSource

PAST, FUTURE = 168, 24
"""Hours of a window that are known, and that are to be forecast."""
SERIES, HOURS = 64, 1440
HELD_OUT = 288
"""Hours at the end of each series that only validation sees."""
STRIDE = 6
"""Hours from one window to the next."""

SHAPES = ("ellipsoid", "box", "cylinder", "cone", "torus", "tetrahedron", "frame", "dumbbell")
POINTS = 128
"""Points of a cloud."""


class Seasons(ExampleSource):
    """Windows of hourly series with a day of two waves, a week, a level that drifts, and noise that lasts for some hours.

    All windows for training end before the hours begin that validation sees.
    """

    def examples(self, split: str, part: int) -> Iterator[Example]:
        first, last = (0, HOURS - HELD_OUT) if split == "train" else (HOURS - HELD_OUT, HOURS)
        for number in range(SERIES):
            values = series(number)
            for start in range(first, last - PAST - FUTURE + 1, STRIDE):
                window = values[start : start + PAST + FUTURE, None]
                yield {"past": window[:PAST], "future": window[PAST:]}


def series(number: int) -> np.ndarray:
    """The values of a series, (hours,)."""
    rng = np.random.default_rng([7, number])
    hours = np.arange(HOURS)
    phases, sizes = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.5, 1.5, 3)
    day = 2 * np.pi * hours / 24
    wave = sizes[0] * np.sin(day + phases[0]) + 0.5 * sizes[1] * np.sin(2 * day + phases[1])
    week = 1 + 0.5 * sizes[2] * np.sin(2 * np.pi * hours / 168 + phases[2])
    drift = np.cumsum(rng.normal(0, 0.03, HOURS))
    noise = np.empty(HOURS)
    last = 0.0
    for hour, shock in enumerate(rng.normal(0, 0.15, HOURS)):
        noise[hour] = last = 0.8 * last + shock
    return (20 + 5 * (wave * week + drift + noise)).astype(np.float32)


class Shapes(ExampleSource):
    """Clouds of points on the surfaces of shapes: stretched along their axes, turned about the vertical one, with noise."""

    def examples(self, split: str, part: int) -> Iterator[Example]:
        rng = np.random.default_rng([11, split == "train"])
        for number in range(6400 if split == "train" else 1600):
            label = number % len(SHAPES)
            points = surface(SHAPES[label], rng) * rng.uniform(0.6, 1.4, 3)
            angle = rng.uniform(0, 2 * np.pi)
            turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
            points = points @ turn.T + rng.normal(0, 0.04, points.shape)
            points -= points.mean(0)
            yield {"points": (points / np.abs(points).max()).astype(np.float32), "label": label}


def surface(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Random points of a shape of about the size of the unit sphere, (points, 3)."""
    u, v = rng.uniform(0, 1, (2, POINTS))
    around = 2 * np.pi * u
    ring = np.stack([np.cos(around), np.sin(around)], -1)
    ball = rng.normal(size=(POINTS, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    if shape == "ellipsoid":
        return ball
    if shape == "dumbbell":
        return 0.5 * ball + np.where(v < 0.5, 0.5, -0.5)[:, None] * np.array([1, 0, 0])
    if shape == "torus":
        tube = 2 * np.pi * v
        return np.column_stack([(0.7 + 0.3 * np.cos(tube))[:, None] * ring, 0.3 * np.sin(tube)])
    if shape == "cylinder":  # a third of the points on the two ends
        end = rng.uniform(size=POINTS) < 1 / 3
        return np.column_stack([np.where(end, np.sqrt(v), 1)[:, None] * ring, np.where(end, np.sign(u - 0.5), 2 * v - 1)])
    if shape == "cone":
        end = rng.uniform(size=POINTS) < 1 / 3
        return np.column_stack([np.sqrt(v)[:, None] * ring, np.where(end, -1, 1 - 2 * np.sqrt(v))])
    if shape == "tetrahedron":
        corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
        weights = rng.dirichlet(np.ones(3), POINTS)
        faces = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])[rng.integers(0, 4, POINTS)]
        return (corners[faces] * weights[..., None]).sum(1)
    free = 2 if shape == "box" else 1  # a box has two free coordinates on a face, a frame one on an edge
    order = rng.permuted(np.tile(np.arange(3), (POINTS, 1)), axis=1)
    return 0.8 * np.where(order < free, rng.uniform(-1, 1, (POINTS, 3)), rng.choice([-1.0, 1.0], (POINTS, 3)))
