"""Memory of a training step on one device: arithmetic on what its layers hold, no tensor is made.

The step is walked through as it runs (forward layer by layer, loss, backward, optimizer), and what is in memory is added up at
every moment by kind; the moment with the most is the answer. tests/costs/test_memory.py compares it with the allocator's own count.

Activations are those of `activations.py` or, counted, of `count.py`. Of FSDP2 (`perceiver/training/parallel.py`): a shard of
parameters, gradients and the optimizer's state in fp32; the whole parameters of the layer at work in the type of computation, the next
layer's as they arrive, gradients before they are reduced, and the reduction's input in fp32. Parameters outside of layers (embeddings)
stay whole from forward to backward. One worker alone shards nothing.

Not counted: what the allocator loses to fragments, the device's context, the communication library's own buffers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Protocol, TypeGuard

import torch
from torch import nn

from perceiver.config import ModelConfig, nodes, type_name
from perceiver.config.core import is_builtin
from perceiver.config.optimization import shard_size
from perceiver.costs.activations import FP32, Call, Layout, Loss, StepSizes, step_calls
from perceiver.models import PerceiverARConfig, PerceiverIOConfig, build_model
from perceiver.models.weights import blocks_of, layer_matrices, neighbours


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by kind, at the moment of a step that has the most."""

    parameters: float = 0.0
    """The shard, in fp32."""
    gradients: float = 0.0
    """The shard, in fp32."""
    optimizer: float = 0.0
    """The optimizer's state of the shard, and averaged weights, in fp32."""
    activations: float = 0.0
    """Kept for the backward pass, and what the layer at work needs besides."""
    loss: float = 0.0
    """Logits (or a chunk of them) and their gradients."""
    gathered: float = 0.0
    """Whole parameters of the layers at work and of those outside of layers, and buffers they arrive in."""
    reduced: float = 0.0
    """Whole gradients that are not reduced to shards yet, and the reduction's buffer."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Weight:
    """A trained parameter, as its optimizer sees it."""

    shape: tuple[int, ...]
    hidden: bool
    """Whether it is a matrix of a layer."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that are gathered and reduced as one: a layer's, or all that belong to none."""

    size: int
    """Numbers, with the padding of their shards."""
    trained: int
    """Those of them that get gradients."""
    weights: tuple[Weight, ...] = ()
    """What those are."""
    block: str = ""
    """Of a layer: the list of layers that it is in."""


class Step(Protocol):
    """A training step whose memory is asked for: by formulas (`FormulaStep`) or counted (`CountedStep` in `count.py`)."""

    def walk(self, layout: Layout) -> tuple[list[Call], Loss]:
        """The runs of layers in the order in which a forward pass has them, and its end."""
        ...

    def units(self, shards: int) -> tuple[Unit, ...]:
        """The units of sharding: one for each of the model's `layers()`, then one for what is left."""
        ...


@dataclass(frozen=True)
class FormulaStep:
    """The step of a built-in model, from its configuration alone."""

    config: PerceiverARConfig | PerceiverIOConfig
    sizes: StepSizes = field(default_factory=StepSizes)

    def walk(self, layout: Layout) -> tuple[list[Call], Loss]:
        """See `Step`."""
        return step_calls(self.config, layout, self.sizes)

    def units(self, shards: int) -> tuple[Unit, ...]:
        """See `Step`."""
        return _units(self.config, shards)


def has_formulas(config: ModelConfig) -> TypeGuard[PerceiverARConfig | PerceiverIOConfig]:
    """Whether the closed formulas are those of a model: of this package's, with parts of this package that have formulas."""
    return all(is_builtin(type_name(type(node))) and getattr(node, "has_cost_formulas", True) for _, node in nodes(config))


@lru_cache(maxsize=16)
def _units(config: ModelConfig, shards: int) -> tuple[Unit, ...]:
    with torch.device("meta"):
        return units_of(build_model(config), shards)


