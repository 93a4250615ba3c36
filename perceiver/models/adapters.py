"""Input adapters: a modality's input as a sequence (B, N, channels).

Each has `num_channels`, the channels of that sequence, and `reset_buffers()`, which computes its constants anew.
"""

import torch
from torch import Tensor, nn

from perceiver.models.configs import FlowInput, ImageInput
from perceiver.models.position import fourier_features


class TextAdapter(nn.Module):
    """Token embedding, plus a learned position embedding unless `positions` is False."""

    def __init__(self, vocab_size: int, max_seq_len: int, num_channels: int, positions: bool = True) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.txt_embedding = nn.Embedding(vocab_size, num_channels)
        self.pos_embedding = nn.Embedding(max_seq_len, num_channels) if positions else None

    def reset_buffers(self) -> None:
        """Nothing: all is learned."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, N) -> (B, N, channels). positions: (B or 1, N); None: 0, 1, ..."""
        embedded = self.txt_embedding(x)
        if self.pos_embedding is None:
            return embedded
        if positions is None:
            return embedded + self.pos_embedding.weight[: x.shape[1]]
        return embedded + self.pos_embedding(positions)


class GridAdapter(nn.Module):
    """Adds the Fourier features of a grid to the channels of its points."""

    position_encoding: Tensor

    def __init__(self, shape: tuple[int, ...], num_frequency_bands: int, num_point_channels: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.num_frequency_bands = num_frequency_bands
        self.num_channels = num_point_channels + len(shape) * (2 * num_frequency_bands + 1)
        self.register_buffer("position_encoding", fourier_features(self.shape, num_frequency_bands), persistent=False)

    def reset_buffers(self) -> None:
        """Computes the position table anew, in place (after `to_empty`)."""
        table = fourier_features(self.shape, self.num_frequency_bands, self.position_encoding.device)
        self.position_encoding.copy_(table)

    def with_positions(self, points: Tensor) -> Tensor:
        """(B, N, point channels) -> (B, N, channels): the points' channels, then their position's."""
        table = self.position_encoding.to(points.dtype)
        return torch.cat([points, table.expand(points.shape[0], -1, -1)], dim=-1)


class ImageAdapter(GridAdapter):
    """Every pixel of an image, channels last, with Fourier position features."""

    def __init__(self, config: ImageInput) -> None:
        *shape, num_pixel_channels = config.image_shape
        super().__init__(tuple(shape), config.num_frequency_bands, num_pixel_channels)

    def points(self, x: Tensor) -> Tensor:
        """images (B, height, width, pixel channels) -> (B, height * width, pixel channels)."""
        return x.flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """images (B, height, width, pixel channels) -> (B, height * width, channels)."""
        return self.with_positions(self.points(x))


class FlowAdapter(GridAdapter):
    """Patch features of two frames, projected together, with Fourier position features."""

    def __init__(self, config: FlowInput) -> None:
        super().__init__(config.image_shape, config.num_frequency_bands, config.num_patch_hidden_channels)
        self.linear = nn.Linear(2 * config.num_patch_input_channels, config.num_patch_hidden_channels)

    def forward(self, x: Tensor) -> Tensor:
        """pairs of frames (B, 2, patch channels, height, width) -> (B, height * width, channels)."""
        points = x.flatten(1, 2).flatten(2).transpose(1, 2)  # both frames' channels side by side: (B, H * W, 2 C)
        return self.with_positions(self.linear(points))
