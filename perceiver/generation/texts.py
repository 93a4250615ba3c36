"""Texts of users as batches of a model: ids with padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perceiver.config import UserError


def pad_left(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as (B, N), and where padding is (B, N); None where there is none."""
    return _pad(rows, device, left=True)


def pad_right(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as (B, N), and where padding is (B, N); None where there is none."""
    return _pad(rows, device, left=False)


def _pad(rows: Sequence[np.ndarray], device: torch.device, left: bool) -> tuple[Tensor, Tensor | None]:
    length = max(map(len, rows))
    ids, padding = np.zeros((len(rows), length), np.int64), np.ones((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[i, place], padding[i, place] = row, False
    mask = torch.from_numpy(padding).to(device) if padding.any() else None
    return torch.from_numpy(ids).to(device), mask


def check_text(value: Any) -> str:
    """Raises UserError where a value is no text that can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"the input must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError("the input has a lone surrogate, which no UTF-8 text can hold") from None
    return value
