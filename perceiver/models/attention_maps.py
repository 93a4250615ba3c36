"""What latents read of the input: the weights of a model's cross-attention, computed beside it.

Kernels of attention do not give their weights away, so they are computed once more from what the layer was called with.

Shapes: B batch, H heads, L latents, N input positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perceiver.config import UserError
from perceiver.models.attend import causal_mask
from perceiver.models.attention import CrossAttentionLayer
from perceiver.models.factored_attention import FactoredInput
from perceiver.models.position import Rotation


def encoder_layers(model: nn.Module) -> list[CrossAttentionLayer]:
    """The cross-attention layers through which a model's latents read its input; those of a decoder are none.

    Raises:
        UserError: the model has none.
    """
    encoder = getattr(model, "encoder", model)
    found = [getattr(encoder, name, None) for name in ("cross_attention_1", "cross_attention_n", "cross_attention")]
    layers = [layer for layer in found if isinstance(layer, CrossAttentionLayer)]
    if not layers:
        raise UserError(f"a {type(model).__name__} has no cross-attention to its input, so there are no maps of it")
    return layers


@contextmanager
def recorded_maps(model: nn.Module, layer: int = 0) -> Iterator[list[Tensor]]:
    """The maps of the forward passes that are made meanwhile: one (B, H, L, N) for each, in float32.

    Args:
        model: a `PerceiverIO`, `PerceiverEncoder` or `PerceiverAR`.
        layer: number of the cross-attention in a pass, from 0; models with repeated cross-attention have several.
    """
    maps: list[Tensor] = []
    calls = 0

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal calls
        if calls % count == layer:
            assert isinstance(module, CrossAttentionLayer)
            maps.append(attention_weights(module, *arguments, **named))
        calls += 1

    layers = encoder_layers(model)
    count = getattr(getattr(model, "encoder", model), "num_cross_attention_layers", 1)
    if not 0 <= layer < count:
        raise UserError(f"layer is {layer}, but the model has {count} cross-attention layers: 0 to {count - 1}")
    hooks = [each.register_forward_pre_hook(record, with_kwargs=True) for each in layers]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(
    layer: CrossAttentionLayer,
    x_q: Tensor,
    x_kv: Tensor | FactoredInput | None = None,
    *,
    prefix: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    rotate_q: Rotation | None = None,
    rotate_k: Rotation | None = None,
    cache: Any = None,
) -> Tensor:
    """The weights with which a layer attends when it is called with these arguments (`CrossAttentionLayer.forward`).

    Returns:
        (B, H, L, N) in float32: over N they add up to 1.
    """
    assert cache is None, "maps are of whole inputs"
    queries = layer.q_norm(x_q)
    if isinstance(x_kv, FactoredInput):
        x_kv = torch.cat([x_kv.pixels, x_kv.table.expand(len(x_kv.pixels), -1, -1)], dim=-1)
    if prefix is not None:
        inputs = torch.cat([layer.kv_norm(prefix), queries], dim=1) if prefix.shape[1] else queries
    else:
        assert x_kv is not None
        inputs = layer.kv_norm(x_kv)
    attention = layer.attention
    q, k = attention.split_heads(attention.q_proj(queries)), attention.split_heads(attention.k_proj(inputs))
    q = q if rotate_q is None else rotate_q(q)
    k = k if rotate_k is None else rotate_k(k)
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT
    if causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)
