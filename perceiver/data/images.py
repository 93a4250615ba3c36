"""Images: idx files, scaling, cropping. Arrays are (n, height, width, channels), uint8 as stored."""

from __future__ import annotations

import io
import math
import struct
from typing import Literal, overload

import numpy as np

from perceiver.config import UserError

_UBYTE = 0x08


def scale(images: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def random_crop(images: np.ndarray, side: int, places: np.ndarray) -> np.ndarray:
    """Cuts a square out of each image at its own place.

    Args:
        images: (n, height, width, channels).
        side: height and width of the squares.
        places: (n, 2) in [0, 1): where between top (left) and bottom (right) each square lies; 0.5: in the middle.

    Returns:
        (n, side, side, channels).

    Raises:
        ValueError: the images are smaller than the squares.
    """
    n, height, width, _ = images.shape
    if not 1 <= side <= min(height, width):
        raise ValueError(f"squares of {side} pixels cannot be cut out of images of {height} x {width}")
    room = np.array([height - side + 1, width - side + 1])
    top, left = np.minimum((places * room).astype(np.int64), room - 1).T
    views = np.lib.stride_tricks.sliding_window_view(images, (side, side), axis=(1, 2))
    return np.moveaxis(views[np.arange(n), top, left], 1, -1)


@overload
def parse_idx(data: bytes, ndim: int, name: str) -> np.ndarray: ...


@overload
def parse_idx(data: bytes, ndim: int, name: str, head_only: Literal[True]) -> tuple[int, ...]: ...


def parse_idx(data: bytes, ndim: int, name: str, head_only: bool = False) -> np.ndarray | tuple[int, ...]:
    """An idx file of unsigned bytes (http://yann.lecun.com/exdb/mnist): 3 dimensions for images, 1 for labels.

    Args:
        data: the unpacked file; with `head_only` its first bytes suffice.
        name: what messages call it.

    Returns:
        The array, uint8; with `head_only` the shape of one item.

    Raises:
        UserError: other magic number, or other length than the head says.
    """
    head = 4 * (1 + ndim)
    expected = _UBYTE << 8 | ndim
    if len(data) < head:
        raise UserError(f"{name} is no idx file: it has {len(data)} bytes, the head alone has {head}")
    magic, *shape = struct.unpack(f">{1 + ndim}i", data[:head])
    if magic != expected:
        raise UserError(f"{name} is no idx file of unsigned bytes in {ndim} dimensions: magic {magic}, expected {expected}")
    if any(size < 0 for size in shape) or any(size == 0 for size in shape[1:]):
        raise UserError(f"{name} is no idx file: its head says shape {tuple(shape)}")
    if head_only:
        return tuple(shape[1:])
    size = head + math.prod(shape)
    if len(data) != size:
        raise UserError(f"{name} has {len(data):,} bytes, its head (shape {tuple(shape)}) asks for {size:,}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def decode_image(data: bytes) -> np.ndarray:
    """A PNG or JPEG file as (height, width, channels), 1 channel if grey, else 3; uint8.

    Raises:
        OSError: it is no image.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        grey = image.mode in ("1", "L", "LA", "I;16")
        array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[..., None] if grey else array
