"""Multimodal autoencoding: video, audio and a class through the same few latents (arXiv 2107.14795, Section 4.3)."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver.config import DataConfig, ModelConfig, TaskConfig, UserError
from perceiver.config.core import spelled
from perceiver.data.manifest import Split
from perceiver.data.order import uniforms
from perceiver.data.rows import ArrayRows
from perceiver.models import AudioInput, AutoencoderOutput, ClassInput, MultimodalInput, PerceiverIOConfig, VideoInput
from perceiver.models.autoencoder_output import ASKED
from perceiver.tasks.base import IGNORE_INDEX, Batch, Sample, Task, loss_of_sources, of_examples, padded

_AT_ONCE = 8192
"""Points of a video that are decoded at once, where all of them are asked for."""
_SHOWN = 3
"""Examples of a validation that are shown (of those that this worker sees)."""
_RATE = 8000
"""Samples a second of sounds that are written."""
_LEAST = 1e-10
"""Mean square of an error, at least, so that what is exact has a finite PSNR."""
_STREAMS = {"video": 1, "audio": 2}


class MultimodalAutoencodingConfig(TaskConfig):
    """Rows have "video" (frames, height, width, colours) uint8, "audio" (samples,) float32 from -1 to 1, and "label"."""

    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; none: they have none."""
    video_weight: float = 0.03
    """Weight of the video's mean absolute error in the loss."""
    audio_weight: float = 1.0
    """The same of the audio's."""
    label_weight: float = 0.0001
    """Weight of the class's cross-entropy."""
    asked_video: int = 6272
    """Points of the video (frame, row, column) that a training step asks for, others at each step; 0: all."""
    asked_audio: int = 15
    """Groups of samples that a training step asks for; 0: all."""
    validated_video: int = 65536
    """Points of each video that validation asks for, the same each time; 0: all."""

    def check(self, where: str) -> None:
        for name in ("video_weight", "audio_weight", "label_weight", "asked_video", "asked_audio", "validated_video"):
            if not (value := getattr(self, name)) >= 0:
                raise UserError(f"{spelled(where + name)} is {value} and must not be negative")

    @classmethod
    def of_model(cls, model: ModelConfig) -> TaskConfig | None:
        match model:
            case PerceiverIOConfig(input=MultimodalInput(), output=AutoencoderOutput()):
                return cls()
        return None

    def rows(self, model: ModelConfig, data: DataConfig) -> ArrayRows:
        _, output = _parts(model)
        return ArrayRows(video=(output.video_shape, "uint8"), audio=((output.num_samples,), "float32"), label=((), "int32"))

    def build(self, model: ModelConfig, data: DataConfig, seed: int) -> Task[Any, Any]:
        _, output = _parts(model)
        if self.class_names and len(self.class_names) != output.num_classes:
            raise UserError(f"task.class-names has {len(self.class_names)} names but model.output.num-classes is {output.num_classes}")
        for name, most in (("asked_video", output.num_points("video")), ("asked_audio", output.num_points("audio"))):
            if (value := getattr(self, name)) > most:
                raise UserError(f"task.{spelled(name)} is {value} and must be at most {most}, all that there is")
        assert isinstance(model, PerceiverIOConfig)
        return MultimodalAutoencoding(self, model, data, seed)


def _parts(model: ModelConfig) -> tuple[MultimodalInput, AutoencoderOutput]:
    """Input and output of a model of this task.

    Raises:
        UserError: it is none.
    """
    match model:
        case PerceiverIOConfig(input=MultimodalInput() as given, output=AutoencoderOutput() as output):
            parts = dict(zip(given.names, given.inputs, strict=True))
            match parts:
                case {"video": VideoInput() as video, "audio": AudioInput() as audio, "label": ClassInput() as label}:
                    pairs = (
                        ("video-shape", tuple(video.video_shape), tuple(output.video_shape)),
                        ("num-samples", audio.num_samples, output.num_samples),
                        ("num-classes", label.num_classes, output.num_classes),
                    )
                    for name, inside, outside in pairs:
                        if inside != outside:
                            raise UserError(f"model.output.{name} is {outside}, but that of the input is {inside}: they must be the same")
                    return given, output
    raise UserError(
        "multimodal autoencoding needs a Perceiver IO model with a MultimodalInput of video, audio and label, and an AutoencoderOutput"
    )


