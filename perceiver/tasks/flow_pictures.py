"""Optical flow as pictures, in the usual colours: hue says where to, saturation how far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_UNKNOWN = 40
"""Grey of pixels whose flow is not known."""
_GAP = 4


def flow_picture(*flows: np.ndarray) -> list[np.ndarray]:
    """Flows (height, width, 2) as pictures (height, width, 3) uint8 of one scale: the longest has the full colour."""
    from torchvision.utils import flow_to_image

    stacked = torch.from_numpy(np.stack(flows).astype(np.float32)).permute(0, 3, 1, 2)
    unknown = stacked.isnan().any(1)
    pictures = flow_to_image(torch.where(unknown[:, None], 0.0, stacked)).permute(0, 2, 3, 1)
    return list(torch.where(unknown[..., None], _UNKNOWN, pictures).to(torch.uint8).numpy())


def beside(shown: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """First frames (height, width, 3), true and predicted flows (height, width, 2), a row of three pictures for each."""
    rows = []
    for frame, truth, said in shown:
        parts = [frame, *flow_picture(truth, said)]
        rows.append(np.concatenate([np.pad(part, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255) for part in parts], 1))
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows])
