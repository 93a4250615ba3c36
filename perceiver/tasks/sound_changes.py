"""Random changes of training sounds, each sound by its own numbers: moved in time, louder or softer, with noise, and with parts of its
spectrogram hidden (SpecAugment, arXiv 1904.08779).
"""

from __future__ import annotations

import numpy as np

_KEYS = 2
"""Draws that make the key of a sound's noise."""
DRAWS = 3 + _KEYS
"""Draws that `changed` takes for a sound."""


def changed(sounds: np.ndarray, draws: np.ndarray, shift: float, gain: float, noise: float | None) -> np.ndarray:
    """Sounds moved, scaled and with noise added.

    Args:
        sounds: float32 (n, samples).
        draws: (n, DRAWS) in [0, 1): the shift, the gain, the noise's strength, and the key of its values.
        shift: greatest move in time, as a share of the length, either way; what leaves at one end comes in at the other.
        gain: greatest change of loudness in decibels, either way.
        noise: white noise is at most this many decibels below the sound (0: as loud), and at least 40 more; None: no noise.

    Returns:
        float32, of the same shape.
    """
    length = sounds.shape[1]
    moves = np.rint((2 * draws[:, 0] - 1) * shift * length).astype(np.int64)
    places = (np.arange(length) - moves[:, None]) % length
    result = np.take_along_axis(sounds, places, 1) if shift else sounds.copy()
    result *= (10 ** ((2 * draws[:, 1:2] - 1) * gain / 20)).astype(np.float32)
    if noise is None:
        return result
    power = np.sqrt(np.mean(np.square(result, dtype=np.float64), axis=1))
    below = noise + 40 * draws[:, 2]
    for i, key in enumerate((draws[:, 3:] * 2**24).astype(np.uint64)):
        random = np.random.Generator(np.random.Philox(key=key))
        result[i] += np.float32(power[i] * 10 ** (-below[i] / 20)) * random.standard_normal(length, np.float32)
    return result


def kept(draws: np.ndarray, length: int, width: int) -> np.ndarray:
    """What a mask of a random place and size leaves of `length` frames or bands: bool (n, length).

    Args:
        draws: (n, 2 * masks) in [0, 1): place and size of each mask.
        width: greatest size of a mask.
    """
    place = np.arange(length)
    result = np.ones((len(draws), length), bool)
    for first in range(0, draws.shape[1], 2):
        size = np.floor(draws[:, first + 1] * (width + 1))[:, None]
        start = np.floor(draws[:, first, None] * np.maximum(length - size + 1, 1))
        result &= (place < start) | (place >= start + size)
    return result
