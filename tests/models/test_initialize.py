"""Initial weights follow from seed and name: not from the device, the order of building, or the number of workers."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from perceiver.config import ModelConfig
from perceiver.models import PerceiverAR, PerceiverIO, build_model, initialize
from perceiver.models.perceiver_io_parts import PerceiverDecoder, PerceiverEncoder
from perceiver.tasks import build_task
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state
from tests.models.test_perceiver_ar import CONFIG as AR
from tests.models.test_perceiver_io import FLOW, IMAGE, TEXT
from tests.support.small import image_experiment, leave

IDS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 6, 4, 2, generator=torch.Generator().manual_seed(0))
PAIRS = torch.randn(3, 2, 3, 6, 4, generator=torch.Generator().manual_seed(0))

CONFIGS = {"text": TEXT, "image": IMAGE, "flow": FLOW, "causal": AR}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_a_model_from_the_meta_device_equals_one_built_directly(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = build_model(config)
    assert all(t.is_meta for t in tensors(model).values())
    model.to_empty(device="cpu")
    model.init_weights(seed=5)
    expected = PerceiverAR(config) if config is AR else PerceiverIO(config)
    expected.init_weights(seed=5)
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensor, tensors(model)[name]), name


@pytest.mark.parametrize("config", [*CONFIGS.values(), replace(TEXT, init="local")], ids=[*CONFIGS, "local"])
def test_a_constructor_gives_the_weights_of_build_model_and_leaves_torchs_generator_alone(config: ModelConfig) -> None:
    before = torch.get_rng_state()
    expected = tensors(build_model(config, seed=3))
    build = PerceiverAR if config is AR else PerceiverIO
    parts = {"": build(config, seed=3)}
    if config is not AR:
        parts |= {"encoder.": PerceiverEncoder(config, seed=3), "decoder.": PerceiverDecoder(config, seed=3)}
    for prefix, part in parts.items():
        assert len(tensors(part)) == sum(name.startswith(prefix) for name in expected)
        for name, tensor in tensors(part).items():
            assert torch.equal(tensor, expected[prefix + name]), prefix + name
    assert all(torch.equal(tensor, tensors(build_model(config))[name]) for name, tensor in tensors(build(config)).items())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_part_built_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        for build in (PerceiverIO, PerceiverEncoder, PerceiverDecoder):
            assert all(tensor.is_meta for tensor in tensors(build(IMAGE)).values())


def test_training_draws_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(initialize, "seed_of", lambda seed, name: drawn.append(name) or len(drawn))
    experiment = image_experiment()
    model = build_state(experiment, build_task(experiment), join_world(torch.device("cpu"))).model
    assert sorted(drawn) == sorted(name for name, p in model.named_parameters() if p.dim() > 1)


def test_weights_have_their_scale_biases_are_zero_and_norms_are_one(config: ModelConfig) -> None:
    for name, parameter in build_model(config).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 100:
            assert 0.7 * config.init_scale < float(parameter.detach().std()) < 1.3 * config.init_scale, name


def test_seeds_and_names_give_different_weights(config: ModelConfig) -> None:
    first, again, other = (dict(build_model(config, seed).named_parameters()) for seed in (0, 0, 1))
    matrices = [name for name, p in first.items() if p.dim() > 1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    digests = {hashlib.sha256(first[name].detach().flatten()[:12].numpy().tobytes()).hexdigest() for name in matrices}
    assert len(digests) == len(matrices)


def check_worker(rank: int, num_workers: int, folder: str) -> None:
    """One of several processes: its pieces of the weights, and of the gradients, are those of the whole model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_workers)
    mesh = dist.init_device_mesh("cpu", (num_workers,))
    local = replace(TEXT, init="local")
    for config, (x, *args) in (
        (TEXT, (IDS,)), (local, (IDS,)), (IMAGE, (IMAGES,)), (FLOW, (PAIRS,)), (AR, (IDS, 4))
    ):  # fmt: skip
        full = build_model(config, seed=7).train()
        with torch.device("meta"):
            model = build_model(config).train()
        for layer in model.layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        model.init_weights(seed=7)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.to_local(), piece(full.get_parameter(name), rank, num_workers)), name
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, full.get_buffer(name)), name

        full(x, *args).square().mean().backward()
        model(x[rank::num_workers], *args).square().mean().backward()
        for name, parameter in model.named_parameters():
            expected = piece(full.get_parameter(name).grad, rank, num_workers)
            torch.testing.assert_close(parameter.grad.to_local(), expected, atol=1e-5, rtol=1e-3, msg=name)
    leave()


def piece(tensor: torch.Tensor, rank: int, num_workers: int) -> torch.Tensor:
    pieces = tensor.chunk(num_workers)
    return pieces[rank] if rank < len(pieces) else tensor[:0]


def test_sharded_models_have_pieces_of_the_same_weights_and_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_worker, args=(3, str(tmp_path)), nprocs=3)
