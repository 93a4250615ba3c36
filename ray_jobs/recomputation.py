"""`--parallel.activation-checkpointing auto`: as few layers recomputed in the backward pass as the memory of a device allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from perceiver.config import Experiment, UserError
from perceiver.costs.activations import Layout
from perceiver.costs.devices import GIB
from perceiver.costs.memory import Step, step_memory
from ray_jobs.memory_check import check_step_fits, layout, layout_of, memory_limit, step_of


def settings(num_layers: int) -> Iterator[int]:
    """Values of `parallel.activation_checkpointing`, from none of the layers recomputed to all, each with fewer than the next."""
    yield 0
    before = 0
    for every in range(num_layers, 0, -1):
        recomputed = -(-num_layers // every)
        if recomputed > before:
            yield every
        before = recomputed


def least(step: Step, layout: Layout, limit: float) -> int:
    """The setting with the fewest recomputed layers with which a step takes at most `limit` bytes; 1, all, where none does."""
    num_layers = len(step.units(layout.shards)) - 1
    fitting = (n for n in settings(num_layers) if step_memory(step, replace(layout, checkpoint_every=n)).total <= limit)
    return next(fitting, 1)


def describe(every: int) -> str:
    """A setting in words."""
    return "every layer" if every == 1 else f"one in {every} layers" if every else "no layer"


def resolve(experiment: Experiment, limit: float, cuda: bool = True) -> tuple[Experiment, str | None]:
    """The experiment with a number in the place of "auto", and a line that says which; None where there was a number."""
    parallel = experiment.parallel
    if parallel.activation_checkpointing != "auto":
        return experiment, None
    every, line = _chosen(step_of(experiment), layout_of(experiment, cuda), limit)
    return replace(experiment, parallel=replace(parallel, activation_checkpointing=every)), line


def _chosen(step: Step, layout: Layout, limit: float) -> tuple[int, str]:
    """The number that "auto" stands for, and a line that says so."""
    every = least(step, layout, limit)
    chosen, plain = (step_memory(step, replace(layout, checkpoint_every=n)).total / GIB for n in (every, 0))
    line = f"--parallel.activation-checkpointing auto: {every} ({describe(every)} recomputed), {chosen:.2f} of {limit / GIB:.2f} GiB"
    return every, f"{line}; {plain:.2f} without recomputing" if every else line


def fit_memory(experiment: Experiment, gpu: bool) -> tuple[Experiment, str | None]:
    """Checks a training in the joined cluster against its memory (see `memory_check.memory_limit`), with "auto" resolved: as `resolve`.

    Raises:
        UserError: no setting fits, or nobody knows the memory that "auto" is to be chosen by.
    """
    training, optim, auto = experiment.training, experiment.optim, experiment.parallel.activation_checkpointing == "auto"
    smallest, limit, where = memory_limit(experiment.parallel, gpu)
    if limit is None:
        if auto:
            raise UserError(
                "--parallel.activation-checkpointing is 'auto', but the memory of the cluster's GPUs is not known: give "
                "--parallel.device-memory-gib, or a number (0: no layer is recomputed, 1: all)"
            )
        return experiment, None
    step, line = step_of(experiment), None
    if auto:
        every, line = _chosen(step, layout(training, smallest, optim, gpu), limit)
        smallest = replace(smallest, activation_checkpointing=every)
        experiment = replace(experiment, parallel=replace(experiment.parallel, activation_checkpointing=every))
    check_step_fits(step, training, smallest, optim, limit, gpu, where)
    return experiment, line
