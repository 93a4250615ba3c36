"""Maps of cross-attention are the weights that the layers attend with, and shapes that do not fit are named."""

import numpy as np
import pytest
import torch

import perceiver
from perceiver.config import UserError
from perceiver.models import (
    ArrayInput,
    ClassOutput,
    EncoderConfig,
    FeatureInput,
    ImageInput,
    PerceiverARConfig,
    PerceiverEncoder,
    PerceiverIOConfig,
    build_model,
)
from perceiver.models.attention import CrossAttentionLayer
from perceiver.models.attention_maps import attention_weights, recorded_maps
from tests.support.trained import write_run

ENCODER = EncoderConfig(num_cross_attention_heads=2, num_self_attention_heads=2, num_self_attention_layers_per_block=1)
FEATURES = PerceiverIOConfig(
    num_latents=4, num_latent_channels=16, input=FeatureInput(num_features=8, max_positions=20), encoder=ENCODER, init_scale=0.5
)
IMAGES = PerceiverIOConfig(
    num_latents=3,
    num_latent_channels=16,
    input=ImageInput(image_shape=(6, 5, 1), num_frequency_bands=12),
    encoder=EncoderConfig(
        num_cross_attention_heads=1, num_cross_attention_layers=3, num_self_attention_heads=2, num_self_attention_layers_per_block=1,
        num_self_attention_blocks=3,
    ),
    output=ClassOutput(num_classes=2, num_query_channels=16),
    init_scale=0.5,
)  # fmt: skip
CAUSAL = PerceiverARConfig(
    vocab_size=30, max_seq_len=16, max_latents=6, num_channels=16, num_heads=2, num_self_attention_layers=1, init_scale=0.5
)


def calls_of(model, run):
    """What the model's cross-attention layers are called with, and what they give."""
    calls = []
    layers = [layer for layer in model.modules() if isinstance(layer, CrossAttentionLayer)]

    def note(layer, arguments, named, out):
        calls.append((layer, arguments, named, out))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def with_weights(layer, weights, arguments, named):
    """What a layer gives, computed from weights of its attention."""
    x_q, x_kv = arguments[0], (arguments[1] if len(arguments) > 1 else None)
    queries, prefix = layer.q_norm(x_q), named.get("prefix")
    if prefix is not None:
        inputs = torch.cat([layer.kv_norm(prefix), queries], 1)
    else:
        if not isinstance(x_kv, torch.Tensor):
            x_kv = torch.cat([x_kv.pixels, x_kv.table.expand(len(x_kv.pixels), -1, -1)], -1)
        inputs = layer.kv_norm(x_kv)
    values = layer.attention.split_heads(layer.attention.v_proj(inputs))
    x = x_q + layer.attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
    return x + layer.mlp(x)


PASSES = {
    "features with padding": (
        lambda: PerceiverEncoder(FEATURES),
        lambda model: model(torch.randn(3, 7, 8, dtype=torch.float64), torch.arange(7)[None] >= torch.tensor([[7], [4], [1]])),
        (3, 2, 4, 7),
    ),
    "pixels, factored, three times": (
        lambda: build_model(IMAGES),
        lambda model: model.encode(torch.randn(2, 6, 5, 1, dtype=torch.float64)),
        (2, 1, 3, 30),
    ),
    "a causal model with prefix": (lambda: build_model(CAUSAL), lambda model: model(torch.randint(30, (2, 16)), 10), (2, 2, 6, 16)),
}


@pytest.mark.parametrize("name", PASSES)
@torch.no_grad()
def test_the_weights_are_those_that_the_layer_attends_with(name):
    build, run, shape = PASSES[name]
    model = build().eval().double()  # how far the sums in another order may differ depends on the processor
    torch.manual_seed(0)
    for layer, arguments, named, out in calls_of(model, lambda: run(model)):
        weights = attention_weights(layer, *arguments, **named)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        torch.testing.assert_close(with_weights(layer, weights.double(), arguments, named), out, atol=1e-5, rtol=1e-5)
    with recorded_maps(model) as maps:
        run(model)
        run(model)
    assert [tuple(found.shape) for found in maps] == [shape, shape]
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_each_cross_attention_of_a_pass_has_its_maps():
    model = build_model(IMAGES).eval()
    images, found = torch.randn(2, 6, 5, 1), []
    assert model.encoder.factored
    for layer in range(3):
        with recorded_maps(model, layer) as maps:
            model(images)
        found.append(maps[0])
    assert len(maps) == 1 and not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    with pytest.raises(UserError, match="layer is 3, but the model has 3 cross-attention layers: 0 to 2"):
        with recorded_maps(model, 3):
            pass


def test_a_trained_model_shows_what_its_latents_read(tmp_path):
    texts = perceiver.load(write_run(tmp_path / "text", "sentiment"), device="cpu")
    maps = texts.attention(["some text", "b"])
    assert maps.shape == (2, 2, 4, 11) and maps.dtype == np.float32  # of 9 bytes, with a mark at both ends
    assert (maps[1, ..., 3:] == 0).all() and (maps[1, ..., :3] > 0).all()
    assert np.array_equal(texts.attention("some text")[0], maps[0]) or np.allclose(texts.attention("some text")[0], maps[0], atol=1e-6)
    images = perceiver.load(write_run(tmp_path / "images", "images"), device="cpu")
    digits = np.arange(72, dtype=np.uint8).reshape(2, 6, 6, 1)
    as_tensor = torch.from_numpy(digits.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(images.attention(as_tensor), images.attention(list(digits)), atol=1e-6)
    assert "\n" not in repr(images) and "ImageClassification" in repr(images)


def test_an_encoder_of_own_features_has_no_parameter_without_gradient():
    encoder = PerceiverEncoder(FEATURES)
    encoder(torch.randn(2, 5, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("config", "given", "sentence"),
    [
        (IMAGES, torch.zeros(2, 1, 6, 5), r"ImageInput takes a tensor of shape \(B, 6, 5, 1\), not \(2, 1, 6, 5\)"),
        (CAUSAL, torch.zeros(2, 17, dtype=torch.long), r"takes a tensor of shape \(B, N\) with N at most 16, not \(2, 17\)"),
        (CAUSAL, torch.zeros(2, 5), r"takes ids, a tensor of whole numbers of shape \(B, N\)"),
        (CAUSAL, torch.zeros(2, 9, dtype=torch.long), "prefix_len is 0 for 9 tokens, which leaves 9 latents: there must be 1 to 6"),
        (FEATURES, torch.zeros(2, 5, 9), r"takes a tensor of shape \(B, N, 8\) with N at most 20, not \(2, 5, 9\)"),
    ],
)
def test_a_wrong_shape_is_one_sentence_with_both_shapes(config, given, sentence):
    output = ClassOutput(num_classes=2, num_query_channels=16)
    model = build_model(config if config is not FEATURES else PerceiverIOConfig(**{**vars(FEATURES), "output": output}))
    with pytest.raises(UserError, match=sentence):
        model(given)


def test_a_mask_of_another_length_and_features_of_another_width_are_named():
    encoder = PerceiverEncoder(FEATURES)
    with pytest.raises(UserError, match=r"pad_mask of this input must be a tensor of shape \(2, 5\), not \(2, 6\)"):
        encoder(torch.zeros(2, 5, 8), torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(UserError, match=r"the encoder takes a tensor of shape \(B, N, 8\), not \(2, 5, 7\)"):
        encoder(torch.zeros(2, 5, 7))
    assert ArrayInput(num_features=3, positions="none").batch_shape() == ("B", "N", 3)
