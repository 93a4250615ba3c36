"""Shapes of the tensors that a model is given, checked with one sentence in place of an error from deep inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from perceiver.config import UserError


class WrongTensor(UserError):
    """A tensor that is not of the shape or type that takes it."""


Size = int | str | tuple[str, int]
"""Size of a dimension: this one; any (its letter); any up to a number (its letter and the number)."""
Shape = tuple[Size, ...]


def check_tensor(given: Any, shape: Shape, says: str, whole_numbers: bool = False) -> None:
    """Looks whether a tensor has a shape.

    Args:
        given: the tensor; anything else passes, as inputs of several parts are mappings.
        shape: what it must be.
        says: the sentence's beginning: who takes it.
        whole_numbers: it holds ids, no floats.

    Raises:
        WrongTensor: it has another shape or type; the sentence has both shapes.
    """
    if not isinstance(given, Tensor):
        return
    if given.ndim != len(shape) or not all(_fits(size, wanted) for size, wanted in zip(given.shape, shape, strict=True)):
        raise WrongTensor(f"{says} a tensor of shape {spelled_shape(shape)}, not {tuple(given.shape)}")
    if whole_numbers and (given.is_floating_point() or given.is_complex()):
        raise WrongTensor(f"{says} ids, a tensor of whole numbers of shape {spelled_shape(shape)}, not one of {given.dtype}")


def spelled_shape(shape: Shape) -> str:
    """A shape for a sentence: (B, 28, 28, 1), or (B, N) with N at most 2048."""
    names = [size[0] if isinstance(size, tuple) else str(size) for size in shape]
    limits = [f"{size[0]} at most {size[1]}" for size in shape if isinstance(size, tuple)]
    return f"({', '.join(names)})" + (f" with {', '.join(limits)}" if limits else "")


def _fits(size: int, wanted: Size) -> bool:
    if isinstance(wanted, tuple):
        return size <= wanted[1]
    return isinstance(wanted, str) or size == wanted