class MultimodalAutoencoding(Task[MultimodalAutoencodingConfig, PerceiverIOConfig]):
    """Pixels from 0 to 1, samples from -1 to 1; the input does not have the class (`model.input.masked`) by default."""

    metric_directions = {
        "loss": "min", "psnr_video": "max", "psnr_audio": "max", "acc": "max",
        "psnr_video_mean": "max", "psnr_audio_silence": "max", "baseline_acc": "max",
    }  # fmt: skip
    baseline_metrics = {
        "psnr_video": ("psnr_video_mean", "each clip's mean colour"), "psnr_audio": ("psnr_audio_silence", "silence"),
        "acc": ("baseline_acc", "always the commonest class"),
    }  # fmt: skip

    def __init__(self, config: MultimodalAutoencodingConfig, model: PerceiverIOConfig, data: DataConfig, seed: int) -> None:
        super().__init__(config, model, data, seed)
        self._shown: list[tuple[int, np.ndarray, np.ndarray]] = []
        """Number, video and audio."""

    @property
    def output(self) -> AutoencoderOutput:
        return _parts(self.model_config)[1]

    def collate(self, rows: pa.Table, size: int, split: Split, train: bool, step: int) -> Batch:
        """The rows' columns; "labels" (size,), and which points are asked for, the same in each row: a function of (seed, step)."""
        found = self._stored(rows).arrays(rows)
        labels = found.pop("label", np.full(rows.num_rows, -1)).astype(np.int64)
        batch = {**{name: padded(values, size) for name, values in found.items()}, "labels": padded(labels, size, IGNORE_INDEX)}
        if not train and "row" in rows.column_names:
            batch["number"] = padded(rows["row"].to_numpy(), size, -1)
        counts = {"video": self.config.asked_video, "audio": self.config.asked_audio}
        if not train:
            counts, step = {"video": self.config.validated_video, "audio": 0}, 0
        for part, count in counts.items():
            if 0 < count < (total := self.output.num_points(part)):
                order = np.argsort(uniforms(self.seed, step, np.arange(total), 1, stream=_STREAMS[part])[:, 0], kind="stable")
                batch[ASKED[part]] = torch.from_numpy(np.sort(order[:count])).repeat(size, 1)
        return batch

    def _stored(self, rows: pa.Table) -> ArrayRows:
        columns = {name: (c.shape, c.dtype) for name, c in self.rows.columns.items() if name in rows.column_names}
        if missing := {"video", "audio"} - columns.keys():
            raise KeyError(missing.pop())
        return ArrayRows(**columns)

    def said(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What the model says of the points that the batch asks for: see `AutoencoderOutput`."""
        asked = {name: batch[name][0] for name in ASKED.values() if name in batch}
        x = {"video": batch["video"].float() / 255, "audio": batch["audio"].float(), "label": batch["labels"].clamp(min=-1), **asked}
        return {name: values.float() for name, values in model(x).items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over examples of the weighted errors."""
        said, labels, config = self.said(model, batch), batch["labels"], self.config
        truth = {"video": batch["video"].flatten(1, 3).float() / 255, "audio": batch["audio"].float().unflatten(1, (-1, self.output.group))}
        truth = {part: values[:, batch[ASKED[part]][0]] if ASKED[part] in batch else values for part, values in truth.items()}
        valid = labels != IGNORE_INDEX
        error = {part: said[part] - values for part, values in truth.items()}
        known = labels >= 0
        nats = F.cross_entropy(said["label"], torch.where(known, labels, IGNORE_INDEX), reduction="none", ignore_index=IGNORE_INDEX)
        each = config.video_weight * error["video"].abs().mean((1, 2)) + config.audio_weight * error["audio"].abs().mean((1, 2))
        each = torch.where(valid, each + config.label_weight * nats, 0.0)
        if torch.is_grad_enabled():
            return each.sum(), loss_of_sources(each, batch)
        right = said["label"].argmax(-1) == labels
        sums = {"right": (right & known).sum(), "known": known.sum()}
        sums["classes"] = torch.bincount(labels[known], minlength=self.output.num_classes)
        simplest = {"video_mean": truth["video"].mean(1, keepdim=True) - truth["video"], "audio_silence": truth["audio"]}
        for part, values in (error | simplest).items():
            decibels = -10 * values.double().square().mean((1, 2)).clamp(min=_LEAST).log10()
            sums[f"psnr_{part}"] = torch.where(valid, decibels, 0.0).sum()
        self._observe(batch)
        return each.sum(), {**sums, **of_examples(each, valid, right & known)}

    def _observe(self, batch: Batch) -> None:
        for i in (batch["labels"] != IGNORE_INDEX).nonzero().flatten().tolist()[: _SHOWN - len(self._shown)]:
            number = int(batch["number"][i]) if "number" in batch else -1
            self._shown.append((number, batch["video"][i].cpu().numpy(), batch["audio"][i].cpu().numpy()))

    def metrics(self, sums: dict[str, np.ndarray], split: Split) -> dict[str, float]:
        """PSNR in decibels of video (pixels from 0 to 1) and audio (an amplitude of 1), means over examples; share of right classes.
        Beside them that of the simplest answers: each clip's mean colour, silence, the class that most of the examples have.
        """
        count, known = max(float(sums["targets"]), 1.0), max(float(sums["known"]), 1.0)
        found = {name: float(sums[name]) / count for name in self.metric_directions if name.startswith("psnr_")}
        shares = {"acc": float(sums["right"]) / known, "baseline_acc": float(sums["classes"].max()) / known}
        return {**super().metrics(sums, split), **found, **shares}

    @torch.no_grad()
    def reconstructed(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """All points of examples, asked for in parts: "video" (B, frames, height, width, colours) uint8, "audio" (B, samples), "label"."""
        batch = {name: values for name, values in batch.items() if name not in ASKED.values()}
        total, videos = self.output.num_points("video"), []
        size, device = len(batch["video"]), batch["video"].device
        audio = label = torch.empty(0)
        for first in range(0, total, _AT_ONCE):
            asked = torch.arange(first, min(first + _AT_ONCE, total), device=device)
            said = self.said(model, {**batch, ASKED["video"]: asked.repeat(size, 1)})
            videos.append(said["video"])
            audio, label = said["audio"].flatten(1), said["label"]
        pixels = (torch.cat(videos, 1) * 255).round().clamp(0, 255).to(torch.uint8)
        return {"video": pixels.reshape(size, *self.output.video_shape), "audio": audio.clamp(-1, 1), "label": label}

    def samples(self, model: nn.Module, sums: dict[str, np.ndarray], split: Split) -> list[Sample]:
        """Frames of a few videos above what came out of the latents, and the sounds of the first: before and after."""
        device = next(model.parameters()).device
        shape = self.output.video_shape
        shown, self._shown = sorted(self._shown, key=lambda one: one[0]), []
        # All workers call the model equally often, also one that has seen nothing.
        found = shown or [(-1, np.zeros(shape, np.uint8), np.zeros(self.output.num_samples, np.float32))]
        found = (found * _SHOWN)[:_SHOWN]
        batch = {
            "video": torch.from_numpy(np.stack([video for _, video, _ in found])).to(device),
            "audio": torch.from_numpy(np.stack([audio for _, _, audio in found])).to(device),
            "labels": torch.full((_SHOWN,), -1, device=device),
        }
        made = {name: values.cpu().numpy() for name, values in self.reconstructed(model, batch).items()}
        if not shown:
            return []
        pairs = zip(batch["video"][: len(shown)].cpu().numpy(), made["video"], strict=False)
        picture = np.concatenate([strip(np.stack([before, after])) for before, after in pairs])
        sounds = (("before", shown[0][2]), ("after", made["audio"][0]))
        return [Sample("video", image=picture), *(Sample(f"sound-{name}", file=wav(audio), suffix=".wav") for name, audio in sounds)]

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What comes out of the latents, all of it, and the probabilities of the classes."""
        found = self.reconstructed(model, batch)
        return {"video": found["video"], "audio": found["audio"], "probabilities": found["label"].softmax(-1)}

    def throughput_unit(self) -> tuple[str, int]:
        return "videos", 1


def strip(videos: np.ndarray) -> np.ndarray:
    """Videos (n, frames, height, width, 1 or 3) uint8, one a row, frames side by side and enlarged: (h, w, 3)."""
    scale = max(1, 64 // videos.shape[2])
    large = np.pad(np.repeat(np.repeat(videos, scale, 2), scale, 3), ((0, 0), (0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
    rows = np.concatenate([np.concatenate(list(video), 1) for video in large])
    return np.repeat(rows, 3, 2) if rows.shape[2] == 1 else rows


def wav(samples: np.ndarray, rate: int = _RATE) -> bytes:
    """Samples from -1 to 1 as a .wav file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()
