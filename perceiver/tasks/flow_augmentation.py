"""Augmentation of pairs of frames with their flow, as RAFT's (arXiv 2003.12039, Appendix): colours, a rectangle that is hidden, scale,
stretch, mirror image, and a crop. All is a function of uniform numbers that are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 32
"""Uniform numbers that one pair takes."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much training pairs are changed; see the fields of the same names of the task."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    asymmetric: float = 0.0
    erase: float = 0.0
    scale: tuple[float, float] = (0.0, 0.0)
    stretch: float = 0.0
    mirror: float = 0.0
    mirror_vertical: float = 0.0


def augmented(frames: Tensor, flow: Tensor, size: tuple[int, int], how: Augmentation, drawn: list[float]) -> tuple[Tensor, Tensor]:
    """A pair as it is trained on.

    Args:
        frames: (2, H, W, 3) uint8.
        flow: (H, W, 2), NaN where it is not known.
        size: h and w of what is cut out; smaller frames are enlarged.
        drawn: NUMBERS uniform numbers.

    Returns:
        (2, h, w, 3) uint8 and (h, w, 2).
    """
    frames, flow = cut(frames, flow, size, how, drawn[20:26])
    if how.brightness or how.contrast or how.saturation or how.hue:
        frames = _colours(frames, how, drawn[:9])
    if drawn[9] < how.erase:
        frames = _erased(frames, drawn[10:19])
    if drawn[26] < how.mirror:
        frames, flow = frames.flip(2), flow.flip(1) * torch.tensor([-1.0, 1.0])
    if drawn[27] < how.mirror_vertical:
        frames, flow = frames.flip(1), flow.flip(0) * torch.tensor([1.0, -1.0])
    return frames.contiguous(), flow.contiguous()


def cut(frames: Tensor, flow: Tensor, size: tuple[int, int], how: Augmentation, drawn: list[float]) -> tuple[Tensor, Tensor]:
    """A part of a pair at a random place (drawn[4], drawn[5]), after a change of its scale."""
    height, width = flow.shape[:2]
    low, high = how.scale
    both = 2.0 ** (low + (high - low) * drawn[0])
    stretches = [2.0 ** (how.stretch * (2 * number - 1)) for number in drawn[1:3]]
    least = max(size[0] / height, size[1] / width, 0.0)
    across, down = (max(both * stretch, least) for stretch in stretches)
    if across == down == 1.0:
        top = min(int(drawn[4] * (height - size[0] + 1)), height - size[0])
        left = min(int(drawn[5] * (width - size[1] + 1)), width - size[1])
        return frames[:, top : top + size[0], left : left + size[1]], flow[top : top + size[0], left : left + size[1]]
    # What is cut out, in pixels of the frames as they are.
    rows = _places(height, size[0], down, drawn[4])
    columns = _places(width, size[1], across, drawn[5])
    grid = torch.stack(torch.meshgrid((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1, indexing="xy"), -1)[None]
    taken = F.grid_sample(
        frames.permute(0, 3, 1, 2).float(), grid.expand(2, -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    known = not bool(flow.isnan().any())
    found = F.grid_sample(
        flow.permute(2, 0, 1)[None], grid, mode="bilinear" if known else "nearest", padding_mode="border", align_corners=False
    )
    moved = found[0].permute(1, 2, 0) * torch.tensor([across, down])
    return taken.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1), moved


def _places(length: int, size: int, scale: float, drawn: float) -> Tensor:
    """Where `size` pixels of a scaled axis lie on it as it is."""
    start = drawn * max(length - size / scale, 0.0)
    return start + (torch.arange(size) + 0.5) / scale - 0.5


def _colours(frames: Tensor, how: Augmentation, drawn: list[float]) -> Tensor:
    """Other brightness, contrast, saturation and hue: of both frames, or of each its own."""
    images = frames.permute(0, 3, 1, 2)
    if drawn[8] < how.asymmetric:
        parts = [_changed(images[i : i + 1], how, drawn[4 * i : 4 * i + 4]) for i in range(2)]
        return torch.cat(parts).permute(0, 2, 3, 1)
    return _changed(images, how, drawn[:4]).permute(0, 2, 3, 1)


def _changed(images: Tensor, how: Augmentation, drawn: list[float]) -> Tensor:
    from torchvision.transforms.v2 import functional as colours  # here, as it loads torch's compiler

    signed = [2 * number - 1 for number in drawn]
    images = colours.adjust_brightness(images, 1 + how.brightness * signed[0])
    images = colours.adjust_contrast(images, 1 + how.contrast * signed[1])
    images = colours.adjust_saturation(images, 1 + how.saturation * signed[2])
    return colours.adjust_hue(images, how.hue * signed[3]) if how.hue else images


def _erased(frames: Tensor, drawn: list[float]) -> Tensor:
    """One or two rectangles of the second frame in its mean colour, as if something stood before it."""
    second = frames[1].clone()
    mean = second.float().mean((0, 1)).round().to(torch.uint8)
    height, width = second.shape[:2]
    for number in range(1 + (drawn[0] < 0.5)):
        top, left, tall, wide = drawn[1 + 4 * number : 5 + 4 * number]
        # As in RAFT: sides of 50 to 100 pixels where crops are 368 high.
        rows, columns = (max(1, round((0.136 + 0.136 * share) * height)) for share in (tall, wide))
        y, x = int(top * height), int(left * width)
        second[y : y + rows, x : x + columns] = mean
    return torch.stack([frames[0], second])
