"""What optimizers say that they keep, against the state that they have after a step."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import perceiver.config.optimizers  # noqa: F401  # so that its classes are known
from perceiver.config import AdamW, Experiment, OptimConfig, OptimizerConfig, ParallelConfig
from perceiver.config.optimizers import Adafactor, Lion, Muon, Sgd
from perceiver.costs.activations import Layout
from perceiver.costs.devices import DEVICES
from perceiver.costs.memory import checkpoint_bytes, optimizer_bytes, units_of
from perceiver.presets import PRESETS
from perceiver.training.optim import build_optimizer
from ray_jobs.memory_check import layout_of, step_of
from ray_jobs.plan import make_plan


def built_in(base: type[OptimizerConfig] = OptimizerConfig) -> list[type[OptimizerConfig]]:
    return [cls for sub in base.__subclasses__() if sub.__module__.startswith("perceiver.") for cls in (sub, *built_in(sub))]


class Layered(nn.Module):
    """Matrices and a vector in a layer, and an embedding, a latent array of three dimensions and a number outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4, bias=False))
        self.embedding = nn.Embedding(7, 6)
        self.latents = nn.Parameter(torch.randn(2, 3, 5))
        self.frozen = nn.Parameter(torch.randn(9), requires_grad=False)

    def layers(self) -> list[nn.Module]:
        return [self.layer]


def kept(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state's tensors, without counters of steps."""
    tensors = [value for state in optimizer.state.values() for name, value in state.items() if torch.is_tensor(value) and name != "step"]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


CONFIGS = [*(cls() for cls in built_in()), Sgd(momentum=0.0)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__ + ("-plain" if c == Sgd(momentum=0.0) else ""))
def test_an_optimizer_keeps_what_it_says(config):
    model = Layered()
    optimizer = build_optimizer(model, OptimConfig(optimizer=config))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    config.before_step(optimizer, 0)
    optimizer.step()
    assert optimizer_bytes(units_of(model, 1), Layout(micro_batch_size=1, optimizer=config)) == kept(optimizer)


def planned(optimizer: OptimizerConfig, **parallel: object) -> Experiment:
    made = PRESETS["clm-c4-small"]()
    return replace(made, optim=replace(made.optim, optimizer=optimizer), parallel=ParallelConfig(**parallel))


def test_the_plan_counts_what_the_optimizer_of_the_experiment_keeps():
    plain, momentum, adam = (make_plan(planned(o), DEVICES["h100"], 0.4) for o in (Sgd(momentum=0.0), Lion(), AdamW()))
    weights = 4.0 * plain.parameters
    assert [plan.most.optimizer for plan in (plain, momentum, adam)] == [0, weights, 2 * weights]
    assert [plan.checkpoint for plan in (plain, momentum, adam)] == [weights, 2 * weights, 3 * weights]


def test_a_state_that_is_whole_on_all_workers_does_not_shrink_with_their_number():
    def state(optimizer: OptimizerConfig, workers: int) -> float:
        layout = layout_of(planned(optimizer, workers=workers))
        return optimizer_bytes(step_of(planned(optimizer, workers=workers)).units(layout.shards), layout)

    assert state(Adafactor(), 8) == state(Adafactor(), 1) < state(Muon(), 1) / 20
    assert state(Muon(), 8) == pytest.approx(state(Muon(), 1) / 8)
    with_average = layout_of(planned(Adafactor(), workers=8))
    step = step_of(planned(Adafactor(), workers=8))
    assert checkpoint_bytes(step, replace(with_average, averaged=True)) - checkpoint_bytes(step, with_average) == 4.0 * sum(
        unit.size for unit in step.units(1)
    )
