"""The one training loop, and the one validation pass. Both take batches; neither knows where they come from or who listens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from perceiver.config import Experiment
from perceiver.training.batches import Batch
from perceiver.training.checkpoint import TrainState
from perceiver.training.optim import set_learning_rate
from perceiver.training.parallel import World

if TYPE_CHECKING:
    from perceiver.tasks.base import Task


@dataclass(frozen=True)
class StepResult:
    """What one step leaves to report. Tensors stay on the device, so that nothing waits for it."""

    loss_sum: Tensor
    """This worker's sum of the loss: float64, ()."""
    targets: Tensor
    """Valid targets of all workers: int64, ()."""
    sums: dict[str, Tensor]
    """This worker's other sums, as `Task.loss` gives them: float64."""
    grad_norm: Tensor
    lr: float


def fit(
    experiment: Experiment,
    task: Task,
    state: TrainState,
    batches: Iterable[list[Batch]],
    world: World,
    total_steps: int,
    after_step: Callable[[StepResult], None],
) -> None:
    """Trains: one optimizer step per item of `batches`, which is the step's list of micro-batches.

    The loss of a step is the sum over its valid targets divided by their number over all workers and micro-batches, so that
    workers and accumulation are interchangeable. Random numbers of a step depend on (seed, step, worker) alone.
    """
    config = experiment.optim
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    max_norm = config.max_grad_norm or float("inf")
    for micro_batches in batches:
        seed_step(experiment.training.seed, state.step, world.rank)
        lr = config.learning_rate(state.step, total_steps)
        set_learning_rate(state.optimizer, lr)
        targets = world.all_sum(torch.stack([task.num_targets(batch) for batch in micro_batches]).sum())
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, 1):
            state.model.set_requires_gradient_sync(number == len(micro_batches))
            part, parts = task.loss(state.model, batch)
            # Sharding averages gradients over the workers; times their number, it sums them.
            (part * (world.size / targets.clamp(min=1))).backward()
            loss_sum += part.detach()
            add_to(sums, parts)
        grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        after_step(StepResult(loss_sum, targets, sums, grad_norm, lr))


@torch.no_grad()
def validate(task: Task, model: nn.Module, batches: Iterable[list[Batch]], world: World) -> dict[str, np.ndarray]:
    """Sums of loss, targets and the task's own counts over all batches of all workers, exact whatever their number."""
    model.eval()
    sums: dict[str, Tensor] = {}
    for micro_batches in batches:
        for batch in micro_batches:
            loss, parts = task.loss(model, batch)
            add_to(sums, {**parts, "loss": loss, "targets": task.num_targets(batch)})
    model.train()
    return {name: world.all_sum(sums[name]).cpu().numpy() for name in sorted(sums)}


def add_to(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Adds values to the sums of their names, in float64."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().double()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators (dropout) for one step of one worker."""
    key = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:7], "little"))
