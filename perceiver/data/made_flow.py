"""Pairs of frames that are made, the same each time: textured shapes that move and turn before a textured ground that moves, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from perceiver.data.examples import Example, ExampleSource

HEIGHT, WIDTH = 24, 32
FASTEST = 2.0
"""Pixels that the ground or a shape moves along each axis, at most."""
_SHAPES = 2
_TURN = 0.06
"""Radians that a shape turns, at most."""
_PARTS = 8


class MovingShapes(ExampleSource):
    """Pairs of frames of 24 x 32 pixels, their exact flow, and what is hidden in the second one."""

    def __init__(self, train: int = 4096, val: int = 256) -> None:
        self.sizes = {"train": train, "val": val}

    def parts(self, split: str) -> int:
        return _PARTS

    def examples(self, split: str, part: int) -> Iterator[Example]:
        size = self.sizes[split]
        for number in range(part * size // _PARTS, (part + 1) * size // _PARTS):
            yield moving_pair(np.random.default_rng([19, split == "train", number]), HEIGHT, WIDTH)


@dataclass(frozen=True)
class _Layer:
    """Something with a texture that moves: a shape, or the ground."""

    texture: np.ndarray
    """(rows, columns, 3), repeated in all directions."""
    shift: np.ndarray
    """How far it moves, (x, y)."""
    turn: float
    center: np.ndarray
    half: np.ndarray | None
    """Half its width and height; None: it is everywhere."""
    round: bool = False

    def origin(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the second frame were in the first."""
        dx, dy = x - self.center[0] - self.shift[0], y - self.center[1] - self.shift[1]
        c, s = np.cos(self.turn), np.sin(self.turn)
        return self.center[0] + c * dx + s * dy, self.center[1] - s * dx + c * dy

    def moved(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the first frame are in the second: the inverse of `origin`."""
        dx, dy = x - self.center[0], y - self.center[1]
        c, s = np.cos(self.turn), np.sin(self.turn)
        return self.center[0] + self.shift[0] + c * dx - s * dy, self.center[1] + self.shift[1] + s * dx + c * dy

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether points of the first frame are of this layer."""
        if self.half is None:
            return np.ones(x.shape, bool)
        u, v = (x - self.center[0]) / self.half[0], (y - self.center[1]) / self.half[1]
        return u**2 + v**2 <= 1 if self.round else np.maximum(abs(u), abs(v)) <= 1

    def colours(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The texture at points of the first frame, between its pixels linearly: (..., 3)."""
        rows, columns = self.texture.shape[:2]
        left, top = np.floor(x).astype(int), np.floor(y).astype(int)
        right, low = (x - left)[..., None], (y - top)[..., None]

        def at(dy: int, dx: int) -> np.ndarray:
            return self.texture[(top + dy) % rows, (left + dx) % columns]

        return (1 - low) * ((1 - right) * at(0, 0) + right * at(0, 1)) + low * ((1 - right) * at(1, 0) + right * at(1, 1))


def moving_pair(rng: np.random.Generator, height: int, width: int, fastest: float = FASTEST) -> Example:
    """A pair of frames with its flow and what is hidden in the second frame, or leaves it."""
    layers = [_layer(rng, height, width, fastest, ground=True), *(_layer(rng, height, width, fastest) for _ in range(_SHAPES))]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    top = _top(layers, [(x, y)] * len(layers))
    origins = [layer.origin(x, y) for layer in layers]
    top_after = _top(layers, origins)
    first, second, flow = np.zeros((height, width, 3)), np.zeros((height, width, 3)), np.zeros((height, width, 2), np.float32)
    occluded = np.zeros((height, width), bool)
    for number, layer in enumerate(layers):
        here = top == number
        first[here] = layer.colours(x, y)[here]
        after = top_after == number
        second[after] = layer.colours(*origins[number])[after]
        new_x, new_y = layer.moved(x, y)
        flow[here] = np.stack([new_x - x, new_y - y], -1)[here]
        seen = _top(layers, [above.origin(new_x, new_y) for above in layers]) == number
        inside = (new_x >= 0) & (new_x <= width - 1) & (new_y >= 0) & (new_y <= height - 1)
        occluded |= here & ~(seen & inside)
    return {"first": _bytes(first), "second": _bytes(second), "flow": flow, "occluded": occluded}


def _layer(rng: np.random.Generator, height: int, width: int, fastest: float, ground: bool = False) -> _Layer:
    texture = _texture(rng, height, width)
    shift, turn = rng.uniform(-fastest, fastest, 2), 0.0 if ground else rng.uniform(-_TURN, _TURN)
    center = rng.uniform([0, 0], [width, height])
    half = None if ground else rng.uniform(0.15, 0.35, 2) * height
    return _Layer(texture, shift, turn, center, half, bool(rng.integers(2)))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise: waves of a few pixels, about a colour."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    smooth = np.exp(-0.5 * ((np.hypot(rows, columns) - 0.1) / 0.06) ** 2)[..., None]
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1)) * smooth, axes=(0, 1)).real
    return rng.uniform(70, 185, 3) + 45 * noise / noise.std()


def _top(layers: list[_Layer], places: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Which layer is seen, of which each is asked at its own places in the first frame."""
    top = np.zeros(places[0][0].shape, int)
    for number, (layer, place) in enumerate(zip(layers, places, strict=True)):
        top[layer.covers(*place)] = number
    return top


def _bytes(colours: np.ndarray) -> np.ndarray:
    return np.clip(np.round(colours), 0, 255).astype(np.uint8)
