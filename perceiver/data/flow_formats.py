"""Files of optical flow: Middlebury's .flo, .pfm, and the 16-bit PNG of KITTI and HD1K, read and written.

A flow is float32 (height, width, 2): how many pixels to the right and down a pixel of the first frame has moved; NaN where that is not
known.
"""

from __future__ import annotations

import re
import struct

import numpy as np

from perceiver.config import UserError

_MAGIC = b"PIEH"
_UNKNOWN = 1e9
"""Middlebury's mark: a flow of more than this is not known."""
_KITTI_ZERO, _KITTI_STEPS = 2.0**15, 64.0
_LARGEST = 1 << 28
"""Pixels of a flow, at most: what a damaged head asks for is not allocated."""
_PNG = b"\x89PNG\r\n\x1a\n"


class NotFlow(UserError):
    """A file that holds no optical flow: the message is the reason."""


def read_flow(data: bytes) -> np.ndarray:
    """The flow in a file of any of the formats, which its first bytes tell.

    Raises:
        NotFlow: it is of none of them, or damaged.
    """
    if data[:4] == _MAGIC:
        return read_flo(data)
    if data[:2] in (b"PF", b"Pf"):
        return read_pfm(data)
    if data[:8] == _PNG:
        return read_kitti(data)
    raise NotFlow("it is empty" if not data else "it is no .flo, .pfm or 16-bit .png file of optical flow")


def read_flo(data: bytes) -> np.ndarray:
    """A Middlebury .flo file (https://vision.middlebury.edu/flow/code/flow-code/README.txt).

    Raises:
        NotFlow: other magic number, or other length than the head says.
    """
    if data[:4] != _MAGIC or len(data) < 12:
        raise NotFlow("it is no .flo file: it does not begin with PIEH and a size")
    width, height = struct.unpack("<2i", data[4:12])
    _check_size(height, width)
    if len(data) != 12 + 8 * height * width:
        raise NotFlow(f"it has {len(data):,} bytes, and {width} x {height} pixels of flow take {12 + 8 * height * width:,}")
    return _known(np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2))


def write_flo(flow: np.ndarray) -> bytes:
    """A flow (height, width, 2) as a .flo file; what is not known has the mark of such."""
    height, width, _ = flow.shape
    values = np.where(np.isnan(flow), 2 * _UNKNOWN, flow).astype("<f4")
    return _MAGIC + struct.pack("<2i", width, height) + values.tobytes()


def read_pfm(data: bytes) -> np.ndarray:
    """A .pfm file with three channels, of which the first two are the flow, as FlyingThings3D has them (rows from the bottom up).

    Raises:
        NotFlow: another number of channels, or other length than the head says.
    """
    head = re.match(rb"(P[Ff])\s+(\d{1,9})\s+(\d{1,9})\s+(-?[\d.]+(?:[eE][-+]?\d+)?)\s", data[:128])
    if head is None:
        raise NotFlow("it is no .pfm file: its head has no size and scale")
    if head[1] != b"PF":
        raise NotFlow("it is a .pfm file with one channel, and optical flow has two (in a file of three)")
    width, height = int(head[2]), int(head[3])
    _check_size(height, width)
    size = head.end() + 12 * height * width
    if len(data) != size:
        raise NotFlow(f"it has {len(data):,} bytes, and {width} x {height} pixels of three channels take {size:,}")
    values = np.frombuffer(data, "<f4" if float(head[4]) < 0 else ">f4", offset=head.end()).reshape(height, width, 3)
    return _known(values[::-1, :, :2])


def read_kitti(data: bytes) -> np.ndarray:
    """A 16-bit PNG: flow as (value - 2^15) / 64 in the first two channels, whether it is known in the third.

    Raises:
        NotFlow: a PNG of another kind, or a damaged one.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_png

    # The head of a PNG: length and name of its first part, then width, height, bits of a channel, kind (2: red, green and blue).
    if data[:8] != _PNG or len(data) < 26 or data[24:26] != b"\x10\x02":
        raise NotFlow("it is no PNG with three channels of 16 bits")
    _check_size(*reversed(struct.unpack(">2I", data[16:24])))
    try:  # libpng alone reads three channels of 16 bits; Pillow keeps 8 of them
        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    except RuntimeError as error:
        raise NotFlow(f"it is a damaged PNG ({str(error).splitlines()[0]})") from None
    values = pixels.to(torch.int32).permute(1, 2, 0).numpy()
    flow = (values[..., :2].astype(np.float32) - np.float32(_KITTI_ZERO)) / np.float32(_KITTI_STEPS)
    return np.where(values[..., 2:] > 0, flow, np.float32(np.nan))


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or height * width > _LARGEST:
        raise NotFlow(f"its head says {width} x {height} pixels")


def _known(values: np.ndarray) -> np.ndarray:
    """Flow in the machine's order of bytes, NaN where it is not known."""
    flow = values.astype(np.float32)
    with np.errstate(invalid="ignore"):
        unknown = ~(np.abs(flow) <= _UNKNOWN).all(-1, keepdims=True)
    return np.where(unknown, np.float32(np.nan), flow)
