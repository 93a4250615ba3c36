"""The memory model, by formulas and counted, against what the allocator counts while real steps run.

Configurations of all tasks, within 15%.

One process is one of N workers: its collectives are a fake group's, which sends nothing, so that memory is real and numbers are not.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver.config import AdamW, Experiment, OptimizerConfig, ParallelConfig
from perceiver.config.optimizers import Adafactor, Muon, Sgd
from perceiver.costs.activations import Layout, StepSizes, step_calls
from perceiver.costs.flops import num_kept, num_parameters
from perceiver.costs.memory import FormulaStep, largest_micro_batch, most_of_each, step_memory
from perceiver.costs.traffic import step_traffic
from perceiver.models import PerceiverARConfig
from perceiver.presets import PRESETS
from perceiver.tasks import Batch, build_task
from perceiver.training.loop import fit
from perceiver.training.parallel import World, join_world
from perceiver.training.run import build_state
from ray_jobs.memory_check import layout_of, step_of


@dataclass(frozen=True)
class Case:
    preset: str
    micro_batch: int = 8
    workers: int = 1
    replicas: int = 1
    precision: str = "fp32"
    recompute: int = 0
    accumulated: int = 1
    model: tuple[tuple[str, object], ...] = ()
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    groups: tuple[str, ...] = ()

    def experiment(self) -> Experiment:
        made = PRESETS[self.preset]()
        examples = self.workers * self.accumulated * self.micro_batch
        return replace(
            made,
            model=replace(made.model, **dict(self.model)),
            data=replace(made.data, tokenizer="bytes"),
            optim=replace(made.optim, optimizer=self.optimizer, groups=self.groups),
            training=replace(made.training, precision=self.precision, global_batch_size=examples),
            parallel=ParallelConfig(
                workers=self.workers, replicas=self.replicas, activation_checkpointing=self.recompute, micro_batch_size=self.micro_batch
            ),
        )


LONG = (("num_channels", 64), ("num_self_attention_layers", 2), ("max_seq_len", 1280), ("max_latents", 1024))
C4 = (("num_channels", 256), ("num_self_attention_layers", 4), ("vocab_size", 2000))
DROPOUT = (
    ("post_attention_dropout", 0.1), ("residual_dropout", 0.1), ("num_channels", 128), ("max_seq_len", 384), ("max_latents", 128),
)  # fmt: skip
CASES = (
    Case("clm-c4-small", model=C4),
    Case("clm-c4-small", workers=8, precision="bf16", recompute=1, model=C4),
    Case("clm-c4-small", workers=2, recompute=2, model=C4),
    Case("clm-c4-small", 2, workers=2, precision="bf16", accumulated=4, model=C4),
    Case("clm-c4-small", 4, workers=4, replicas=2, precision="bf16", model=C4),
    Case("clm-wikitext-small", 1),
    Case("clm-wikitext-small", 4, workers=2, precision="bf16", recompute=1, model=DROPOUT),
    Case("sam-small", 1, model=LONG),
    Case("sam-small", 1, model=(*LONG, ("post_attention_dropout", 0.1))),
    Case("mlm-imdb-small", workers=8, precision="bf16"),
    Case("mlm-imdb-small", workers=2, recompute=1),
    Case("txt-clf-imdb-decoder-small"),
    Case("img-clf-mnist", 16, workers=2),
    Case("img-clf-mnist", 16, workers=2, precision="bf16", recompute=1),
    Case("mlm-imdb-small", 2, optimizer=Sgd(momentum=0.0)),
    Case("mlm-imdb-small", 2, workers=4, recompute=1, optimizer=Muon()),
    Case("mlm-imdb-small", 2, workers=4, recompute=1, optimizer=Adafactor()),
    Case("clm-c4-small", precision="bf16", recompute=2, model=C4),
    Case("mlm-imdb-small", 4, precision="bf16", accumulated=2),
    Case("img-clf-mnist", 16),
    Case("img-clf-mnist", 16, workers=2, groups=("encoder.*:freeze",)),
    Case("mlm-imdb-small", workers=2, groups=("encoder.self_attention_1.*:freeze",)),
    Case("mlm-imdb-small", recompute=1, groups=("encoder.self_attention_1.*:freeze", "encoder.cross_attention_1.*:freeze")),
)


@pytest.fixture
def one_of() -> Iterator[Callable[[Experiment], World]]:
    """Makes this process one of the workers of an experiment, in a group that sends nothing."""

    def join(experiment: Experiment) -> World:
        dist.init_process_group("fake", rank=0, world_size=experiment.parallel.workers, store=FakeStore())
        return join_world(torch.device("cpu"), experiment.parallel.replicas)

    if dist.is_initialized():
        dist.destroy_process_group()
    yield join
    dist.destroy_process_group()


def batch_of(experiment: Experiment, size: int) -> Batch:
    """Examples of the greatest size, as the task's collate makes them."""
    model, sizes = experiment.model, build_task(experiment).step_sizes()
    if isinstance(model, PerceiverARConfig):
        latents, prefix = model.max_latents, model.max_seq_len - model.max_latents
        batch = {"ids": ids(size, model.max_seq_len), "labels": ids(size, latents)}
        if (kept := num_kept(prefix, model.cross_attention_dropout)) < prefix:
            batch["prefix_keep"] = torch.arange(kept).repeat(size, 1)
        return batch
    if experiment.preset.startswith("img"):
        return {"images": torch.zeros(size, *model.input.image_shape, dtype=torch.uint8), "labels": ids(size)}
    if sizes.num_queries is None:
        return {"ids": ids(size, model.input.max_seq_len), "labels": ids(size) % 2}
    positions = torch.arange(sizes.num_queries).repeat(size, 1)
    return {"ids": ids(size, model.input.max_seq_len), "positions": positions, "labels": ids(size, sizes.num_queries)}


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 10, shape)


