"""The resampler: latents for another model, from any number of vectors."""

import pytest
import torch
import torch.nn.functional as F

from perceiver.config import UserError
from perceiver.models import Resampler


def small(**settings) -> Resampler:
    return Resampler(6, **({"num_latents": 3, "num_channels": 8, "num_layers": 1, "num_heads": 2} | settings))


def normed(x, layer):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


def attended(layer, x, context):
    """A cross- or self-attention layer of a few lines."""
    attention = layer.attention
    q, k, v = attention.q_proj(x), attention.k_proj(context), attention.v_proj(context)
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.o_proj((weights @ v).transpose(1, 2).flatten(2))


def test_it_is_what_a_few_lines_compute() -> None:
    torch.manual_seed(0)
    model = small(num_cross_attention_layers=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    values = torch.randn(2, 5, 6)
    encoder = model.encoder
    adapted = encoder.input_adapter(values)
    adapted = adapted[0] if isinstance(adapted, tuple) else adapted
    x = encoder.latents.expand(2, -1, -1)
    for cross, block in ((encoder.cross_attention_1, encoder.self_attention_1), (encoder.cross_attention_n, encoder.self_attention_n)):
        x = x + attended(cross, normed(x, cross.q_norm), normed(adapted, cross.kv_norm))
        x = x + cross.mlp(x)
        for layer in block:
            inner = normed(x, layer.norm)
            x = x + attended(layer, inner, inner)
            x = x + layer.mlp(x)
    torch.testing.assert_close(model(values), normed(x, model.norm), atol=1e-5, rtol=1e-4)


def test_padding_and_the_order_of_the_input_do_not_matter() -> None:
    model, x = small().eval(), torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 5:] = True
    other = x.clone()
    other[:, 5:] = 100
    torch.testing.assert_close(model(x, mask), model(other, mask))
    torch.testing.assert_close(model(x[:, :5]), model(x, mask))
    torch.testing.assert_close(model(x), model(x.flip(1)), atol=1e-5, rtol=1e-4)
    assert (model(x) - model(x, mask)).abs().max() > 1e-4


def test_it_trains_inside_another_module_and_its_state_dict_is_a_plain_one() -> None:
    class Captioner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resampler, self.head = small(), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.resampler(x).mean(1))

    model = Captioner()
    model(torch.randn(2, 9, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    again = Captioner()
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, 6)
    assert torch.equal(model(x), again(x)) and model(x).shape == (1, 4)


def test_the_same_seed_gives_the_same_weights_and_impossible_sizes_are_named() -> None:
    one, other = small(seed=3), small(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match="heads"):
        Resampler(6, num_channels=10, num_heads=4)
