"""Which of a model's weights are the matrices of its layers: those that some optimizers treat apart."""

from __future__ import annotations

from torch import nn


def layer_matrices(model: nn.Module) -> set[int]:
    """The ids of the weights of all linear modules in the model's `layers()`."""
    layers = model.layers()  # type: ignore[operator]
    return {id(module.weight) for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
