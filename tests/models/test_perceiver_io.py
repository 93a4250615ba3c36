"""Perceiver IO: padding, decoding of chosen positions, weight sharing, freezing, and every kind of input and output."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from perceiver.models import (
    ClassOutput,
    DecoderConfig,
    EncoderConfig,
    FlowInput,
    FlowOutput,
    ImageInput,
    PerceiverIO,
    PerceiverIOConfig,
    TextInput,
    TextOutput,
    build_model,
)

ENCODER = EncoderConfig(
    num_cross_attention_heads=2,
    num_self_attention_heads=2,
    num_self_attention_layers_per_block=2,
    num_self_attention_blocks=3,
)
TEXT = PerceiverIOConfig(
    num_latents=6,
    num_latent_channels=16,
    input=TextInput(vocab_size=40, max_seq_len=12, num_channels=8),
    encoder=replace(ENCODER, num_cross_attention_qk_channels=4, num_cross_attention_v_channels=16),
    decoder=DecoderConfig(num_cross_attention_heads=2, num_cross_attention_qk_channels=4, num_cross_attention_v_channels=8),
    init_scale=0.3,
)
IMAGE = PerceiverIOConfig(
    num_latents=6,
    num_latent_channels=16,
    input=ImageInput(image_shape=(6, 4, 2), num_frequency_bands=3),
    encoder=replace(ENCODER, num_cross_attention_heads=1, num_cross_attention_layers=2),
    decoder=DecoderConfig(num_cross_attention_heads=2),
    output=ClassOutput(num_classes=5, num_query_channels=8),
    init_scale=0.3,
)
FLOW = PerceiverIOConfig(
    num_latents=6,
    num_latent_channels=16,
    input=FlowInput(image_shape=(6, 4), num_patch_input_channels=3, num_patch_hidden_channels=4, num_frequency_bands=3),
    encoder=replace(ENCODER, num_cross_attention_heads=1),
    decoder=DecoderConfig(num_cross_attention_heads=1, cross_attention_residual=False),
    output=FlowOutput(rescale_factor=10.0),
    init_scale=0.3,
)


def model_of(config: PerceiverIOConfig) -> PerceiverIO:
    return build_model(config, seed=1).double().eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("output", [TextOutput(), TextOutput(num_query_channels=8), ClassOutput(num_query_channels=8)])
def test_right_padding_changes_nothing(output: TextOutput | ClassOutput) -> None:
    model, x = model_of(replace(TEXT, output=output)), ids(2, 9)
    padded = torch.cat([x, torch.full((2, 3), 5)], dim=1)
    pad_mask = torch.zeros(2, 12, dtype=torch.bool)
    pad_mask[:, 9:] = True
    logits = model(padded, pad_mask)
    expected = model(x)
    torch.testing.assert_close(logits[:, :9] if isinstance(output, TextOutput) else logits, expected)


def test_a_row_of_nothing_but_padding_is_finite_and_disturbs_no_other() -> None:
    model, x = model_of(TEXT), ids(2, 9)
    pad_mask = torch.zeros(2, 9, dtype=torch.bool)
    pad_mask[0] = True
    logits = model(x, pad_mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(x[1:]))
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_text_logits_are_cut_to_the_inputs_length() -> None:
    model = model_of(TEXT)
    assert model(ids(2, 9)).shape == (2, 9, 40)
    assert model(ids(2, 12)).shape == (2, 12, 40)


@pytest.mark.parametrize("output", [TextOutput(), TextOutput(num_query_channels=8)])
def test_decoding_chosen_positions_is_choosing_from_all_logits(output: TextOutput) -> None:
    model, x = model_of(replace(TEXT, output=output)), ids(2, 9)
    positions = torch.tensor([[0, 3, 8], [5, 5, 1]])
    expected = model(x).gather(1, positions[..., None].expand(-1, -1, 40))
    torch.testing.assert_close(model(x, positions=positions), expected)


def test_tied_output_is_the_token_embedding() -> None:
    model = model_of(TEXT)
    assert not any(p.shape == (40, 8) for name, p in model.decoder.named_parameters())
    model.decoder.output_bias.data.fill_(2.0)
    before = model(ids(1, 9))
    model.encoder.input_adapter.txt_embedding.weight.data[1] *= 2
    assert 1 not in ids(1, 9)
    after = model(ids(1, 9))
    torch.testing.assert_close(after[..., 1] - 2.0, 2 * (before[..., 1] - 2.0))
    torch.testing.assert_close(after[..., 2:], before[..., 2:])


@pytest.mark.parametrize("cross_shared", [True, False])
@pytest.mark.parametrize("block_shared", [True, False])
def test_shared_and_separate_weights_run_in_their_order(cross_shared: bool, block_shared: bool) -> None:
    encoder = replace(
        IMAGE.encoder,
        first_cross_attention_layer_shared=cross_shared,
        first_self_attention_block_shared=block_shared,
    )
    model = model_of(replace(IMAGE, encoder=encoder))
    parts = model.encoder
    assert (parts.cross_attention_n is None) == cross_shared
    assert (parts.self_attention_n is None) == block_shared
    images = torch.randn(2, 6, 4, 2, dtype=torch.float64)
    (adapted, _), x = parts.adapt(images), parts.latents[None]
    cross = [parts.cross_attention_1, parts.cross_attention_n or parts.cross_attention_1, None]
    second = parts.self_attention_n or parts.self_attention_1
    for cross_layer, block in zip(cross, [parts.self_attention_1, second, second], strict=True):
        x = x if cross_layer is None else cross_layer(x, adapted)
        for layer in block:
            x = layer(x)
    torch.testing.assert_close(model.encode(images), x)


@pytest.mark.parametrize("config", [TEXT, IMAGE, FLOW], ids=["text", "image", "flow"])
def test_layers_are_listed_once_and_hold_all_attention_weights(config: PerceiverIOConfig) -> None:
    model = model_of(config)
    layers = model.layers()
    assert len(layers) == len(set(layers))
    listed = [id(p) for layer in layers for p in layer.parameters()]
    assert len(listed) == len(set(listed))
    rest = {name for name, p in model.named_parameters() if id(p) not in set(listed)}
    assert not [name for name in rest if "attention" in name]


def test_output_shapes_of_images_and_flow() -> None:
    images, pairs = torch.randn(2, 6, 4, 2).double(), torch.randn(2, 2, 3, 6, 4).double()
    assert model_of(IMAGE)(images).shape == (2, 5)
    several = replace(IMAGE, output=ClassOutput(num_classes=5, num_queries=3, num_query_channels=8))
    assert model_of(several)(images).shape == (2, 3, 5)
    assert model_of(FLOW)(pairs).shape == (2, 6, 4, 2)
    scaled = replace(FLOW, output=FlowOutput(rescale_factor=1.0))
    torch.testing.assert_close(model_of(scaled)(pairs), 10 * model_of(FLOW)(pairs))


def test_a_frozen_encoder_has_no_gradients_and_the_decoder_has() -> None:
    model = model_of(replace(IMAGE, encoder=replace(IMAGE.encoder, freeze=True)))
    model(torch.randn(2, 6, 4, 2).double()).sum().backward()
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_batch_rows_do_not_mix() -> None:
    for config, x in (
        (TEXT, ids(3, 9)),
        (IMAGE, torch.randn(3, 6, 4, 2).double()),
        (FLOW, torch.randn(3, 2, 3, 6, 4).double()),
    ):
        model = model_of(config)
        rows = torch.cat([model(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(model(x), rows)
