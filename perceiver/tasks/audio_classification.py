"""Audio classification: a class per sound."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from perceiver.config import DataConfig, Experiment, ModelConfig, TaskConfig, UserError
from perceiver.config.core import spelled
from perceiver.data.columns import fixed_array
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.data.sound_lengths import longest_sound
from perceiver.data.sounds import from_stored, to_stored
from perceiver.data.sources import resolve
from perceiver.models import AudioInput, LogMelInput, PerceiverIOConfig
from perceiver.tasks.base import IGNORE_INDEX, Batch, Task, padded
from perceiver.tasks.class_settings import ClassSettings
from perceiver.tasks.classification import Classification, with_classes
from perceiver.tasks.sound_changes import DRAWS, changed, kept

logger = logging.getLogger(__name__)

_MASKS = 1
"""Stream of the random numbers that hide parts of spectrograms; 0: those that change sounds."""
_LONGEST = 10.0
"""Seconds of a sound that a model takes at most where its length is that of the data's longest."""


class AudioClassificationConfig(ClassSettings):
    """A class per sound."""

    kind: ClassVar[str] = "sounds"
    abilities: ClassVar[tuple[str, ...]] = ("classify", "embed")

    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their labels; None: their numbers, or those of the data, if model.output.num-classes is 0."""
    sample_rate: int = 16000
    """Samples a second that all sounds are converted to; model.input.sample-rate must be the same."""
    random_shift: float = 0.0
    """Training sounds are moved in time by at most this share of their length, either way, end to beginning."""
    random_gain: float = 0.0
    """Training sounds are made louder or softer by at most this many decibels."""
    random_noise: float | None = None
    """White noise is added to training sounds, at most this many decibels below them (0: as loud as they are); None: none."""
    num_masks: int = 0
    """Parts of a training sound's log-mel spectrogram that are hidden along time, and as many along frequency (SpecAugment)."""
    mask_frames: int = 20
    """Frames that a mask along time hides, at most."""
    mask_bands: int = 8
    """Bands that a mask along frequency hides, at most."""

    def check(self, where: str) -> None:
        super().check(where)
        for name in ("sample_rate", "mask_frames", "mask_bands"):
            if getattr(self, name) < 1:
                raise UserError(f"{spelled(where + name)} is {getattr(self, name)} and must be at least 1")
        for name, most in (("random_shift", 1.0), ("random_gain", 60.0)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{spelled(where + name)} is {value} and must be from 0 to {most:g}")
        if self.random_noise is not None and not 0 <= self.random_noise <= 100:
            raise UserError(f"{spelled(where)}random-noise is {self.random_noise} and must be from 0 to 100 (decibels), or None")
        if not 0 <= self.num_masks <= 10:
            raise UserError(f"{spelled(where)}num-masks is {self.num_masks} and must be from 0 to 10")

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        return None

    def prepared_settings(self, model: ModelConfig) -> dict[str, Any]:
        return {"row_length": _input(model).num_samples, "sample_rate": self.sample_rate}

    def completed(self, experiment: Experiment) -> Experiment:
        return _with_length(with_classes(experiment), self.sample_rate)

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        found = _input(model)
        assert isinstance(model, PerceiverIOConfig)
        if isinstance(found, LogMelInput) and found.sample_rate != self.sample_rate:
            raise UserError(f"model.input.sample-rate is {found.sample_rate} and must be task.sample-rate, {self.sample_rate}")
        if self.num_masks and not isinstance(found, LogMelInput):
            raise UserError(f"task.num-masks is {self.num_masks}, which needs a model with a LogMelInput, not {type(found).__name__}")
        return AudioClassification(self, model, data, seed)


def _input(model: ModelConfig) -> AudioInput | LogMelInput:
    """The input of a model of sounds.

    Raises:
        UserError: the model is none.
    """
    found = model.input if isinstance(model, PerceiverIOConfig) else None
    if not isinstance(found, (AudioInput, LogMelInput)):
        raise UserError("audio classification needs a Perceiver IO model with a LogMelInput or an AudioInput")
    return found


def _with_length(experiment: Experiment, rate: int) -> Experiment:
    """An experiment whose model takes sounds of 0 samples with the length of its data's longest sound, in whole tenths of a second.

    Raises:
        UserError: none of the sounds can be read.
    """
    model, data = experiment.model, experiment.data
    given = _input(model)
    if given.num_samples:
        return experiment
    if not data.source or data.mixture:
        raise UserError(f"{experiment.preset}: name the data with the sounds, --data.source PATH")
    seconds = longest_sound(resolve(data, experiment.task.kind), rate, skip=data.on_error == "skip")
    taken = max(1, round(min(seconds, _LONGEST) * 10)) / 10
    logger.info(
        f"sounds: of {seconds:.2f} s at most; the model takes {taken:g} s at {rate:,} Hz: longer ones are cut to their middle, shorter "
        "ones filled up with silence (--model.input.num-samples N: another length)"
    )
    assert isinstance(model, PerceiverIOConfig)
    return replace(experiment, model=replace(model, input=replace(given, num_samples=round(taken * rate))))


class AudioClassification(Classification[AudioClassificationConfig]):
    """Sounds (samples,) of one channel, int16 as they are stored."""

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """audio (size, samples) int16, labels (size,) int64; where masks are set and in training, keep_frames and keep_bands."""
        sounds = fixed_array(rows, "audio")
        config, seed, epochs, numbers = self.config, self.seed, rows["epoch"].to_numpy(), rows["row"].to_numpy()
        if train and len(sounds) and (config.random_shift or config.random_gain or config.random_noise is not None):
            draws = uniforms(seed, epochs, numbers, DRAWS)
            sounds = to_stored(changed(from_stored(sounds), draws, config.random_shift, config.random_gain, config.random_noise))
        batch = {"audio": padded(sounds, size), "labels": padded(rows["label"].to_numpy().astype(np.int64), size, IGNORE_INDEX)}
        if train and config.num_masks:
            given = _input(self.model_config)
            assert isinstance(given, LogMelInput)
            draws, half = uniforms(seed, epochs, numbers, 4 * config.num_masks, stream=_MASKS), 2 * config.num_masks
            batch["keep_frames"] = padded(kept(draws[:, :half], given.num_frames, min(config.mask_frames, given.num_frames)), size, True)
            batch["keep_bands"] = padded(kept(draws[:, half:], given.num_bands, min(config.mask_bands, given.num_bands)), size, True)
        return batch

    def dummy_batch(self, size: int) -> Batch:
        given = _input(self.model_config)
        batch = {"audio": torch.zeros(size, given.num_samples, dtype=torch.int16), "labels": torch.zeros(size, dtype=torch.int64)}
        if self.config.num_masks and isinstance(given, LogMelInput):
            batch["keep_frames"] = torch.ones(size, given.num_frames, dtype=torch.bool)
            batch["keep_bands"] = torch.ones(size, given.num_bands, dtype=torch.bool)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        masks = {name: batch[name] for name in ("keep_frames", "keep_bands") if name in batch}
        given: Any = {"samples": batch["audio"]} | masks if masks else batch["audio"]
        return model(given)
