"""Inputs of the models: configurations, and the adapters that turn a batch into a sequence (B, N, C).

An input of your own is a subclass of `InputConfig`, in a file of yours. An adapter has `reset_buffers()` where it has constants.

Shapes: B batch, N input positions, C channels of an input position.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perceiver.config.core import Config, UserError, spelled
from perceiver.models.checks import check_sizes
from perceiver.models.initialize import Embedding
from perceiver.models.position import fine_features, fourier_features, grid_points
from perceiver.models.tensor_shapes import Shape, check_tensor


class InputConfig(Config):
    """What goes into a Perceiver IO: base class of all inputs."""

    has_cost_formulas: ClassVar[bool] = True
    """Whether the package's closed formulas for FLOPs and memory hold; otherwise steps are counted."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The adapter: takes what the task's batch holds as the model's input, returns (B, N, C), or that and a mask (B, N) of padding.

        Where it has constants (buffers that are not saved), its method `reset_buffers()` computes them in place.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method build() that returns the input adapter")

    @abstractmethod
    def adapted_channels(self) -> int:
        """C, the channels of what the adapter returns."""
        raise NotImplementedError(f"{type(self).__name__} needs a method adapted_channels() that returns a number")

    @abstractmethod
    def num_positions(self) -> int:
        """N at most."""
        raise NotImplementedError(f"{type(self).__name__} needs a method num_positions() that returns a number")

    def qk_channels(self, num_latent_channels: int) -> int:
        """Query and key channels of the encoder's cross-attention where its configuration has None."""
        return self.adapted_channels()

    def text_limits(self) -> tuple[int, int] | None:
        """Of text: the longest input in tokens and the number of ids; None for anything else."""
        return None

    def num_text_ids(self) -> int | None:
        """Number of token ids of texts that go in beside other things; None: there are no such texts."""
        return None

    def picture_shape(self) -> tuple[int, int, int] | None:
        """Of pictures: their height, width and channels; None for anything else."""
        return None

    def batch_shape(self) -> Shape | None:
        """Shape of the tensor that the adapter takes; None: it is not checked."""
        return None

    def check_batch(self, x: Any) -> None:
        """Looks whether a batch is one that the adapter takes.

        Raises:
            UserError: a tensor of another shape; the sentence has both shapes.
        """
        shape = self.batch_shape()
        if shape is not None:
            check_tensor(x, shape, f"a model with {type(self).__name__} takes", whole_numbers=self.text_limits() is not None)

    def adapting_flops(self, num_positions: int) -> float:
        """FLOPs of the adapter's own products for one example of `num_positions` positions."""
        return 0.0

    def adapting_numbers(self, num_positions: int) -> int:
        """Numbers that the adapter's products keep of such an example for the backward pass."""
        return 0

    @property
    def factorable(self) -> bool:
        """Whether positions are few channels over a fixed grid, so that attention to them may be factored (exactly, and cheaper): the
        adapter then has `points(x)`, (B, N, few channels), and `position_encoding`, (N, C less those).
        """
        return False


class TextInput(InputConfig):
    """Token ids: learned token embedding + learned position embedding."""

    vocab_size: int = 262
    """Number of token ids (262: UTF-8 bytes and 6 special tokens)."""
    max_seq_len: int = 2048
    """Longest input in tokens."""
    num_channels: int = 768
    """Channels of the embeddings."""

    def build(self) -> nn.Module:
        return TextAdapter(self.vocab_size, self.max_seq_len, self.num_channels)

    def adapted_channels(self) -> int:
        return self.num_channels

    def num_positions(self) -> int:
        return self.max_seq_len

    def qk_channels(self, num_latent_channels: int) -> int:
        return num_latent_channels

    def text_limits(self) -> tuple[int, int]:
        return self.max_seq_len, self.vocab_size

    def batch_shape(self) -> Shape:
        return "B", ("N", self.max_seq_len)

    def check(self, where: str) -> None:
        check_sizes(self, where)


class ImageInput(InputConfig):
    """Every pixel attended, channels last, with Fourier position features."""

    image_shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width, channels; 0 0 0: those of the data's pictures."""
    num_frequency_bands: int = 32
    """Fourier bands per axis."""

    def build(self) -> nn.Module:
        return ImageAdapter(self)

    def adapted_channels(self) -> int:
        *axes, num_pixel_channels = self.image_shape
        return num_pixel_channels + len(axes) * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        height, width, _ = self.image_shape
        return height * width

    def picture_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    def batch_shape(self) -> Shape:
        return "B", *self.image_shape

    @property
    def factorable(self) -> bool:
        return True

    def check(self, where: str) -> None:
        check_sizes(self, where)
        if self.image_shape != (0, 0, 0):
            _check_shape(self.image_shape, where)


class FlowInput(InputConfig):
    """Two frames as 3 x 3 patch features per pixel, projected, with Fourier position features."""

    image_shape: tuple[int, int] = (368, 496)
    """Height and width of one patch."""
    num_patch_input_channels: int = 27
    """Channels of one frame's patch features (3 x 3 x 3)."""
    num_patch_hidden_channels: int = 64
    """Channels after the input projection of both frames."""
    num_frequency_bands: int = 64
    """Fourier bands per axis."""

    def build(self) -> nn.Module:
        return FlowAdapter(self)

    def adapted_channels(self) -> int:
        return self.num_patch_hidden_channels + len(self.image_shape) * (2 * self.num_frequency_bands + 1)

    def num_positions(self) -> int:
        height, width = self.image_shape
        return height * width

    def batch_shape(self) -> Shape:
        return "B", 2, self.num_patch_input_channels, *self.image_shape

    def adapting_flops(self, num_positions: int) -> float:
        return 2.0 * num_positions * 2 * self.num_patch_input_channels * self.num_patch_hidden_channels

    def adapting_numbers(self, num_positions: int) -> int:
        return num_positions * 2 * self.num_patch_input_channels

    def check(self, where: str) -> None:
        check_sizes(self, where)
        _check_shape(self.image_shape, where)


def _check_shape(image_shape: tuple[int, ...], where: str) -> None:
    if min(image_shape) < 1:
        raise UserError(f"{spelled(where)}image-shape is {tuple(image_shape)}, but all its sizes must be at least 1")


class TextAdapter(nn.Module):
    """Token embedding, plus a learned position embedding unless `positions` is False."""

    def __init__(self, vocab_size: int, max_seq_len: int, num_channels: int, positions: bool = True) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.txt_embedding = Embedding(vocab_size, num_channels)
        self.pos_embedding = Embedding(max_seq_len, num_channels) if positions else None

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

    def __init__(
        self, shape: tuple[int, ...], num_frequency_bands: int, num_point_channels: int, resolution: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.resolution = tuple(shape), resolution
        self.num_frequency_bands = num_frequency_bands
        self.num_channels = num_point_channels + len(shape) * (2 * num_frequency_bands + 1)
        self.register_buffer("position_encoding", self._table(None), persistent=False)

    def reset_buffers(self) -> None:
        """Computes the position table anew, in place (after `to_empty`)."""
        self.position_encoding.copy_(self._table(self.position_encoding.device))

    def _table(self, device: torch.device | None) -> Tensor:
        if self.resolution is None:
            return fourier_features(self.shape, self.num_frequency_bands, device)
        return fine_features(grid_points(self.shape, device), self.resolution, self.num_frequency_bands)

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
