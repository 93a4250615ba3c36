"""Inputs and outputs for any array: each against a few independent lines, masks by changing what is masked."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perceiver.config import UserError, from_dict, to_dict
from perceiver.costs.count import CountedStep
from perceiver.models import (
    ArrayInput,
    ArrayOutput,
    AudioInput,
    Categories,
    ClassOutput,
    DecoderConfig,
    EmbeddingOutput,
    EncoderConfig,
    EventInput,
    HeadsOutput,
    InputConfig,
    MultimodalInput,
    OutputConfig,
    PerceiverIOConfig,
    StemInput,
    TableInput,
    VideoInput,
    build_model,
)
from perceiver.models.factored_attention import FactoredInput

B, N = 2, 12
RNG = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG)


def model_of(given: InputConfig, output: OutputConfig | None = None, **kwargs: Any) -> nn.Module:
    return build_model(config_of(given, output, **kwargs)).eval()


def config_of(given: InputConfig, output: OutputConfig | None = None, query_chunk: int | None = None) -> PerceiverIOConfig:
    return PerceiverIOConfig(
        num_latents=4,
        num_latent_channels=16,
        input=given,
        encoder=EncoderConfig(num_cross_attention_heads=1, num_self_attention_heads=2, num_self_attention_layers_per_block=1),
        decoder=DecoderConfig(num_cross_attention_heads=1, query_chunk=query_chunk),
        output=output or ClassOutput(num_classes=3, num_query_channels=16),
        init_scale=0.3,
    )


def adapted(model: nn.Module, x: Any) -> Tensor:
    found = model.encoder.input_adapter(x)
    return found[0] if isinstance(found, tuple) else found


def fourier(coordinate: Tensor, size: int, bands: int) -> tuple[Tensor, Tensor]:
    angle = torch.stack([math.pi * coordinate * f for f in np.linspace(1, size / 2, bands).tolist()], -1)
    return torch.sin(angle), torch.cos(angle)


MULTI = MultimodalInput(
    names=("sound", "points"),
    inputs=(
        AudioInput(num_samples=24, group=4, num_frequency_bands=2),
        ArrayInput(num_features=3, num_channels=6, positions="none", max_positions=N),
    ),
)
INPUTS: dict[str, tuple[InputConfig, Any]] = {
    "set": (ArrayInput(num_features=3, max_positions=N, num_channels=8, positions="none"), normal(B, N, 3)),
    "learned": (ArrayInput(num_features=3, max_positions=N, num_channels=8), normal(B, N, 3)),
    "grid": (ArrayInput(num_features=3, num_channels=8, positions="fourier", grid=(3, 4), num_frequency_bands=2), normal(B, N, 3)),
    "coordinates": (
        ArrayInput(num_features=3, max_positions=N, num_channels=8, positions="fourier", num_coordinates=2, num_frequency_bands=2),
        {"values": normal(B, N, 3), "coordinates": normal(B, N, 2).tanh()},
    ),
    "rotary": (
        ArrayInput(num_features=3, max_positions=N, num_channels=8, positions="rotary", num_coordinates=1),
        {"values": normal(B, N, 3), "coordinates": 10 * normal(B, N, 1)},
    ),
    "events": (
        EventInput(num_ids=5, max_events=N, num_channels=8, num_time_bands=3),
        {"ids": torch.arange(B * N).reshape(B, N) % 5, "times": 100 * normal(B, N), "values": normal(B, N)},
    ),
    "audio": (AudioInput(num_samples=24, group=4, num_frequency_bands=2), normal(B, 24)),
    "video": (VideoInput(video_shape=(4, 6, 8, 3), patch=(2, 3, 4), num_frequency_bands=2), normal(B, 4, 6, 8, 3)),
    "patches": (StemInput(image_shape=(8, 12, 3), patch_size=4, num_channels=6, num_frequency_bands=2), normal(B, 8, 12, 3)),
    "convolution": (
        StemInput(image_shape=(9, 12, 3), stem="convolution", num_channels=6, num_frequency_bands=2),
        normal(B, 9, 12, 3),
    ),
    "several": (MULTI, {"sound": normal(B, 24), "points": normal(B, N, 3)}),
    "table": (
        TableInput(
            columns=("n", "c", "t"),
            shapes=("2", "category", "text:6"),
            num_channels=8,
            vocab_size=9,
            categories=(Categories(column="c", values=("x", "y")),),
        ),
        {"numbers": normal(B, 2), "ids": torch.tensor([[1, 3, 4, 5, -1, -1, -1]] * (B - 1) + [[0, 6, 7, 8, 1, 2, 3]])},
    ),
}
MASKABLE = {"set", "learned", "coordinates", "rotary", "events"}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_has_the_sizes_that_it_says_and_survives_serialisation(name: str) -> None:
    config, x = INPUTS[name]
    model = model_of(config)
    assert adapted(model, x).shape == (B, config.num_positions(), config.adapted_channels())
    assert model(x).shape == (B, 3)
    assert from_dict(to_dict(model.config)) == model.config


@pytest.mark.parametrize("name", INPUTS)
def test_costs_of_an_input_are_counted_without_memory(name: str) -> None:
    config, x = INPUTS[name]
    batch = {"x": x} if isinstance(x, Tensor) else x
    with torch.device("meta"):
        batch = {key: value.to("meta") for key, value in batch.items()}
        step = CountedStep(build_model(config_of(config)), lambda m, b: (m(b.get("x", b)).sum(), {}), batch)
    assert step.flops_per_example() > 3 * config.adapting_flops(config.num_positions()) / 2


def test_features_are_projected_and_positions_are_added_appended_or_turned() -> None:
    for name in ("set", "learned", "grid", "coordinates", "rotary"):
        config, x = INPUTS[name]
        assert isinstance(config, ArrayInput)
        model = model_of(config)
        adapter = model.encoder.input_adapter
        values = x if isinstance(x, Tensor) else x["values"]
        expected = values @ adapter.linear.weight.T + adapter.linear.bias
        if name == "learned":
            expected = expected + adapter.pos_embedding.weight
        if name in ("grid", "coordinates"):
            if name == "grid":
                coordinates = torch.cartesian_prod(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 4)).expand(B, -1, -1)
                sizes = (3, 4)
            else:
                coordinates, sizes = x["coordinates"], (32, 32)
            waves = [fourier(coordinates[..., axis], sizes[axis], 2) for axis in range(2)]
            expected = torch.cat([expected, coordinates, waves[0][0], waves[1][0], waves[0][1], waves[1][1]], -1)
        if name == "rotary":
            pairs = torch.view_as_complex(expected.unflatten(-1, (-1, 2)).contiguous())
            turn = x["coordinates"] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
            expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(-2)
        torch.testing.assert_close(adapted(model, x), expected, atol=1e-5, rtol=1e-5)


def test_events_are_a_kind_a_value_in_the_direction_of_the_kind_and_a_time() -> None:
    config, x = INPUTS["events"]
    model = model_of(config)
    adapter, ids = model.encoder.input_adapter, x["ids"]
    values = x["values"].clone()
    values[0, 0] = math.nan
    expected = adapter.kinds.weight[ids] + adapter.directions.weight[ids] * torch.where(values.isnan(), 0, values)[..., None]
    angle = torch.stack([2 * math.pi * x["times"] / period for period in (1.0, 1000**0.5, 1000.0)], -1)
    found = adapted(model, {**x, "values": values})
    torch.testing.assert_close(found[..., :8], expected)
    torch.testing.assert_close(found[..., 8:], torch.cat([angle.sin(), angle.cos()], -1), atol=2e-4, rtol=0)


def test_patches_are_those_cut_out_by_slices() -> None:
    config, x = INPUTS["video"]
    points = model_of(config).encoder.input_adapter.points(x)
    cut = [x[:, t : t + 2, h : h + 3, w : w + 4].flatten(1) for t in (0, 2) for h in (0, 3) for w in (0, 4)]
    assert torch.equal(points, torch.stack(cut, 1))
    config, x = INPUTS["audio"]
    points = model_of(config).encoder.input_adapter.points(x)
    assert torch.equal(points, torch.stack([x[:, i : i + 4] for i in range(0, 24, 4)], 1))
    config, x = INPUTS["patches"]
    adapter = model_of(config).encoder.input_adapter
    cut = [x[:, h : h + 4, w : w + 4].permute(0, 3, 1, 2).flatten(1) for h in (0, 4) for w in (0, 4, 8)]
    expected = torch.stack(cut, 1) @ adapter.convolution.weight.flatten(1).T + adapter.convolution.bias
    torch.testing.assert_close(adapter.points(x), expected, atol=1e-5, rtol=1e-5)


def test_patches_of_frames_are_those_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.perceiver.modeling_perceiver", reason="needs transformers")
    x = INPUTS["video"][1]
    config = VideoInput(video_shape=(4, 6, 8, 3), patch=(2, 2, 2), num_frequency_bands=2)
    theirs = module.space_to_depth(x.permute(0, 1, 4, 2, 3).contiguous(), temporal_block_size=2, spatial_block_size=2)
    assert torch.equal(model_of(config).encoder.input_adapter.points(x), theirs.flatten(1, 3))


@pytest.mark.parametrize("name", ["audio", "video", "convolution"])
def test_factored_attention_to_a_grid_is_the_plain_one(name: str) -> None:
    config, x = INPUTS[name]
    model = model_of(config).double()
    assert model.encoder.factored
    x = x.double()
    plain = model.encoder(model.encoder.input_adapter(x))
    norm, adapter = model.encoder.cross_attention_1.kv_norm, model.encoder.input_adapter
    factored = model.encoder(FactoredInput.of(adapter.points(x), adapter.position_encoding, norm.eps))
    torch.testing.assert_close(factored, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(MASKABLE))
def test_what_is_masked_changes_nothing_and_what_is_not_does(name: str) -> None:
    config, x = INPUTS[name]
    model = model_of(config)
    x = {"values": x} if isinstance(x, Tensor) else x
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, 3:6] = True
    changed = {**x, "values": x["values"].clone()}
    changed["values"][0, 4] += 5
    with torch.no_grad():
        before, after = model({**x, "mask": mask}), model({**changed, "mask": mask})
        assert torch.equal(before, after)
        assert not torch.allclose(model(x)[0], model(changed)[0])
        assert not torch.allclose(before[0], model(x)[0])
        torch.testing.assert_close(before[1], model(x)[1])


class Made(TorchDispatchMode):
    """Bytes of all tensors that are made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {given.untyped_storage().data_ptr() for given in tree_leaves((args, kwargs)) if isinstance(given, Tensor)}
        made = [given.untyped_storage() for given in tree_leaves(out) if isinstance(given, Tensor)]
        self.bytes += sum(storage.nbytes() for storage in made if storage.data_ptr() not in known)
        return out


