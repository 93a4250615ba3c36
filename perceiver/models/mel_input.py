"""Sounds as log-mel spectrograms in patches: an input that is made from raw samples inside the model.

Shapes: B batch, T frames, M mel bands, N input positions, P numbers of a patch.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.grid_inputs import FULL_SCALE
from perceiver.models.inputs import GridAdapter, InputConfig

FLOOR = 1e-6
"""Added to the power of a band before its logarithm."""


class LogMelInput(InputConfig):
    """Raw samples, made a log-mel spectrogram whose patches are the input positions; each spectrogram has mean 0 and deviation 1.

    A batch holds samples (B, samples), floats from -1 to 1 or int16, or a mapping of them as "samples" and of masks, bool: "keep_frames"
    (B, T) and "keep_bands" (B, M). What is not kept has the mean of its sound. Give int16 where the model computes in half precision.
    """

    has_cost_formulas: ClassVar[bool] = False

    num_samples: int = 80000
    """Samples of an example; 0: those of the data's longest sound, at most 10 seconds."""
    sample_rate: int = 16000
    """Samples a second."""
    window: int = 400
    """Samples of a frame."""
    hop: int = 160
    """Samples from one frame to the next."""
    num_bands: int = 64
    """Mel bands (of Slaney's scale, triangles of equal area)."""
    lowest: float = 0.0
    """Lower end of the lowest band, in hertz."""
    highest: float | None = None
    """Upper end of the highest band, in hertz; None: half the sample rate."""
    patch: tuple[int, int] = (4, 8)
    """Frames and bands of a patch."""
    num_frequency_bands: int = 16
    """Fourier bands of the positions, per axis."""

    def build(self) -> nn.Module:
        return LogMelAdapter(self)

    @property
    def num_frames(self) -> int:
        """T: whole patches of frames alone."""
        return self.num_samples // self.hop // self.patch[0] * self.patch[0]

    @property
    def fft_size(self) -> int:
        """Samples of a frame, filled up with zeros to a power of 2."""
        return 1 << (self.window - 1).bit_length()

    def grid(self) -> tuple[int, int]:
        """Patches along time and along bands."""
        return self.num_frames // self.patch[0], self.num_bands // self.patch[1]

    def adapted_channels(self) -> int:
        return math.prod(self.patch) + 2 * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        return math.prod(self.grid())

    @property
    def factorable(self) -> bool:
        return True

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where, except_for="num_samples" if self.num_samples == 0 else "")
        if min(self.patch) < 1 or self.num_bands % self.patch[1]:
            raise UserError(f"{where}patch is {self.patch}, and its second number must divide {where}num-bands, {self.num_bands}")
        top = self.sample_rate / 2 if self.highest is None else self.highest
        if not 0 <= self.lowest < top <= self.sample_rate / 2:
            raise UserError(
                f"{where}lowest is {self.lowest:g} and {where}highest {top:g}: they must ascend from 0 to half of {where}sample-rate, "
                f"{self.sample_rate / 2:g}"
            )
        if not mel_filters(self.fft_size // 2 + 1, self.num_bands, self.sample_rate, self.lowest, top).any(0).all():
            raise UserError(
                f"{where}num-bands is {self.num_bands}, and some bands are narrower than what {where}window {self.window} tells apart: "
                "give fewer bands or a longer window"
            )
        if self.num_samples and not self.num_frames:
            raise UserError(
                f"{where}num-samples is {self.num_samples} and must be at least {self.hop * self.patch[0]}, a patch of {where}patch "
                f"{self.patch} at {where}hop {self.hop}"
            )


class LogMelAdapter(GridAdapter):
    """Log-mel patches, with positions."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: LogMelInput) -> None:
        super().__init__(config.grid(), config.num_frequency_bands, math.prod(config.patch))
        self.config = config
        self.register_buffer("window", torch.empty(config.window), persistent=False)
        self.register_buffer("filters", torch.empty(config.fft_size // 2 + 1, config.num_bands), persistent=False)
        if self.filters.device.type != "meta":
            self.reset_buffers()

    def reset_buffers(self) -> None:
        """Computes window, filters and positions anew, in place (after `to_empty`)."""
        super().reset_buffers()
        config = self.config
        self.window.copy_(torch.hann_window(config.window))
        top = config.sample_rate / 2 if config.highest is None else config.highest
        self.filters.copy_(mel_filters(config.fft_size // 2 + 1, config.num_bands, config.sample_rate, config.lowest, top))

    def spectrogram(self, samples: Tensor) -> Tensor:
        """(B, samples) -> log of the power in each band (B, T, M)."""
        config = self.config
        if not samples.is_floating_point():
            samples = samples.float() / FULL_SCALE
        # In float32 whatever the model computes in: half precision has neither the range of a power nor a transform.
        spectrum = torch.stft(
            samples.float(), config.fft_size, config.hop, config.window, self.window.float(), pad_mode="constant", return_complex=True
        )
        power = spectrum.abs().square()[..., : config.num_frames].transpose(1, 2)
        return (power @ self.filters.float() + FLOOR).log()

    def points(self, x: Any) -> Tensor:
        """(B, samples), or a mapping with masks, -> (B, N, P)."""
        samples = x["samples"] if isinstance(x, dict) else x
        mel = self.spectrogram(samples)
        mean, deviation = mel.mean((1, 2), keepdim=True), mel.std((1, 2), keepdim=True, correction=0)
        mel = (mel - mean) / (deviation + 1e-3)
        if isinstance(x, dict) and "keep_frames" in x:
            mel = torch.where(x["keep_frames"][:, :, None] & x["keep_bands"][:, None], mel, 0.0)
        frames, bands = self.config.patch
        patches = mel.unflatten(1, (-1, frames)).unflatten(3, (-1, bands)).transpose(2, 3)  # (B, T / f, M / b, f, b)
        return patches.flatten(3).flatten(1, 2)

    def forward(self, x: Any) -> Tensor:
        """(B, samples), or a mapping with masks, -> (B, N, channels)."""
        return self.with_positions(self.points(x))


def mel_filters(num_frequencies: int, num_bands: int, sample_rate: int, lowest: float, highest: float) -> Tensor:
    """Triangular filters of equal area, evenly spaced on Slaney's mel scale (linear to 1 kHz, logarithmic above): (frequencies, bands)."""
    frequencies = torch.linspace(0, sample_rate / 2, num_frequencies, dtype=torch.float64, device="cpu")
    ends = torch.linspace(_mel(lowest), _mel(highest), num_bands + 2, dtype=torch.float64, device="cpu")
    corners = torch.where(ends < 15, ends * (200 / 3), 1000 * torch.exp((ends - 15) * (math.log(6.4) / 27)))
    rising = (frequencies[:, None] - corners[None, :-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[None, 2:] - frequencies[:, None]) / (corners[2:] - corners[1:-1])
    return (torch.minimum(rising, falling).clamp(min=0) * (2 / (corners[2:] - corners[:-2]))).float()


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)
