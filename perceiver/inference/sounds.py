"""Sounds of users as batches of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.config import UserError
from perceiver.data.sounds import BadSound, as_samples, decode_sound, resampled, to_stored, with_length

SoundLike = Any
"""A sound: a path, the bytes of a .wav, .flac, .ogg, .mp3 or .aiff file, or an array of samples of the model's rate: int16, or floats from
-1 to 1, (samples,) or (samples, channels)."""


def sounds_of(values: Sequence[SoundLike], rate: int, length: int) -> np.ndarray:
    """Sounds of a user as a model takes them, as in its training: int16 (B, length).

    Args:
        values: see `SoundLike`.
        rate: samples a second, of the model.
        length: samples of an input of the model.

    Raises:
        UserError: what is no sound.
    """
    return np.stack([to_stored(with_length(_samples(value, rate), length)) for value in values])


def _samples(value: SoundLike, rate: int) -> np.ndarray:
    name = "the sound"
    if isinstance(value, (str, Path)):
        path, name = Path(value).expanduser(), str(value)
        if not path.is_file():
            raise UserError(f"there is no sound file {name}")
        value = path.read_bytes()
    try:
        if isinstance(value, bytes):
            samples, own = decode_sound(value)
            return resampled(samples, own, rate)
        return as_samples(value)
    except BadSound as error:
        raise UserError(f"{name}: {error}") from None
