"""The first layers of transformers' image classifiers under our names, and back. All functions are pure."""

from __future__ import annotations

import torch

from perceiver.config import UserError
from perceiver.interop.names import Rules, StateDict

EPS = 1e-5
"""Of torch's batch normalisation, as transformers has it."""
_PIXELS, _CONVOLUTION, _NORM = (f"perceiver.input_preprocessor.{name}" for name in ("convnet_1x1.", "convnet.conv.", "convnet.batchnorm."))

FROM_TRANSFORMERS: Rules = (
    (r"perceiver\.input_preprocessor\.convnet_1x1\.", "encoder.input_adapter.linear."),
    (r"perceiver\.input_preprocessor\.convnet\.conv\.", "encoder.input_adapter.convolution."),
    (r"perceiver\.input_preprocessor\.position_embeddings\.position_embeddings$", "encoder.input_adapter.positions"),
    (r"perceiver\.input_preprocessor\.positions_projection\.", "encoder.input_adapter.position_projection."),
)
TO_TRANSFORMERS: Rules = (
    (r"encoder\.input_adapter\.convolution\.", _CONVOLUTION),
    (r"encoder\.input_adapter\.positions$", "perceiver.input_preprocessor.position_embeddings.position_embeddings"),
    (r"encoder\.input_adapter\.position_projection\.", "perceiver.input_preprocessor.positions_projection."),
)


def without_norm(state_dict: StateDict) -> StateDict:
    """A state dict of transformers whose convolution has the batch normalisation of evaluation in it; 1 x 1 convolutions as matrices.

    Raises:
        UserError: a part of the normalisation is missing.
    """
    found = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_NORM)}
    if (pixels := found.get(f"{_PIXELS}weight")) is not None and pixels.ndim == 4:
        found[f"{_PIXELS}weight"] = pixels[:, :, 0, 0].contiguous()
    if (kernel := found.get(f"{_CONVOLUTION}weight")) is None or len(found) == len(state_dict):
        return found
    norm = {name.removeprefix(_NORM): tensor for name, tensor in state_dict.items() if name.startswith(_NORM)}
    if missing := [name for name in ("weight", "bias", "running_mean", "running_var") if name not in norm]:
        raise UserError(f"weight '{_NORM}{missing[0]}' is missing")
    scale = norm["weight"].double() / (norm["running_var"].double() + EPS).sqrt()
    found[f"{_CONVOLUTION}weight"] = (kernel.double() * scale[:, None, None, None]).to(kernel.dtype)
    found[f"{_CONVOLUTION}bias"] = (norm["bias"].double() - norm["running_mean"].double() * scale).to(kernel.dtype)
    return found


def with_norm(state_dict: StateDict) -> StateDict:
    """The inverse, of a state dict under the names of transformers: with a normalisation that adds the convolution's bias alone."""
    found = dict(state_dict)
    if (bias := found.pop(f"{_CONVOLUTION}bias", None)) is None:
        return found
    zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)
    norm = {"weight": (ones.double() + EPS).sqrt().to(bias.dtype), "bias": bias, "running_mean": zeros, "running_var": ones}
    return found | {f"{_NORM}{name}": tensor for name, tensor in norm.items()} | {f"{_NORM}num_batches_tracked": torch.tensor(0)}


def with_kernels(state_dict: StateDict) -> StateDict:
    """A state dict under the names of transformers whose pixels are projected by a convolution of 1 x 1 again."""
    old, new = "perceiver.input_preprocessor.conv_after_patches.", _PIXELS
    found = {name.replace(old, new): tensor for name, tensor in state_dict.items()}
    found[f"{new}weight"] = found[f"{new}weight"][:, :, None, None].contiguous()
    return found
