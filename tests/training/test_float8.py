"""`training.precision float8`: where torchao is installed, on a CPU with its rounding done in other types."""

from dataclasses import replace

import pytest
import torch

from perceiver.config import ParallelConfig
from perceiver.models import build_model
from perceiver.training.parallel import World, build_sharded
from tests.support.small import text_experiment

WORLD = World(0, 1, torch.device("cpu"), None)


def built(precision: str, num_channels: int = 64):
    chosen = text_experiment()
    config = replace(chosen.model, num_channels=num_channels, num_heads=4)
    with torch.device("meta"):
        model = build_model(config)
    return build_sharded(model, WORLD, ParallelConfig(), replace(chosen.training, precision=precision), model.layers())


def test_layers_compute_nearly_as_in_bf16_with_the_same_weights_and_names():
    pytest.importorskip("torchao")
    x = torch.randint(6, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    eighths, halves = built("float8"), built("bf16")
    assert [name for name, _ in eighths.named_parameters()] == [name for name, _ in halves.named_parameters()]
    assert all(torch.equal(one, other) for one, other in zip(eighths.parameters(), halves.parameters(), strict=True))
    outputs = []
    for model in (eighths.eval(), halves.eval()):
        out = model(x, 8).float()
        out.square().mean().backward()
        outputs.append(out)
    difference = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert 1e-4 < difference < 0.1
    for one, other in zip(eighths.parameters(), halves.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() <= 0.3 * other.grad.norm() + 1e-6


def test_linear_modules_of_other_sizes_and_outputs_stay_in_bf16():
    float8 = pytest.importorskip("torchao.float8.float8_linear").Float8Linear
    kinds = {type(module) for module in built("float8", num_channels=64).cross_attention.modules()}
    assert float8 in kinds and torch.nn.Linear not in kinds
    assert not any(isinstance(module, float8) for module in built("float8", num_channels=24).modules())
