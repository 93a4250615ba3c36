"""Sounds: reading, one channel, one rate, one length. Samples are float32 in [-1, 1] in memory and int16 as stored."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver.config import UserError

LOUDEST = 32767
"""Stored value of a sample of 1."""


class BadSound(ValueError):
    """A sound that cannot be read: the message says why."""

    reason = "bad sound"
    """How it is counted."""


@dataclass(frozen=True)
class SoundInfo:
    """What the head of a sound file says."""

    rate: int
    """Samples a second."""
    channels: int
    num_samples: int
    """Of each channel."""

    @property
    def seconds(self) -> float:
        return self.num_samples / self.rate


def decode_sound(data: bytes) -> tuple[np.ndarray, int]:
    """A sound file (.wav, .flac, .ogg, .mp3, .aiff) as the mean of its channels, float32 (samples,), and its rate.

    Raises:
        BadSound: it is no sound file, is damaged, is empty, or has samples that are not finite.
        UserError: soundfile, the package that reads it, is not installed.
    """
    soundfile = _soundfile()
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise BadSound(f"it is no sound file that can be read ({_reason(error)})") from None
    if not len(samples):
        raise BadSound("it has no samples")
    mono = samples.mean(1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise BadSound("it has samples that are NaN or infinite")
    return mono, int(rate)


def sound_info(data: bytes) -> SoundInfo:
    """What the head of a sound file says. Raises as `decode_sound`."""
    soundfile = _soundfile()
    try:
        found = soundfile.info(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise BadSound(f"it is no sound file that can be read ({_reason(error)})") from None
    return SoundInfo(int(found.samplerate), int(found.channels), int(found.frames))


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples (n,) of one rate at another: float32 (ceil(n * wanted / rate),). Polyphase filtering (scipy), without aliasing."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(samples.astype(np.float32), wanted // common, rate // common), np.float32)


def resampled_length(num_samples: int, rate: int, wanted: int) -> int:
    """Samples of what `resampled` returns."""
    return -(-num_samples * wanted // rate)


def with_length(samples: np.ndarray, length: int) -> np.ndarray:
    """(n,) -> (length,): of a longer sound the middle, a shorter one with silence after it."""
    if len(samples) >= length:
        first = (len(samples) - length) // 2
        return samples[first : first + length]
    return np.pad(samples, (0, length - len(samples)))


def to_stored(samples: np.ndarray) -> np.ndarray:
    """float in [-1, 1] as int16; what is louder is clipped."""
    return np.rint(np.clip(samples, -1, 1) * LOUDEST).astype(np.int16)


def from_stored(samples: np.ndarray) -> np.ndarray:
    """int16 as float32 in [-1, 1]."""
    return samples.astype(np.float32) / np.float32(LOUDEST)


def as_samples(values: Any) -> np.ndarray:
    """An array of samples as float32 (samples,): of floats, of 16-bit numbers, or (samples, channels), whose mean is taken.

    Raises:
        BadSound: it is no such array.
    """
    array = np.asarray(values)
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "fi":
        raise BadSound(f"its samples are {array.dtype} {array.shape} and must be numbers (samples,) or (samples, channels)")
    if array.dtype.kind == "i":
        if array.dtype != np.int16:
            raise BadSound(f"its samples are {array.dtype} and must be int16, or floats from -1 to 1")
        array = from_stored(array)
    mono = array.astype(np.float32) if array.ndim == 1 else array.mean(1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise BadSound("it has samples that are NaN or infinite")
    return mono


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, and libsndfile is not
        raise UserError("sound files are read by soundfile, which is not installed: pip install 'perceiver-ray[audio]'") from None
    return soundfile


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].removeprefix("Error opening").split(">: ")[-1].rstrip(".")
