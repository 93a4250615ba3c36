"""A model's layers: which of its weights are their matrices, which some optimizers treat apart, and which of them are neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def layer_matrices(model: nn.Module) -> set[int]:
    """The ids of the weights of all linear modules in the model's `layers()`."""
    layers = model.layers()  # type: ignore[operator]
    return {id(module.weight) for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}


def blocks_of(model: nn.Module) -> list[str]:
    """For each of a model's `layers()` the name of the list of layers that it is in; "" where it is in none."""
    names = {id(module): name for name, module in model.named_modules()}
    places = [names[id(layer)].rpartition(".") for layer in model.layers()]  # type: ignore[operator]
    return [place if number.isdecimal() else "" for place, _, number in places]


def neighbours(blocks: Sequence[str], size: int) -> list[list[int]]:
    """The numbers of layers in parts of up to `size` neighbours of one block (`blocks_of`): they always run one after the other, where a
    block may run several times, and other layers between its runs.
    """
    parts: list[list[int]] = []
    for number, block in enumerate(blocks):
        if not (number and block and block == blocks[number - 1] and len(parts[-1]) < size):
            parts.append([])
        parts[-1].append(number)
    return parts
