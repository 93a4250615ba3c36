"""What the devices of a training step send each other: closed formulas of FSDP2's messages and their bytes."""

from __future__ import annotations

from dataclasses import dataclass

from perceiver.costs.activations import FP32, Layout
from perceiver.costs.memory import Step, gathered_parts


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one device receives in a step."""

    gathered: float
    """Parameters of other shards, for forward and backward pass of every micro-batch."""
    reduced: float
    """Gradients, summed into its shard (reduce-scatter, fp32)."""
    all_reduced: float
    """Its shard's gradients, summed over replicas (a ring sends each number twice)."""


def step_traffic(step: Step, layout: Layout, replicas: int = 1) -> Traffic:
    """What FSDP2 sends: a layer is gathered for each of its runs forward and backward, what belongs to no layer once; where layers stay
    gathered after the forward pass, once for all of its runs forward and the last one backward.

    Gradients are reduced once a step, also those of a layer that runs several times.
    """
    *layers, root = step.units(layout.shards)
    calls, _ = step.walk(layout)
    others = (layout.shards - 1) / layout.shards
    if layout.reshard_after_forward:
        runs = sum(layers[call.unit].size * (2 if call.trained else 1) for call in calls) + root.size
    else:
        once, again = {call.unit for call in calls}, [call.unit for call in calls if call.trained]
        runs = sum(layers[unit].size for unit in once) + sum(layers[unit].size for unit in again) + root.size
        runs -= sum(layers[unit].size for unit in set(again))
    reduced = sum(unit.trained for unit in layers) + root.trained
    return Traffic(
        gathered=layout.accumulated * layout.element_size * others * runs,
        reduced=FP32 * others * reduced,
        all_reduced=FP32 * 2 * (replicas - 1) / replicas * reduced / layout.shards,
    )


def gathers(step: Step, layout: Layout) -> int:
    """Messages in which parameters arrive in a step."""
    *layers, _ = step.units(layout.shards)
    calls, _ = step.walk(layout)
    first = {part[0] for part in gathered_parts(layers, layout)}
    forward, backward = (
        [call.unit for call in calls if call.unit in first],
        [call.unit for call in calls if call.unit in first and call.trained],
    )
    if not layout.reshard_after_forward:  # each once, and again for the earlier runs of one that runs several times
        return layout.accumulated * (len(set(forward)) + len(backward) - len(set(backward)) + 1)
    return layout.accumulated * (len(forward) + len(backward) + 1)