@pytest.mark.parametrize("name", sorted(MASKABLE))
def test_a_mask_costs_no_copy_of_the_input(name: str) -> None:
    config, x = INPUTS[name]
    model = model_of(config)
    x = {"values": x} if isinstance(x, Tensor) else x
    given = x, {**x, "mask": torch.arange(N).expand(B, N) > 6}
    made = []
    for batch in given:
        with Made() as counted:
            model(batch)
        made.append(counted.bytes)
    assert made[0] < made[1] <= made[0] + 6 * B * N + 64, "two masks of bytes, one of floats, and a few numbers"


def test_several_inputs_are_joined_after_a_learned_vector_of_their_own() -> None:
    config, x = INPUTS["several"]
    model = model_of(config)
    adapter = model.encoder.input_adapter
    parts = [adapter.adapters[name](x[name]) for name in ("sound", "points")]
    channels = max(part.shape[-1] for part in parts) + 4
    for part, name in zip(parts, ("sound", "points"), strict=True):
        assert adapter.own[name].shape == (1, channels - part.shape[-1])
    filled = [torch.cat([p, adapter.own[n].repeat(B, p.shape[1], 1)], -1) for p, n in zip(parts, ("sound", "points"), strict=True)]
    assert torch.equal(adapted(model, x), torch.cat(filled, 1))


