"""One worker alone keeps its model whole, and trains it as sharding would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from perceiver.config import Experiment, ParallelConfig
from perceiver.config.optimizers import Sgd
from perceiver.tasks import build_task
from perceiver.training import parallel
from perceiver.training.average import averaged, begin_average
from perceiver.training.loop import fit
from perceiver.training.parallel import World, join_world
from perceiver.training.run import build_state
from perceiver.training.state import TrainState
from tests.support.small import image_experiment, text_experiment
from tests.support.weights import full

STEPS = 6


@pytest.fixture
def world() -> Iterator[World]:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield join_world(torch.device("cpu"))
    dist.destroy_process_group()


def texts(step: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(6, 30, (4, 17), generator=drawn)
    return {"ids": ids[:, :-1], "labels": ids[:, -8:]}


def images(step: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (4, 6, 6, 1), generator=drawn, dtype=torch.uint8)
    return {"images": pixels, "labels": torch.randint(0, 3, (4,), generator=drawn)}


KINDS = {"text": (text_experiment, texts), "images": (image_experiment, images)}


def trained(experiment: Experiment, batch_of, world: World) -> tuple[TrainState, list[float]]:
    """After some steps of two micro-batches: the state, and the losses."""
    task, losses = build_task(experiment), []
    state = build_state(experiment, task, world)
    batches = [[batch_of(2 * step), batch_of(2 * step + 1)] for step in range(STEPS)]
    fit(
        experiment.optim, experiment.training.seed, task, state, batches, world, STEPS,
        lambda result: losses.append((result.loss_sum / result.targets).item()),
    )  # fmt: skip
    return state, losses


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_learns_what_a_sharded_one_does(kind, precision, recompute, world, monkeypatch):
    make, batch_of = KINDS[kind]
    experiment = replace(make(precision=precision), parallel=ParallelConfig(activation_checkpointing=int(recompute)))
    # Adam makes a step of full length of the smallest rounding; this one does not.
    experiment = replace(experiment, optim=replace(experiment.optim, optimizer=Sgd(momentum=0.9), lr=0.1))
    state, losses = trained(experiment, batch_of, world)
    monkeypatch.setattr(parallel, "is_alone", lambda *_: False)
    sharded, expected = trained(experiment, batch_of, world)
    assert not isinstance(state.model, FSDPModule) and isinstance(sharded.model, FSDPModule)
    tolerance = {"fp32": 1e-5, "bf16": 2e-3}[precision]
    assert losses == pytest.approx(expected, rel=tolerance) and losses[-1] != losses[0]
    for (name, own), other in zip(state.model.named_parameters(), sharded.model.parameters(), strict=True):
        assert own.dtype == torch.float32 and type(own) is torch.nn.Parameter
        torch.testing.assert_close(full(own), full(other), atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("alone", [False, True], ids=["of the model", "of a layer"])
def test_a_pass_in_bf16_computes_with_the_weights_as_they_are(alone, world):
    """PyTorch's fused optimizers change weights without counting it; a layer that is called by itself begins no pass of the model."""
    state, _ = trained(text_experiment(precision="bf16"), texts, world)
    model, layer = state.model.eval(), next(iter(state.model.layers()))
    weight, average = next(iter(layer.parameters())), begin_average(model)
    seen, given = [], []
    layer.register_forward_pre_hook(lambda module, *taken: given.append(taken), with_kwargs=True)
    layer.register_forward_hook(lambda module, *_: seen.append(next(iter(module.parameters())).detach().clone()), prepend=True)

    def used() -> torch.Tensor:
        with torch.no_grad():
            layer(*given[0][0], **given[0][1]) if alone and given else model(texts(99)["ids"], 8)
        return seen[-1]

    for _ in range(2):
        assert torch.equal(used(), weight.to(torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        before, version = weight.detach().clone(), weight._version
        state.optimizer.step()
        assert not torch.equal(weight, before) and weight._version == version, "the optimizer counts: nothing is shown here"
    with averaged(average, model):
        assert torch.equal(used(), average_of := weight.to(torch.bfloat16))
    assert not torch.equal(used(), average_of)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_in_bf16_is_the_same_with_gradients_and_without(kind, world):
    """Without them, the output matrix is in fp32 again when a loss uses it."""
    make, batch_of = KINDS[kind]
    experiment = make(precision="bf16")
    task = build_task(experiment)
    model, batch = build_state(experiment, task, world).model.eval(), batch_of(0)
    expected = task.loss(model, batch)[0]
    with torch.no_grad():
        assert task.loss(model, batch)[0].item() == expected.item()


def test_after_a_pass_that_fails_the_parameters_are_in_their_place(world):
    experiment = text_experiment(precision="bf16")
    state = build_state(experiment, build_task(experiment), world)
    with pytest.raises(IndexError):
        state.model(torch.full((1, 16), 10_000), 8)
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert set(state.model.state_dict()) == {name for name, _ in state.model.named_parameters()} | {
        n for n, _ in state.model.named_buffers()
    }
