"""The models: plain PyTorch modules built from a configuration, that take and return plain tensors."""

from perceiver.config import ModelConfig, PerceiverARConfig
from perceiver.models.check import check_model
from perceiver.models.perceiver_ar import PerceiverAR, PerceiverARCache
from perceiver.models.perceiver_io import PerceiverIO

__all__ = ["PerceiverAR", "PerceiverARCache", "PerceiverIO", "build_model", "check_model"]


def build_model(config: ModelConfig, seed: int = 0) -> PerceiverIO | PerceiverAR:
    """The model of a configuration on the current default device, with the initial weights of `seed` (none on "meta").

    Raises:
        UserError: see `check_model`.
    """
    check_model(config)
    return PerceiverAR(config, seed) if isinstance(config, PerceiverARConfig) else PerceiverIO(config, seed)
