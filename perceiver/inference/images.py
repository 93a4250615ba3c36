"""Images of users as batches of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perceiver.config import UserError
from perceiver.data.images import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    BadImage,
    decode_image,
    fitted,
    framed,
    picture_pixels,
    random_crop,
    scale,
)

ImageLike = Any
"""An image: a path, the bytes of a PNG or JPEG file, an array or tensor (height, width[, channels]) of uint8,
or a Pillow image. Several: a list of them, or an array or tensor (images, height, width, channels)."""


def images_of(
    values: Sequence[Any], shape: tuple[int, int, int], crop: int | None = None, photos: bool = False, size: int | None = None
) -> np.ndarray:
    """Images of a user as a model takes them: float32 (B, height, width, channels).

    Args:
        values: see `ImageLike`.
        shape: of the model's pictures: height, width, channels.
        crop: side length that larger images are cut to, in the middle, as in validation; None: none is cut.
        photos: images of any size, see `photo`; otherwise they must have the model's size, and pixels are scaled to
            [-1, 1].
        size: images of any size are scaled and cut to it as in training (`perceiver.data.images.fitted`).

    Raises:
        UserError: what is no image, or has another size than the model's.
    """
    if photos:
        return np.stack([photo(_pixels(value)[0], *shape[:2]) for value in values])
    if size is not None:
        values = [fitted(_pixels(value)[0], size, shape[2]) for value in values]
    return scale(np.stack([_image(value, shape, crop) for value in values]))


def photo(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A photo as the published ImageNet models want it: the middle 7/8, scaled (bicubic), less ImageNet's mean, over
    its deviation.

    Args:
        pixels: uint8 (any height, any width, 1 or 3).

    Returns:
        float32 (height, width, 3).
    """
    scaled = framed(_with_channels(pixels, 3), height, width).astype(np.float32) / 255
    return (scaled - IMAGENET_MEAN) / IMAGENET_DEVIATION


def _image(value: Any, shape: tuple[int, int, int], crop: int | None) -> np.ndarray:
    pixels, name = _pixels(value)
    height, width, channels = shape
    pixels = _with_channels(pixels, channels)
    if crop is not None and min(pixels.shape[:2]) >= crop and pixels.shape[:2] != (height, width):
        pixels = random_crop(pixels[None], crop, np.full((1, 2), 0.5))[0]
    if pixels.shape != shape:
        raise UserError(
            f"{name} is {pixels.shape[0]} x {pixels.shape[1]} pixels with {pixels.shape[2]} channels and must be "
            f"{height} x {width} with {channels}, as the model was trained"
        )
    return pixels


def pixels_of(value: ImageLike) -> np.ndarray:
    """An image of any size as uint8 (height, width, 1 or 3).

    Raises:
        UserError: it is none.
    """
    return _pixels(value)[0]


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey as colour, or colour as grey (ITU-R 601 luma, as Pillow converts)."""
    if pixels.shape[-1] == 3 and channels == 1:
        return np.rint(pixels.astype(np.float32) @ np.float32([[0.299], [0.587], [0.114]])).astype(np.uint8)
    return np.repeat(pixels, channels, -1) if pixels.shape[-1] == 1 else pixels


def _pixels(value: Any) -> tuple[np.ndarray, str]:
    """An image as uint8 (height, width, channels), and what messages call it."""
    if isinstance(value, torch.Tensor):
        value = value.cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise UserError(f"an image array must be uint8 (height, width[, channels]), not {value.dtype} {value.shape}")
        return (value[..., None] if value.ndim == 2 else value), "the image"
    if isinstance(value, (str, Path)):
        path, name = Path(value).expanduser(), str(value)
        if not path.is_file():
            raise UserError(f"there is no image file {name}")
        value = path.read_bytes()
    else:
        name = "the image"
    try:
        if isinstance(value, bytes):
            return decode_image(value), name
        if hasattr(value, "convert") and hasattr(value, "mode"):  # a Pillow image, without importing Pillow
            return picture_pixels(value), name
    except BadImage as error:
        raise UserError(f"{name} is no image that can be read: {error}") from None
    raise UserError(f"an image must be a path, bytes, a uint8 array or tensor, or a Pillow image, not {type(value).__name__}")
