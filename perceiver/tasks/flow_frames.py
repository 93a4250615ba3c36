"""Pairs of frames as a flow model takes them: features of pixels, tiles of large frames, and their flows put together again.

As the published model was used (arXiv 2107.14795, Section 4.2, and its notebook): tiles overlap, and where they do their flows are averaged
with weights that fall towards a tile's border.

Shapes: B pairs, H and W of the frames, h and w of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SHARE = 0.01
"""Of what a scaled pixel is made from that must be known."""
Flows = Callable[[Tensor], Tensor]
"""(B, 2, h, w, 3) uint8 -> flow in pixels (B, h, w, 2)."""


def features(frames: Tensor) -> Tensor:
    """The 3 x 3 neighbourhood of each pixel, from -1 to 1, 0 outside of the frame.

    Args:
        frames: (B, 2, h, w, 3) uint8.

    Returns:
        (B, 2, 27, h, w) float32; channels: rows, columns and colours of the neighbourhood.
    """
    size = frames.shape[2:4]
    scaled = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    around = F.unfold(scaled, 3, padding=1).unflatten(1, (3, 9)).transpose(1, 2)
    return around.reshape(len(frames), 2, 27, *size)


def corners(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis of at least a tile's length; neighbours share at least `overlap` pixels."""
    starts = list(range(0, length, tile - overlap))
    return sorted({min(start, length - tile) for start in starts})


def tiled_flow(flows: Flows, pairs: Sequence[Tensor], size: tuple[int, int], overlap: int, at_once: int | None = None) -> list[Tensor]:
    """The flow of frames of any size, from tiles of the model's size.

    Args:
        flows: the model's flow of tiles.
        pairs: each (2, H, W, 3) uint8; smaller ones than a tile are continued by their border.
        size: h and w.
        overlap: pixels that neighbouring tiles share at least.
        at_once: tiles of a call of the model; None: all tiles of all pairs in one call, so that the number of calls does not depend on
            the frames (workers that share a model must call it equally often).

    Returns:
        Of each pair (H, W, 2).
    """
    height, width = size
    tiles, places = [], []
    for number, pair in enumerate(pairs):
        filled = _filled(pair, size)
        for top in corners(filled.shape[1], height, overlap):
            for left in corners(filled.shape[2], width, overlap):
                tiles.append(filled[:, top : top + height, left : left + width])
                places.append((number, top, left))
    step = at_once or len(tiles)
    found = torch.cat([flows(torch.stack(tiles[first : first + step])) for first in range(0, len(tiles), step)])
    weights = tile_weights(size, found.device)
    shapes = [(max(pair.shape[1], height), max(pair.shape[2], width)) for pair in pairs]
    sums = [torch.zeros(*shape, 3, device=found.device) for shape in shapes]
    for (number, top, left), flow in zip(places, found.float(), strict=True):
        part = sums[number][top : top + height, left : left + width]
        part[..., :2] += flow * weights
        part[..., 2:] += weights
    return [(total[..., :2] / total[..., 2:])[: pair.shape[1], : pair.shape[2]] for total, pair in zip(sums, pairs, strict=True)]


def tile_weights(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(h, w, 1): distance of a pixel from the tile's border, 1 at the border."""
    ramps = [torch.minimum(torch.arange(n, device=device) + 1, n - torch.arange(n, device=device)).float() for n in size]
    return torch.minimum(ramps[0][:, None], ramps[1][None])[..., None]


def scaled_flow(flows: Flows, pairs: Sequence[Tensor], size: tuple[int, int], at_once: int | None = None) -> list[Tensor]:
    """The flow of frames of any size, from the whole frames scaled to the model's size; arguments as of `tiled_flow`."""
    small = torch.stack([scaled_frames(pair, size) for pair in pairs])
    step = at_once or len(small)
    found = torch.cat([flows(small[first : first + step]) for first in range(0, len(small), step)])
    return [scale_flow(flow.float(), (pair.shape[1], pair.shape[2])) for flow, pair in zip(found, pairs, strict=True)]


def scaled_frames(pair: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames (2, H, W, 3) uint8 as (2, h, w, 3) uint8."""
    if tuple(pair.shape[1:3]) == tuple(size):
        return pair
    large = pair.permute(0, 3, 1, 2).float()
    small = F.interpolate(large, size, mode="bilinear", align_corners=False, antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def scale_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """A flow (H, W, 2) of frames that are scaled to h x w, in their pixels: (h, w, 2).

    Where some of it is not known (NaN) a pixel has the mean of what is known about it, and is NaN where nothing is.
    """
    height, width = flow.shape[:2]
    if (height, width) == tuple(size):
        return flow
    known = ~flow.isnan().any(-1, keepdim=True)
    values = torch.cat([torch.where(known, flow, 0.0), known.to(flow.dtype)], -1).permute(2, 0, 1)[None]
    found = F.interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)[0].permute(1, 2, 0)
    share = found[..., 2:]
    mean = torch.where(share > _LEAST_SHARE, found[..., :2] / share, torch.nan)
    return mean * torch.tensor([size[1] / width, size[0] / height], device=flow.device)


def _filled(pair: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames of at least the given size, their last row and column repeated where they are smaller."""
    below, right = (max(0, wanted - there) for wanted, there in zip(size, pair.shape[1:3], strict=True))
    if not below and not right:
        return pair
    rows = torch.arange(pair.shape[1] + below, device=pair.device).clamp(max=pair.shape[1] - 1)
    columns = torch.arange(pair.shape[2] + right, device=pair.device).clamp(max=pair.shape[2] - 1)
    return pair[:, rows][:, :, columns]
