"""Positions: counted under left padding, as Fourier features of a grid, and as rotary embedding.

Shapes: B batch, N positions, H heads, D channels of a head, R rotated channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def token_positions(x: Tensor, pad_mask: Tensor | None) -> Tensor:
    """Positions of tokens, counted from the first that is not (left) padding; padding has position 0.

    Args:
        x: token ids (B, N).
        pad_mask: (B, N), True = padding; None: no padding.

    Returns:
        (1, N) without padding, else (B, N), int64.
    """
    positions = torch.arange(x.shape[1], device=x.device)[None]
    if pad_mask is None:
        return positions
    return (positions - pad_mask.sum(dim=1, keepdim=True)).clamp(min=0)


def fourier_features(shape: tuple[int, ...], num_bands: int, device: torch.device | None = None) -> Tensor:
    """Position features of every point of a grid (Perceiver, arXiv 2103.03206, Section 3.2).

    Coordinates run from -1 to 1 along each axis; an axis has frequencies evenly spaced from 1 to half its length.

    Returns:
        (points, axes * (2 * num_bands + 1)), points in row-major order; channels: the coordinates, then the sines of
        all axes, then the cosines.
    """
    if (device or torch.get_default_device()).type == "meta":  # see `perceiver.models.initialize.Embedding`
        return torch.empty(math.prod(shape), len(shape) * (2 * num_bands + 1), device="meta")
    return coordinate_features(grid_points(shape, device), shape, num_bands)


def grid_points(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """The points of a grid in row-major order, from -1 to 1 along each axis: (points, axes)."""
    axes = [torch.linspace(-1.0, 1.0, steps=size, device=device) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def coordinate_features(coordinates: Tensor, resolution: tuple[float, ...], num_bands: int) -> Tensor:
    """Fourier features of coordinates from -1 to 1; an axis has frequencies evenly spaced from 1 to half its resolution.

    Args:
        coordinates: (..., axes).
        resolution: points along each axis that have features of their own.

    Returns:
        (..., axes * (2 * num_bands + 1)); channels: the coordinates, then the sines of all axes, then the cosines.
    """
    angles = []
    for axis, size in enumerate(resolution):
        frequencies = torch.linspace(1.0, size / 2.0, num_bands, device=coordinates.device)
        angles.append(torch.pi * coordinates[..., axis, None] * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.cat([coordinates, angle.sin(), angle.cos()], dim=-1)


def fine_features(coordinates: Tensor, resolution: tuple[float, ...], num_bands: int) -> Tensor:
    """`coordinate_features` multiplied in the order of the published multimodal model, on which the sines of its angles (up to tens of
    thousands) depend in float32.
    """
    frequencies = [torch.linspace(1.0, size / 2.0, num_bands, device=coordinates.device) for size in resolution]
    angle = torch.pi * torch.cat([coordinates[..., axis, None] * found for axis, found in enumerate(frequencies)], dim=-1)
    return torch.cat([coordinates, angle.sin(), angle.cos()], dim=-1)


@dataclass(frozen=True, eq=False)  # compilation asks for the hash of what it has not built yet
class Rotation:
    """Sines and cosines of rotary embedding for N positions, made once a step and shared by all layers.

    No tensor and no pytree on purpose: mixed precision that casts the inputs of layers leaves it in float32.
    """

    sin: Tensor
    """(B or 1, 1, N, R)."""
    cos: Tensor
    """(B or 1, 1, N, R)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates the first R channels of queries or keys (B, H, N, D); the others pass."""
        num_rotated = self.sin.shape[-1]
        rotated, rest = x[..., :num_rotated], x[..., num_rotated:]
        even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        rotated = (rotated * self.cos + turned * self.sin).to(x.dtype)
        return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated

    def last(self, num_positions: int) -> "Rotation":
        """The rotation of the last positions, of the given number: copies, as a view's strides would make a compiled layer that gets it
        depend on how many positions come before.
        """
        sin, cos = (t[:, :, -num_positions:].clone(memory_format=torch.contiguous_format) for t in (self.sin, self.cos))
        return Rotation(sin, cos)


def rotation(positions: Tensor, num_channels: int) -> Rotation:
    """Rotary position embedding (arXiv 2104.09864) of neighbouring channel pairs.

    Pair i turns by position * 10000^(-2i / num_channels).

    Args:
        positions: (B or 1, N) int64.
        num_channels: channels of a head that are rotated. An odd number rotates one more, with the frequencies of the
            odd number (as the published Perceiver AR models do).
    """
    exponents = torch.arange(0, num_channels, 2, device=positions.device, dtype=torch.float32) / num_channels
    angle = positions[..., None] * 10000.0**-exponents
    angle = angle.repeat_interleave(2, dim=-1)[:, None]
    return Rotation(angle.sin(), angle.cos())