def test_the_mask_of_one_of_several_inputs_holds_for_its_positions() -> None:
    config, x = INPUTS["several"]
    model = model_of(config)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[:, 2] = True
    points = x["points"].clone()
    points[:, 2] = 9
    given = [{"sound": x["sound"], "points": {"values": values, "mask": mask}} for values in (x["points"], points)]
    with torch.no_grad():
        assert torch.equal(model(given[0]), model(given[1]))


def test_an_input_that_is_hidden_says_nothing_and_a_share_is_hidden_in_training_alone() -> None:
    config, x = INPUTS["several"]
    other = {**x, "sound": x["sound"] + 1}
    hidden = model_of(replace(config, masked=(1.0, 0.0)))
    with torch.no_grad():
        assert torch.equal(hidden(x), hidden(other))
        half = model_of(replace(config, masked=(0.5, 0.0)))
        assert torch.equal(half(x), half(x))
        half.train()
        token = half.encoder.input_adapter.hidden["sound"]
        torch.manual_seed(0)
        found = torch.stack([(adapted(half, x) == token).all(-1)[:, :6] for _ in range(100)])
        assert 0.4 < found.float().mean() < 0.6
        assert not (adapted(half, x) == token).all(-1)[:, 6:].any()


POINTS = INPUTS["coordinates"][0], {**INPUTS["coordinates"][1], "query": normal(B, 7, 2).tanh()}
OUTPUTS: dict[str, tuple[OutputConfig, int]] = {
    "learned": (ArrayOutput(num_outputs=3, num_queries=7, num_query_channels=8), 7),
    "grid": (ArrayOutput(num_outputs=3, ask_by="grid", grid=(7,), num_query_channels=8), 7),
    "coordinates": (ArrayOutput(num_outputs=3, ask_by="coordinates", num_features=2, num_query_channels=8), 7),
    "features": (ArrayOutput(num_outputs=3, ask_by="features", num_features=2, num_query_channels=8), 7),
    "input": (ArrayOutput(num_outputs=3, ask_by="input"), N),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_queries_decoded_in_parts_have_the_same_answers_and_gradients(name: str, chunk: int) -> None:
    output, number = OUTPUTS[name]
    whole, parts = model_of(POINTS[0], output).double(), model_of(POINTS[0], output, query_chunk=chunk).double()
    found = [model(POINTS[1]) for model in (whole, parts)]
    assert found[0].shape == (B, number, 3)
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-12)
    for values in found:
        values.square().sum().backward()
    for (label, one), (_, other) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-10, rtol=1e-10, msg=label)


