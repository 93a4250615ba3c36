"""The factored cross-attention of images is the plain one: equal in value and in every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perceiver.models import ClassOutput, EncoderConfig, ImageInput, PerceiverIO, PerceiverIOConfig, build_model
from perceiver.models.attention import CrossAttentionLayer
from perceiver.models.factored_attention import FactoredInput, factored_attention
from perceiver.models.position import fourier_features
from perceiver.models.shapes import AttentionChannels

BATCH, QUERIES, SHAPE, PIXEL = 3, 5, (6, 7), 3
TABLE = fourier_features(SHAPE, 4)
CHANNELS = PIXEL + TABLE.shape[1]


def make_layer(heads: int, qk: int, v: int, dropout: float, dtype: torch.dtype) -> CrossAttentionLayer:
    torch.manual_seed(0)
    channels = AttentionChannels(q_channels=16, kv_channels=CHANNELS, qk_channels=qk, v_channels=v)
    layer = CrossAttentionLayer(channels, num_heads=heads, widening_factor=1, dropout=dropout)
    for name, parameter in layer.named_parameters():  # no gain is 1 and no bias 0, so that a forgotten one shows
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return layer.to(dtype)


def value_and_gradients(
    layer: CrossAttentionLayer,
    queries: Tensor,
    pixels: Tensor,
    keys_and_values: Callable[[Tensor], Tensor | FactoredInput],
) -> list[Tensor]:
    """The output and the gradients of a scalar of it: of queries, pixels and all parameters."""
    layer.zero_grad()
    queries, pixels = queries.clone().requires_grad_(), pixels.clone().requires_grad_()
    out = layer(queries, keys_and_values(pixels))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), queries.grad, pixels.grad, *(p.grad for p in layer.parameters())]


def both_ways(layer: CrossAttentionLayer, shared_queries: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(1)
    queries = torch.randn(1 if shared_queries else BATCH, QUERIES, 16, dtype=dtype)
    pixels = torch.randn(BATCH, TABLE.shape[0], PIXEL, dtype=dtype)
    table = TABLE.to(dtype)
    torch.manual_seed(2)
    plain = value_and_gradients(layer, queries, pixels, lambda p: torch.cat([p, table.expand(BATCH, -1, -1)], dim=-1))
    torch.manual_seed(2)
    factored = value_and_gradients(layer, queries, pixels, lambda p: FactoredInput.of(p, table, layer.kv_norm.eps))
    return plain, factored


@pytest.mark.parametrize("shared_queries", [True, False])
@pytest.mark.parametrize(("heads", "qk", "v"), [(1, CHANNELS, CHANNELS), (2, 8, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_factored_equals_plain_in_value_and_gradient(
    shared_queries: bool, heads: int, qk: int, v: int, dtype: torch.dtype, tolerance: float
) -> None:
    plain, factored = both_ways(make_layer(heads, qk, v, 0.0, dtype), shared_queries, dtype)
    for expected, actual in zip(plain, factored, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual / scale, expected / scale, atol=tolerance, rtol=0)


def test_dropout_acts_on_the_same_weights_in_the_same_way() -> None:
    """The same seed draws the same weights to drop either way."""
    plain, factored = both_ways(make_layer(2, 8, 12, 0.4, torch.float64), True, torch.float64)
    undisturbed, _ = both_ways(make_layer(2, 8, 12, 0.0, torch.float64), True, torch.float64)
    assert not torch.allclose(plain[0], undisturbed[0], atol=0.01)
    for expected, actual in zip(plain, factored, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_dropout_is_unbiased_and_only_in_training() -> None:
    layer = make_layer(1, 8, 8, 0.5, torch.float64)
    attention, norm = layer.attention, layer.kv_norm
    queries = torch.randn(1, QUERIES, 16, dtype=torch.float64)
    x = FactoredInput.of(torch.randn(1, TABLE.shape[0], PIXEL, dtype=torch.float64), TABLE.double(), norm.eps)
    with torch.no_grad():
        expected = factored_attention(attention.eval(), norm, queries, x)
        torch.testing.assert_close(factored_attention(attention, norm, queries, x), expected, atol=0, rtol=0)
        attention.train()
        mean = torch.stack([factored_attention(attention, norm, queries, x) for _ in range(3000)]).mean(0)
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


def test_half_precision_inputs_give_half_precision_outputs_close_to_the_plain_ones() -> None:
    layer = make_layer(1, 8, 8, 0.0, torch.bfloat16)
    plain, factored = both_ways(layer, True, torch.bfloat16)
    assert factored[0].dtype == torch.bfloat16
    exact, _ = both_ways(layer.double(), True, torch.float64)
    error = lambda value: float((value.double() - exact[0]).abs().max())  # noqa: E731
    assert error(factored[0]) < 2 * error(plain[0])


def image_model(**sizes: int) -> PerceiverIO:
    config = PerceiverIOConfig(
        num_latents=sizes.pop("num_latents", 4),
        num_latent_channels=16,
        input=ImageInput(image_shape=(10, 8, 1), num_frequency_bands=5),
        encoder=EncoderConfig(
            num_cross_attention_heads=1,
            num_cross_attention_layers=2,
            num_self_attention_heads=4,
            num_self_attention_layers_per_block=1,
            num_self_attention_blocks=2,
        ),
        output=ClassOutput(num_classes=3, num_query_channels=16),
        init_scale=0.4,
    )
    return build_model(config).double()


def test_models_choose_by_shape_and_precision() -> None:
    images = torch.rand(1, 10, 8, 1)
    for num_latents, dtype, factored in (
        (4, torch.float32, True),
        (40, torch.float32, True),
        (40, torch.bfloat16, False),
    ):
        adapted = image_model(num_latents=num_latents).to(dtype).encoder.adapt(images)[0]
        assert isinstance(adapted, FactoredInput) == factored
    assert isinstance(image_model(num_latents=1000).encoder.adapt(images)[0], Tensor)


def test_whole_model_is_the_same_either_way() -> None:
    model = image_model()
    images = torch.randn(3, 10, 8, 1, dtype=torch.float64)
    factored = model(images)
    model.encoder.factored = False
    torch.testing.assert_close(factored, model(images), atol=1e-10, rtol=1e-10)
