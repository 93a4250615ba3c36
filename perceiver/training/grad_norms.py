"""Norms of the gradient by layer (`run.layer-grad-norms`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REST = "rest"
"""What belongs to no layer: embeddings, latents, output."""


def layer_grad_norms(model: nn.Module) -> dict[str, Tensor]:
    """The Euclidean norm of each layer's gradient, by the layer's name in the model: float32, (). Called on all workers alike.

    Parameters that several layers share count for the first.
    """
    names = {id(module): name for name, module in model.named_modules()}
    place: dict[int, str] = {}
    for layer in model.layers():  # type: ignore[operator]
        for parameter in layer.parameters():
            place.setdefault(id(parameter), names[id(layer)])
    squares: dict[str, Tensor] = {}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        name = place.get(id(parameter), REST)
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        squares[name] = squares.get(name, torch.zeros_like(norm)) + norm**2
    return {name: square.sqrt() for name, square in squares.items()}