def test_each_query_is_answered_by_itself() -> None:
    model = model_of(POINTS[0], OUTPUTS["coordinates"][0])
    other = {**POINTS[1], "query": POINTS[1]["query"].clone()}
    other["query"][:, 3] = 0.5
    with torch.no_grad():
        change = (model(POINTS[1]) - model(other)).abs().amax((0, 2))
    assert change[3] > 1e-4
    assert change[[0, 1, 2, 4, 5, 6]].max() < 1e-6


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, besides the answers joined at the end; a view is none."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {given.untyped_storage().data_ptr() for given in tree_leaves((args, kwargs)) if isinstance(given, Tensor)}
        joined = "cat" in str(func) and args[0][0].shape[-1] == 3
        if isinstance(out, Tensor) and not joined and out.untyped_storage().data_ptr() not in known:
            self.most = max(self.most, out.untyped_storage().nbytes())
        return out


def test_memory_of_decoding_in_parts_does_not_grow_with_the_queries() -> None:
    def most(number: int, chunk: int | None) -> int:
        model = model_of(POINTS[0], OUTPUTS["learned"][0], query_chunk=chunk)
        queries, latents = normal(B, number, 8), normal(B, 4, 16)
        with torch.no_grad(), Largest() as seen:
            model.decoder(queries, latents)
        return seen.most

    assert most(4000, 100) == most(1000, 100)
    assert most(4000, None) > 10 * most(4000, 100)


