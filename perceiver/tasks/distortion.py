"""Random distortions of training images: turned, scaled and moved, each image by its own numbers."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


def distorted(images: np.ndarray, draws: np.ndarray, rotation: float, scaling: float, shift: float) -> np.ndarray:
    """Images turned about their middle, scaled and moved (bilinear; beyond an edge its pixels are repeated).

    Args:
        images: uint8 (n, height, width, channels).
        draws: (n, 4) in [0, 1): angle, size, and the shifts to the right and down; 0.5: unchanged.
        rotation: greatest angle in degrees, either way.
        scaling: greatest change of size, as a share of it, either way.
        shift: greatest shift, as a share of width and height, either way.

    Returns:
        uint8, of the same shape.
    """
    n, height, width, channels = images.shape
    if not n:
        return images
    turn, size, right, down = (2 * torch.from_numpy(draws.astype(np.float32)) - 1).T
    angle, scale = turn * math.radians(rotation), 1 / (1 + size * scaling)
    # A grid says for each pixel where its value is read: the inverse of what is done to the image. A side has length 2 there.
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = (
        torch.stack([cos, sin * (height / width), -2 * shift * right], 1),
        torch.stack([-sin * (width / height), cos, -2 * shift * down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [n, channels, height, width], align_corners=False)
    pixels = torch.from_numpy(np.array(np.moveaxis(images, -1, 1), np.float32))
    read = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return np.moveaxis(read.round().clamp(0, 255).to(torch.uint8).numpy(), 1, -1)
