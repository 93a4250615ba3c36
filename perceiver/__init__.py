"""Perceiver, Perceiver IO and Perceiver AR in PyTorch: models, tasks, data, training, inference. Knows nothing of
Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perceiver.inference.trained import TrainedModel

__all__ = ["load"]


def load(source: str | Path, checkpoint: str = "best", *, device: str = "auto", precision: str = "fp32") -> TrainedModel:
    """A trained model by a run's folder or name, an exported folder, or a name on the hub; see
    `perceiver.inference.load`.

    Raises:
        UserError: there is no such model; says where it was looked for.
    """
    # Here and not above: to import the package takes no PyTorch.
    from perceiver.inference.load import load as load_model

    return load_model(source, checkpoint, device=device, precision=precision)