def units_of(model: nn.Module, shards: int) -> tuple[Unit, ...]:
    """The units of sharding of a model with `layers()`."""
    parts = [list(layer.parameters()) for layer in model.layers()]
    own = {id(parameter) for part in parts for parameter in part}
    parts.append([parameter for parameter in model.parameters() if id(parameter) not in own])
    matrices = layer_matrices(model)
    units = []
    for part, block in zip(parts, [*blocks_of(model), ""], strict=True):
        trained = [parameter for parameter in part if parameter.requires_grad]
        units.append(
            Unit(
                size=shards * sum(shard_size(p.shape, shards) for p in part),  # those that do not divide evenly are padded
                trained=shards * sum(shard_size(p.shape, shards) for p in trained),
                weights=tuple(Weight(tuple(p.shape), id(p) in matrices) for p in trained),
                block=block,
            )
        )
    return tuple(units)


def optimizer_bytes(units: Iterable[Unit], layout: Layout) -> float:
    """What a worker keeps between steps beside parameters: the optimizer's state, and averaged weights, in fp32."""
    units = tuple(units)
    weights = (weight for unit in units for weight in unit.weights)
    state = sum(layout.optimizer.state_size(weight.shape, layout.shards, weight.hidden) for weight in weights)
    return FP32 * (state + (sum(unit.size for unit in units) / layout.shards if layout.averaged else 0.0))


def checkpoint_bytes(step: Step, layout: Layout) -> float:
    """A checkpoint of all workers together: parameters, the optimizer's state, averaged weights."""
    units = step.units(1)
    return FP32 * sum(unit.size for unit in units) + optimizer_bytes(units, replace(layout, shards=1))


def step_memory(step: Step, layout: Layout) -> Memory:
    """Memory of a training step (from the second on, when the optimizer has its state)."""
    return max(_moments(step, layout), key=lambda memory: memory.total)


def most_of_each(step: Step, layout: Layout) -> Memory:
    """The most that there is of each kind in a step, which is not all at one moment."""
    moments = list(_moments(step, layout))
    return Memory(**{f.name: max(getattr(moment, f.name) for moment in moments) for f in fields(Memory)})


