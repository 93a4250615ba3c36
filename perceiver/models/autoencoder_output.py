"""Video, audio and a class out of the same latents, any of their points by its position (arXiv 2107.14795, Section 4.3).

Shapes: B batch, V points of the video (frame, row, column), A groups of samples, M queries, Q channels of a query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perceiver.config.core import UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.outputs import ModelSizes, OutputConfig, OutputQueries
from perceiver.models.position import fine_features

ASKED = {"video": "asked_video", "audio": "asked_audio"}
"""Names under which a batch says which points are asked for: int64 (V,) and (A,), numbers in row-major order; all where it does not."""


class AutoencoderOutput(OutputConfig):
    """A mapping of "video" (B, V, colours), "audio" (B, A, group) and "label" (B, classes)."""

    has_cost_formulas: ClassVar[bool] = False
    head_per_query: ClassVar[bool] = False
    head_takes_input: ClassVar[bool] = True

    video_shape: tuple[int, int, int, int] = (16, 224, 224, 3)
    """Frames, height, width, colours."""
    num_video_bands: int = 32
    """Fourier bands per axis of a point of the video."""
    video_resolution: tuple[int, int, int] = (16, 56, 56)
    """Points along each axis that have features of their own: the highest frequency is half of it."""
    num_samples: int = 30720
    """Samples of the audio."""
    group: int = 16
    """Samples that one query is answered with."""
    num_audio_bands: int = 192
    """Fourier bands of the time."""
    audio_resolution: int = 30720
    """Points of time that have features of their own."""
    num_classes: int = 700
    """Number of classes."""
    num_label_channels: int = 1024
    """Channels of the learned query of the class."""
    num_own_channels: int = 2
    """Channels of the learned vector by which the widest query is filled up."""
    num_decoded_channels: int = 512
    """Channels that decoded queries are projected to before each has its own head."""

    def channels(self) -> dict[str, int]:
        """Channels of the queries of each part, in their order."""
        return {
            "audio": 2 * self.num_audio_bands + 1,
            "video": 3 * (2 * self.num_video_bands + 1),
            "label": self.num_label_channels,
        }

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The grids of the points that can be asked for."""
        return {"audio": (self.num_samples // self.group,), "video": self.video_shape[:3]}

    def num_points(self, part: str) -> int:
        """A or V, of all that there is."""
        return math.prod(self.sizes()[part])

    def asks_input(self, model: ModelSizes) -> bool:
        return False

    def queries(self, model: ModelSizes) -> OutputQueries:
        channels = max(self.channels().values()) + self.num_own_channels
        return OutputQueries(num_learned=0, num_channels=channels, num_outputs=self.num_decoded_channels)

    def build_queries(self, model: ModelSizes) -> nn.Module | None:
        return AutoencoderQueries(self, self.queries(model).num_channels)

    def build_head(self, model: ModelSizes) -> nn.Module | None:
        return AutoencoderHeads(self, self.queries(model).num_channels)

    def check(self, where: str) -> None:
        where = spelled(where)
        check_sizes(self, where)
        if min(*self.video_shape, *self.video_resolution) < 1:
            raise UserError(
                f"{where}video-shape is {self.video_shape} and {where}video-resolution {self.video_resolution}: at least 1 each"
            )
        if self.num_samples % self.group:
            raise UserError(f"{where}group is {self.group} and must divide {where}num-samples, {self.num_samples}")


class AutoencoderQueries(nn.Module):
    """Queries (B, M, Q): of the audio, of the video, and one of the class, each filled up by a learned vector of its part."""

    def __init__(self, config: AutoencoderOutput, num_channels: int) -> None:
        super().__init__()
        self.config = config
        self.label = nn.Parameter(torch.empty(1, config.num_label_channels))
        self.own = nn.ParameterDict({name: nn.Parameter(torch.empty(1, num_channels - c)) for name, c in config.channels().items()})

    def reset_buffers(self) -> None:
        """Nothing: features of positions are computed where they are asked for, as all of them would take gigabytes."""

    def forward(self, x: Mapping[str, Any], adapted: Any) -> Tensor:
        config = self.config
        parts = {
            "audio": self._features("audio", x, (config.audio_resolution,), config.num_audio_bands),
            "video": self._features("video", x, config.video_resolution, config.num_video_bands),
            "label": self.label,
        }
        return torch.cat([torch.cat([found, self.own[n].expand(len(found), -1)], -1) for n, found in parts.items()])[None]

    def _features(self, part: str, x: Mapping[str, Any], resolution: tuple[int, ...], bands: int) -> Tensor:
        size, asked = self.config.sizes()[part], x.get(ASKED[part])
        numbers = torch.arange(math.prod(size), device=self.label.device) if asked is None else asked
        places = torch.stack(torch.unravel_index(numbers, size), -1)
        # From -1 to just below 1, as the published weights have learned it; inputs go up to 1.
        points = -1 + 2 * places / torch.tensor(size, device=places.device)
        return fine_features(points, resolution, bands).to(self.label.dtype)


class AutoencoderHeads(nn.Module):
    """Decoded queries (B, M, Q) to a mapping of what each part is answered with."""

    def __init__(self, config: AutoencoderOutput, num_channels: int) -> None:
        super().__init__()
        self.config = config
        decoded = config.num_decoded_channels
        self.shared = nn.Linear(num_channels, decoded)
        outputs = {"audio": config.group, "video": config.video_shape[3], "label": config.num_classes}
        self.outputs = nn.ModuleDict({name: nn.Linear(decoded, number) for name, number in outputs.items()})

    def forward(self, decoded: Tensor, x: Mapping[str, Any]) -> dict[str, Tensor]:
        config = self.config
        numbers = [len(x[ASKED[part]]) if x.get(ASKED[part]) is not None else config.num_points(part) for part in ("audio", "video")]
        audio, video, label = self.shared(decoded).split([*numbers, 1], dim=1)
        found = {"audio": audio, "video": video, "label": label[:, 0]}
        return {name: output(found[name]) for name, output in self.outputs.items()}
