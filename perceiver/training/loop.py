"""The one training loop, and the one validation pass. Both take batches; neither knows where they come from or who listens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from perceiver.config import OptimConfig
from perceiver.tasks.base import EACH
from perceiver.training.average import update_average
from perceiver.training.batches import Batch
from perceiver.training.callbacks import REQUESTS
from perceiver.training.optim import set_step
from perceiver.training.parallel import World, reduce_gradients
from perceiver.training.state import TrainState

if TYPE_CHECKING:
    from perceiver.tasks.base import Task
    from perceiver.training.grad_norms import Gradients
    from perceiver.training.spikes import Spikes


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
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """What was measured of the gradient before clipping, by names of metrics; empty where nobody asked."""
    requests: frozenset[str] = frozenset()
    """What callbacks on any worker have asked for, as all workers know at this step."""
    skipped: bool = False
    """Whether loss or gradient were not finite on any worker, and nothing was updated."""
    spike: bool = False
    """Whether the loss was far above the usual, and nothing was updated."""


def fit(
    optim: OptimConfig,
    seed: int,
    task: Task,
    state: TrainState,
    batches: Iterable[list[Batch]],
    world: World,
    total_steps: int,
    after_step: Callable[[StepResult], bool | None],
    requests: Callable[[], Collection[str]] = lambda: (),
    skip: bool = False,
    gradients: Gradients | None = None,
    rate: Callable[[int, int], float] | None = None,
    spikes: Spikes | None = None,
) -> None:
    """Trains: one optimizer step per item of `batches`, which is the step's list of micro-batches.

    The loss of a step is the sum over its valid targets divided by their number over all workers and micro-batches, so that
    workers and accumulation are interchangeable. Random numbers of a step depend on (seed, step, worker) alone.

    Args:
        after_step: called after every step; True ends the training. The same on all workers.
        requests: called before every step on each worker, whose requests travel with the number of targets: to agree takes no
            communication of its own.
        rate: the learning rate by the step (from 0) and their number; None: as `optim` says.
        gradients: measures those of some steps, the same ones on all workers.
        skip: leave model and optimizer as they are where loss or gradient are not finite; all workers then wait for each step's end.
        spikes: leave them as they are where it finds a spike, too.
    """
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    max_norm = optim.max_grad_norm or float("inf")
    for micro_batches in batches:
        seed_step(seed, state.step, world.rank)
        if gradients is not None and gradients.before(state.step + 1, task, state.model, micro_batches, world):
            seed_step(seed, state.step, world.rank)  # the step is the same as without
        lr = (rate or optim.learning_rate)(state.step, total_steps)
        set_step(state.optimizer, optim, state.step, total_steps, lr)
        optim.optimizer.before_step(state.optimizer, state.step)
        targets = torch.stack([task.num_targets(batch) for batch in micro_batches]).sum()
        targets, asked = world.all_sum(torch.stack([targets, targets.new_full((), _code(requests()))])).unbind()
        agreed = Agreed(asked)
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, 1):
            reduce_gradients(state.model, number == len(micro_batches))
            part, parts = task.loss(state.model, batch)
            # Sharding averages gradients over the workers; times their number, it sums them.
            (part * (world.size / targets.clamp(min=1))).backward()
            loss_sum += part.detach()
            add_to(sums, parts)
        measured = gradients.after(state.step + 1, state.model) if gradients is not None else {}
        grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        skipped = skip and not _all_finite(loss_sum, grad_norm, world)
        spike = not skipped and spikes is not None and spikes.is_spike(loss_sum, targets, grad_norm)
        if not skipped and not spike:
            state.optimizer.step()
            if state.average is not None and optim.ema_decay is not None:
                update_average(state.average, state.model, optim.ema_decay, state.step)
        state.optimizer.zero_grad()
        state.step += 1
        if after_step(StepResult(loss_sum, targets, sums, grad_norm, lr, measured, agreed.requests(), skipped, spike)):
            return


def _all_finite(loss: Tensor, norm: Tensor, world: World) -> bool:
    """Whether a step's loss is finite on all workers, and the norm of its gradient, which they share."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return not world.all_sum((~(loss.isfinite() & norm.isfinite())).to(torch.int64)).item()


def agree(world: World, requests: Collection[str]) -> frozenset[str]:
    """What has been asked for on any worker. Called on all workers alike; waits for the device."""
    return Agreed(world.all_sum(torch.full((), _code(requests), dtype=torch.int64, device=world.device))).requests()


class Agreed:
    """The sum over all workers of their requests, on its way from the device.

    The device copies it as soon as the sum is there, so that whoever reads it later does not wait for the work that was queued
    meanwhile.
    """

    def __init__(self, code: Tensor) -> None:
        self._code, self._copied = code, None
        if code.is_cuda:
            self._code = torch.empty((), dtype=code.dtype, pin_memory=True)
            self._code.copy_(code, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def requests(self) -> frozenset[str]:
        if self._copied is not None:
            self._copied.synchronize()
        code = int(self._code)
        return frozenset(name for number, name in enumerate(REQUESTS) if code >> number * _BITS & (1 << _BITS) - 1)


_BITS = 15
"""Of an int64 for each kind of request: the number of workers that make it, below 2^15."""


def _code(requests: Collection[str]) -> int:
    return sum(1 << number * _BITS for number, name in enumerate(REQUESTS) if name in requests)


@torch.no_grad()
def validate(
    task: Task, model: nn.Module, batches: Iterable[list[Batch]], world: World, examples: Examples | None = None
) -> dict[str, np.ndarray]:
    """Sums of loss, targets and the task's own counts over all batches of all workers, exact whatever their number.

    Args:
        examples: where what each example adds is kept; batches then have its number in "row", as `make_val_loaders` numbers them.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    for micro_batches in batches:
        for batch in micro_batches:
            rows = batch.pop("row") if examples is not None else None
            loss, parts = task.loss(model, batch)
            if examples is not None and rows is not None:
                examples.add(rows, task.each(model, batch, parts))
            parts = {name: value for name, value in parts.items() if not name.startswith(EACH)}
            add_to(sums, {**parts, "loss": loss, "targets": task.num_targets(batch)})
    model.train()
    return {name: world.all_sum(sums[name]).cpu().numpy() for name in sorted(sums)}


class Examples:
    """What each example of a split adds to the sums of a validation, by its number."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._values: dict[str, Tensor] = {}

    def add(self, rows: Tensor, values: dict[str, Tensor]) -> None:
        """Adds what some examples have; a number of -1 is that of padding."""
        for name, value in values.items():
            if name not in self._values:
                self._values[name] = torch.zeros(self._rows + 1, dtype=torch.float64, device=value.device)  # the last one: padding
            self._values[name].index_add_(0, torch.where(rows < 0, self._rows, rows), value.detach().double())

    def together(self, world: World) -> dict[str, np.ndarray]:
        """Those of all workers in the order of the rows, (rows,) by name: each row is of one worker, so that their sum is exact."""
        return {name: world.all_sum(self._values[name])[:-1].cpu().numpy() for name in sorted(self._values)}


def add_to(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Adds values to the sums of their names, in float64."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().double()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators (dropout) for one step of one worker."""
    key = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:7], "little"))