def two_steps(experiment: Experiment, world: World) -> None:
    task, layout = build_task(experiment), layout_of(experiment, cuda=False)
    batches = [[batch_of(experiment, layout.micro_batch_size) for _ in range(layout.accumulated)] for _ in range(2)]
    state = build_state(experiment, task, world)
    fit(experiment.optim, experiment.training.seed, task, state, batches, world, 10, lambda result: None)


def peak_bytes(experiment: Experiment, world: World) -> int:
    """The most that is allocated at once while a model is built and takes two steps."""
    gc.collect()  # what is freed inside must have been allocated inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        two_steps(experiment, world)
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.preset}-{c.workers}x{c.micro_batch}-{c.precision}-recompute{c.recompute}")
def test_memory_of_a_step_is_what_the_allocator_counts_within_15_percent(case, one_of):
    experiment = case.experiment()
    measured = peak_bytes(experiment, one_of(experiment))
    layout, task = layout_of(experiment, cuda=False), build_task(experiment)
    with torch.device("meta"):
        counted = task.count(task.build_model()) if not case.groups else step_of(experiment)
    by_formula, by_count = (step_memory(step, layout).total for step in (step_of(experiment), counted))
    print(f"{measured / 2**20:.1f} MiB measured, {by_formula / measured - 1:+.1%} by formula, {by_count / measured - 1:+.1%} counted")
    assert by_formula == pytest.approx(measured, rel=0.15)
    # In bf16 on CPUs these leave PyTorch's attention, which would compute in fp32, for their own; long causal attention with dropout is
    # split there. The meta device sees neither.
    if (case.preset, case.precision) not in {("clm-wikitext-small", "bf16"), ("mlm-imdb-small", "bf16"), ("sam-small", "fp32")}:
        assert by_count == pytest.approx(measured, rel=0.15)


class Received(TorchDispatchMode):
    """Bytes that collectives deliver, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, torch.Tensor)]
            self.bytes[func.__name__.split(".")[0]] += max(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case", [CASES[3], CASES[4], Case("img-clf-mnist", 1, workers=4)], ids=["accumulated", "replicas", "shared-layers"]
)
def test_traffic_is_that_of_the_collectives(case, one_of):
    experiment = case.experiment()
    world, layout = one_of(experiment), layout_of(experiment, cuda=False)
    with Received() as received:
        two_steps(experiment, world)
    traffic = step_traffic(step_of(experiment), layout, case.replicas)
    own = (layout.shards - 1) / layout.shards  # a worker has its own part of what is gathered
    sent = received.bytes
    assert sent["_allgather_base_"] / 2 * own == pytest.approx(traffic.gathered, rel=0.01)
    assert sent["_reduce_scatter_base_"] / 2 * own == pytest.approx(traffic.reduced, rel=0.01)
    assert sent["allreduce_"] / 2 * 2 * (case.replicas - 1) / case.replicas == pytest.approx(traffic.all_reduced, rel=0.01, abs=100)


def test_units_hold_every_parameter_once_and_all_of_them_run():
    for name, preset in PRESETS.items():
        config = preset().model
        parts = FormulaStep(config).units(1)
        assert sum(unit.size for unit in parts) == num_parameters(config), name
        # All layers but the last unit, which is what belongs to none, run in a step.
        calls, _ = step_calls(config, Layout(micro_batch_size=1), StepSizes())
        assert {call.unit for call in calls} == set(range(len(parts) - 1)), name


def test_a_shard_is_a_part_of_everything_and_offloaded_shards_take_nothing():
    experiment = replace(PRESETS["clm-c4"](), parallel=ParallelConfig(workers=8, activation_checkpointing=1))
    layout, step = layout_of(experiment), step_of(experiment)
    most = most_of_each(step, layout)
    assert most.parameters == pytest.approx(4 * 453_950_720 / 8) and most.optimizer == 2 * most.parameters == 2 * most.gradients
    offloaded = most_of_each(step, replace(layout, cpu_offload=True))
    assert offloaded.parameters == offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.activations == most.activations


def test_the_largest_micro_batch_fits_and_the_next_one_does_not():
    experiment = PRESETS["clm-c4"]()
    step, limit = step_of(experiment), 8 * 2**30
    layout = layout_of(experiment)
    size = largest_micro_batch(step, layout, limit, 256)

    def needed(size: int) -> float:
        return step_memory(step, replace(layout, micro_batch_size=size, accumulated=-(-256 // size))).total

    assert 0 < size < 256 and needed(size) <= limit < needed(size + 1)
    assert largest_micro_batch(step, layout, 2**20, 256) == 0
    assert largest_micro_batch(step, layout, 2**50, 256) == 256
