"""Images: idx files, scaling, cropping. Arrays are (n, height, width, channels), uint8 as stored."""

from __future__ import annotations

import io
import math
import struct
from typing import Any, Literal, overload

import numpy as np

from perceiver.config import UserError

_UBYTE = 0x08
JPEG = b"\xff\xd8\xff"
"""First bytes of a JPEG file."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""Of TIFF: two tags, and a value of the second."""


IMAGENET_MEAN, IMAGENET_DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
"""Of each colour of ImageNet's pictures, whose range is 0 to 1."""


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


def fitted(image: np.ndarray, size: int, num_channels: int) -> np.ndarray:
    """An image scaled (bicubic) until its shorter side has `size` pixels, and the square in its middle cut out of it.

    Args:
        image: uint8 (height, width, 1 or 3).
        num_channels: 1 or 3: colour becomes grey (ITU-R 601 luma), or grey is repeated.

    Returns:
        uint8 (size, size, num_channels).
    """
    from PIL import Image, ImageOps

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("L" if num_channels == 1 else "RGB")
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)).reshape(size, size, num_channels)


def rgb(image: np.ndarray) -> np.ndarray:
    """(height, width, 1 or 3) with three colours."""
    return np.repeat(image, 3, 2) if image.shape[2] == 1 else image


class BadImage(ValueError):
    """A picture that cannot be read, or not without guessing: the message says why."""

    reason = "bad image"
    """How it is counted."""


def decode_image(data: Any) -> np.ndarray:
    """An image file as (height, width, channels), 1 channel if grey, else 3; uint8. See `picture_pixels`.

    Raises:
        BadImage: it is no image, it is damaged or larger than Pillow opens, or its pixels have no known range.
    """
    from PIL import Image

    if not isinstance(data, bytes):
        raise BadImage("there is no image" if data is None else f"{type(data).__name__} is not the bytes of an image file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return picture_pixels(image)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("it is no image file of a known format, such as PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"it is too large: {str(error).partition(',')[0]}") from None
    except Exception as error:  # Pillow's readers meet damage with errors of every kind
        raise BadImage(f"it is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def check_image(data: Any) -> None:
    """Whether an image file can be decoded, at a fraction of the cost where it is a JPEG: all of its bytes are read, few pixels made.

    Raises:
        BadImage: as `decode_image`.
    """
    if not (isinstance(data, bytes) and data.startswith(JPEG) and _reads_to_its_end(data)):
        decode_image(data)


def _reads_to_its_end(jpeg: bytes) -> bool:
    """Whether all bytes of a JPEG can be read, at an eighth of its size; what is wrong otherwise, the full decoding says."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
    except Exception:  # Pillow's readers meet damage with errors of every kind
        return False
    return True


def framed(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The square in the middle of a picture whose side is 7/8 of the shorter one, scaled (bicubic): how ImageNet models are validated.

    Args:
        pixels: uint8 (any height, any width, 3).

    Returns:
        uint8 (height, width, 3).
    """
    from PIL import Image

    side = max(int(0.875 * min(pixels.shape[:2])), 1)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    middle = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(middle.resize((width, height), Image.Resampling.BICUBIC))


def picture_pixels(image: Any) -> np.ndarray:
    """A Pillow image as (height, width, channels), 1 channel if grey, else 3; uint8.

    It is turned as its EXIF data say. Of 16 bits the upper 8 are kept. What is transparent is seen before white.

    Raises:
        BadImage: 32-bit or other pixels whose range is not known.
    """
    from PIL import ImageOps

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # these two have 16 bits as I
        return _grey_of_16_bits(image, np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16))[..., None]
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise BadImage(f"its pixels (Pillow's mode {image.mode}) have no known range: save it with 8 or 16 bits a channel")
    image = ImageOps.exif_transpose(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        *colours, alpha = np.moveaxis(np.asarray(image.convert("LA" if grey else "RGBA")).astype(np.uint32), -1, 0)
        mixed = [(band * alpha + 255 * (255 - alpha) + 127) // 255 for band in colours]
        return np.stack(mixed, -1).astype(np.uint8)
    array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[..., None] if grey else array


def _grey_of_16_bits(image: Any, values: np.ndarray) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if tags.get(_BITS_PER_SAMPLE, (16,)) != (16,):
        raise BadImage(f"it has {tags[_BITS_PER_SAMPLE][0]} bits a pixel: save it with 8 or 16")
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = ~values
    if isinstance(transparent := image.info.get("transparency"), int):
        values = np.where(values == transparent, np.uint16(0xFFFF), values)
    return (values >> 8).astype(np.uint8)
