"""The memory that a plan gives for tasks on arrays, tables, sounds, frames and videos, against what the allocator counts in real steps."""

from dataclasses import replace

import pytest
import torch

from perceiver.config import Experiment, ParallelConfig
from perceiver.costs.memory import step_memory
from perceiver.models import ClassOutput
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from ray_jobs.memory_check import layout_of, step_of
from tests.costs import test_memory
from tests.costs.test_memory import one_of, peak_bytes  # noqa: F401

CASES = [
    ("forecast-seasons", 1),
    ("tables", 1),
    ("audio-clf-small", 2),
    ("multimodal-small", 1),
    pytest.param("points-shapes", 2, marks=pytest.mark.slow),
    pytest.param("optical-flow-small", 1, marks=pytest.mark.slow),
]


def experiment_of(name: str, workers: int) -> Experiment:
    made = PRESETS[name]()
    if name == "tables":
        table = replace(made.model.input, columns=("a", "past"), shapes=("scalar", "48"))
        settings = replace(made.task, loss="classes", targets=("y",), target_shapes=("scalar",), target_mean=(0.1,) * 10)
        made = replace(made, model=replace(made.model, input=table), task=settings)
    if isinstance(made.model.output, ClassOutput):
        made = replace(made, model=replace(made.model, output=replace(made.model.output, num_classes=10)))
    if name == "points-shapes":
        made = replace(made, task=replace(made.task, class_names=None))
    parallel = ParallelConfig(workers=workers, micro_batch_size=8)
    return replace(made, training=replace(made.training, global_batch_size=8 * workers), parallel=parallel)


@pytest.mark.parametrize(("name", "workers"), CASES)
def test_memory_that_is_planned_is_what_the_allocator_counts_within_15_percent(name, workers, one_of, monkeypatch):  # noqa: F811
    chosen = experiment_of(name, workers)
    batch = build_task(chosen).dummy_batch(8)
    monkeypatch.setattr(test_memory, "batch_of", lambda experiment, size: {key: value.clone() for key, value in batch.items()})
    torch.manual_seed(0)
    measured = peak_bytes(chosen, one_of(chosen))
    planned = step_memory(step_of(chosen), layout_of(chosen, cuda=False)).total
    print(f"{measured / 2**20:.1f} MiB measured, {planned / measured - 1:+.1%} planned")
    assert planned == pytest.approx(measured, rel=0.15)
