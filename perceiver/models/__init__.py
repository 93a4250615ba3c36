"""The models: plain PyTorch modules built from a configuration, that take and return plain tensors."""

from typing import Any

import torch

from perceiver.config import ModelConfig
from perceiver.models.check import check_model
from perceiver.models.perceiver_ar import PerceiverAR, PerceiverARCache
from perceiver.models.perceiver_io import PerceiverIO

__all__ = ["PerceiverAR", "PerceiverARCache", "PerceiverIO", "build_model", "check_model"]


def build_model(config: ModelConfig, seed: int = 0) -> Any:
    """The model of a configuration on the current default device, with the initial weights of `seed` (none on "meta").

    Raises:
        UserError: see `check_model`.
    """
    check_model(config)
    device = torch.get_default_device()
    with torch.device("meta"):
        model = config.build()
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights(seed)
    return model