@pytest.mark.parametrize("name", ["grid", "coordinates", "features"])
def test_queries_that_are_made_of_positions_are_made_part_by_part(name: str) -> None:
    def most(number: int, chunk: int | None) -> int:
        output = replace(OUTPUTS[name][0], grid=(number,)) if name == "grid" else OUTPUTS[name][0]
        model, query = model_of(POINTS[0], output, query_chunk=chunk), normal(B, number, 2).tanh()
        with torch.no_grad(), Largest() as seen:
            model({**POINTS[1], "query": query})
        return seen.most

    assert most(4000, 100) == most(1000, 100)
    assert most(4000, None) > 10 * most(4000, 100)


def test_an_embedding_has_length_one() -> None:
    found = model_of(POINTS[0], EmbeddingOutput(num_outputs=5, num_query_channels=8))(POINTS[1])
    assert found.shape == (B, 5)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(B))


HEADS = HeadsOutput(
    names=("kind", "each", "asked"),
    heads=(
        ClassOutput(num_classes=4, num_query_channels=8),
        ArrayOutput(num_outputs=2, ask_by="input"),
        ArrayOutput(num_outputs=3, ask_by="coordinates", num_features=2, num_query_channels=8),
    ),
)


@pytest.mark.parametrize("chunk", [None, 5])
def test_several_heads_answer_by_name_each_its_own_queries(chunk: int | None) -> None:
    model = model_of(POINTS[0], HEADS, query_chunk=chunk)
    found = model(POINTS[1])
    assert {name: tuple(values.shape) for name, values in found.items()} == {"kind": (B, 4), "each": (B, N, 2), "asked": (B, 7, 3)}
    other = {**POINTS[1], "query": POINTS[1]["query"].flip(1)}
    turned = model(other)
    torch.testing.assert_close(turned["asked"], found["asked"].flip(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned["each"], found["each"], atol=1e-5, rtol=1e-5)


def test_asking_the_input_itself_works_where_attention_to_it_could_be_factored() -> None:
    config, x = INPUTS["audio"]
    assert model_of(config, ArrayOutput(ask_by="input"))(x).shape == (B, 6, 1)


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (ArrayInput(positions="fourier"), "input.positions is fourier, which needs"),
        (ArrayInput(grid=(3, 4)), r"input.grid is \(3, 4\), which needs"),
        (ArrayInput(num_coordinates=2), "input.num-coordinates is 2, which needs"),
        (ArrayInput(num_channels=7, positions="rotary"), "input.num-channels is 7 and must be even"),
        (AudioInput(num_samples=30, group=4), "input.group is 4 and must divide"),
        (VideoInput(patch=(1, 5, 5)), r"input.patch is \(1, 5, 5\) and must divide"),
        (StemInput(patch_size=5), "input.patch-size is 5 and must divide"),
        (EventInput(shortest_period=5.0, longest_period=2.0), "input.shortest-period is 5 and must be"),
        (MultimodalInput(names=("a",)), "input.names has"),
        (replace(MULTI, masked=(0.5,)), "input.masked is"),
        (ArrayOutput(ask_by="grid"), "output.grid is"),
        (HeadsOutput(), "output.names has"),
    ],
)
def test_a_mistake_names_its_field(node: Any, sentence: str) -> None:
    given = node if isinstance(node, InputConfig) else POINTS[0]
    with pytest.raises(UserError, match=sentence):
        build_model(config_of(given, node if isinstance(node, OutputConfig) else None))
