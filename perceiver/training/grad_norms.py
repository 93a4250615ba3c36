"""What is measured of gradients on request: their norms by layer (`run.layer-grad-norms`), and how noisy they are (`run.noise-scale`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver.data.order import Order, worker_slots
from perceiver.training.noise_scale import GRADIENT, NOISE, NoiseScale

if TYPE_CHECKING:
    from perceiver.config import Experiment
    from perceiver.data.mixture import Mixture
    from perceiver.runs import Run
    from perceiver.tasks.base import Task
    from perceiver.training.batches import Batch
    from perceiver.training.parallel import World

REST = "rest"
"""What belongs to no layer: embeddings, latents, output."""


@dataclass
class Gradients:
    """Measures the gradients of the steps of which there is a record. All workers call it alike.

    Attributes:
        every: number of steps from one such step to the next.
        layers: norms by layer are wanted.
        noise: measures the noise scale; None: it is not wanted.
    """

    every: int
    layers: bool = False
    noise: NoiseScale | None = None
    _noise: dict[str, Tensor] = field(default_factory=dict, init=False)

    def before(self, step: int, task: Task[Any, Any], model: nn.Module, micro_batches: list[Batch], world: World) -> bool:
        """Before a step (counted from 1) computes its gradient; whether random numbers were used."""
        wanted = self.noise is not None and step % self.every == 0 and self.noise.measures(step)
        self._noise = self.noise.estimates(task, model, micro_batches, world) if wanted and self.noise is not None else {}
        return wanted

    def after(self, step: int, model: nn.Module) -> dict[str, Tensor]:
        """When the gradient is there, and not yet clipped: metrics by their names, ()."""
        found = {}
        if self.layers and step % self.every == 0:
            found = {f"grad_norm/{name}": norm for name, norm in layer_grad_norms(model).items()}
        return found | self._noise

    def metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """What `after` gave as numbers, with what follows from them and from those before."""
        values = {name: value.item() for name, value in found.items()}
        return values | (self.noise.scale(values[GRADIENT], values[NOISE]) if self.noise is not None and NOISE in values else {})


def measured_gradients(experiment: Experiment, order: Order | Mixture, world: World, run: Run) -> Gradients:
    """What an experiment wants measured of its gradients, with the averages of the run so far."""
    noise, batch = None, experiment.training.global_batch_size
    if experiment.run.noise_scale:
        first, _ = worker_slots(batch, world.rank, world.size)
        rows = order.rows if isinstance(order, Order) else None
        noise = NoiseScale(batch, first, rows, run.metrics() if world.rank == 0 else ())
    return Gradients(experiment.run.log_every, experiment.run.layer_grad_norms, noise)


def layer_grad_norms(model: nn.Module) -> dict[str, Tensor]:
    """The Euclidean norm of each layer's gradient, by the layer's name in the model: float32, (). Called on all workers alike.

    Parameters that several layers share count for the first.
    """
    names = {id(module): name for name, module in model.named_modules()}
    place: dict[int, str] = {}
    for layer in model.layers():  # type: ignore[operator]
        for parameter in layer.parameters():
            place.setdefault(id(parameter), names[id(layer)])
    squares: dict[str, Tensor] = {}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        name = place.get(id(parameter), REST)
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        squares[name] = squares.get(name, torch.zeros_like(norm)) + norm**2
    return {name: square.sqrt() for name, square in squares.items()}