def largest_micro_batch(step: Step, layout: Layout, limit: float, most: int) -> int:
    """The largest number of examples, up to `most`, whose step takes at most `limit` bytes; 0: not even one fits.

    `most` is the device's share of a step: a smaller micro-batch is accumulated.
    """

    def fits(size: int) -> bool:
        smaller = replace(layout, micro_batch_size=size, accumulated=-(-most // size))
        return step_memory(step, smaller).total <= limit

    if fits(most):  # nothing is accumulated then, which saves the whole gradients
        return most
    low, high = 0, most - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def gathered_parts(layers: Sequence[Unit], layout: Layout) -> list[list[int]]:
    """The numbers of layers that are gathered and reduced together."""
    return neighbours([unit.block for unit in layers], layout.layers_per_unit)


def _together(layers: Sequence[Unit], layout: Layout) -> list[Unit]:
    """For each layer the unit that it is gathered with."""
    found: list[Unit] = []
    for part in gathered_parts(layers, layout):
        size, trained = sum(layers[n].size for n in part), sum(layers[n].trained for n in part)
        found += [Unit(size=size, trained=trained)] * len(part)
    return found


def _moments(step: Step, layout: Layout) -> Iterator[Memory]:
    """What is in memory at the moments of a step that can have the most."""
    if layout.alone:
        yield from _moments_alone(step, layout)
        return
    e, shards = layout.element_size, layout.shards
    parts = step.units(shards)
    *layers, root = parts
    owned = 0.0 if layout.cpu_offload else 1.0
    size, trained = sum(unit.size for unit in parts) / shards, sum(unit.trained for unit in parts) / shards
    base = {"parameters": owned * FP32 * size, "optimizer": owned * optimizer_bytes(parts, layout), "gathered": e * root.size}
    calls, loss = step.walk(layout)
    together = _together(layers, layout)
    kept: set[int] = set()
    whole = 0.0
    if layout.accumulated > 1:  # gradients stay whole, in fp32, until the step's last micro-batch
        whole = FP32 * sum(unit.trained for unit in parts)

    # Forward: activations pile up.
    live = defaultdict(float, base)
    live["reduced"] += whole
    for call in calls:
        unit = together[call.unit]
        arriving = 2 * unit.size if shards > 1 else 0
        here = 0 if call.unit in kept else unit.size
        yield _memory(live, activations=call.held + call.saved + call.working, gathered=e * (here + arriving))
        if not layout.reshard_after_forward and call.unit not in kept:
            kept.add(call.unit)
            live["gathered"] += e * layers[call.unit].size
        live["activations"] += call.held + (call.saved if _keeps(call, layout) else 0.0)
    live["activations"] += loss.held
    yield _memory(live, loss=loss.peak)

    # Backward: they are used up from the end, each after it was recomputed where it was not kept.
    live["reduced"] += e * loss.shared_gradient
    held_input, reduced = 0.0, set()
    for number, call in reversed(list(enumerate(calls))):
        if not call.trained:
            break
        unit = together[call.unit]
        before = together[calls[number - 1].unit].size if number and shards > 1 else 0
        if not layout.reshard_after_forward:
            before = 0
        if not _keeps(call, layout):
            live["activations"] += call.saved
        gradients = 0.0 if whole and e == FP32 else e * unit.trained
        here = 0 if call.unit in kept else unit.size
        yield _memory(live, activations=call.extra, gathered=e * (here + before), reduced=held_input + gradients)
        live["activations"] -= call.saved + call.held
        yield _memory(live, gathered=e * before, reduced=gradients + FP32 * unit.trained)
        held_input = FP32 * unit.trained
        if call.unit not in reduced:
            live["gradients"] += owned * FP32 * layers[call.unit].trained / shards
        reduced.add(call.unit)
        if call.unit in kept and all(other.unit != call.unit for other in calls[:number]):
            live["gathered"] -= e * layers[call.unit].size
    live["activations"] = 0.0
    # Embeddings: a dense gradient, added to that of the output matrix where it is the same one.
    live["reduced"] += held_input
    yield _memory(live, reduced=e * root.trained)
    live["gathered"] = 0.0
    yield _memory(live, reduced=(e + FP32) * root.trained - e * loss.shared_gradient)
    yield _memory(base, gradients=owned * FP32 * trained)


def _moments_alone(step: Step, layout: Layout) -> Iterator[Memory]:
    """The same of one worker alone, which has nothing to gather or to reduce (`perceiver/training/whole.py`): in fp32 gradients appear
    where they stay, in bf16 there are copies of all parameters, and a layer's gradients in bf16 before they are cast.
    """
    copied = layout.element_size if layout.element_size < FP32 else 0
    parts = step.units(1)
    *layers, root = parts
    size, trained = sum(unit.size for unit in parts), sum(unit.trained for unit in parts)
    base = {"parameters": FP32 * size, "optimizer": optimizer_bytes(parts, layout), "gathered": copied * float(size)}
    calls, loss = step.walk(layout)
    live, accumulates = defaultdict(float, base), layout.accumulated > 1
    live["gradients"] = FP32 * trained if accumulates else 0.0

    for call in calls:
        yield _memory(live, activations=call.held + call.saved + call.working)
        live["activations"] += call.held + (call.saved if _keeps(call, layout) else 0.0)
    live["activations"] += loss.held
    yield _memory(live, loss=loss.peak)

    live["reduced"] += layout.element_size * loss.shared_gradient
    done: set[int] = set()
    for call in reversed(calls):
        if not call.trained:
            break
        unit = layers[call.unit]
        if not _keeps(call, layout):
            live["activations"] += call.saved
        first = call.unit not in done
        if first and not accumulates and not copied:
            live["gradients"] += FP32 * unit.trained
        yield _memory(live, activations=call.extra, reduced=copied * unit.trained)
        live["activations"] -= call.saved + call.held
        if first and not accumulates and copied:
            live["gradients"] += FP32 * unit.trained
        done.add(call.unit)
    live["activations"] = 0.0
    # Embeddings: a dense gradient, added to that of the output matrix where it is the same one.
    yield _memory(live, reduced=layout.element_size * root.trained)
    yield _memory(base, gradients=FP32 * float(trained))


def _keeps(call: Call, layout: Layout) -> bool:
    """Whether a call's activations stay from forward to backward pass."""
    every = layout.checkpoint_every
    return call.trained and not (every and call.unit % every == 0)


def _memory(live: Mapping[str, float], **more: float) -> Memory:
    return Memory(**{f.name: live.get(f.name, 0.0) + more.get(f.name, 0.0) for f in fields(Memory)})
