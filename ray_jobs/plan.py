"""`python -m ray_jobs.plan PRESET [--field value ...] [--device NAME]`: computes what a training run needs, before it starts.

Prints parameters, FLOPs, GPU memory by what it is used for, the largest micro-batch, traffic, size of checkpoints, and time. All of it is
computed from the configuration: no cluster is started, and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from perceiver.config import Experiment, UserError
from perceiver.costs.count import CountedStep
from perceiver.costs.devices import DEVICES, GIB, Device
from perceiver.costs.flops import num_parameters
from perceiver.costs.memory import Memory, checkpoint_bytes, largest_micro_batch, most_of_each, optimizer_bytes, step_memory
from perceiver.costs.scale import GB, Cluster, step_time
from perceiver.costs.traffic import Traffic, step_traffic
from perceiver.data.balance import described
from perceiver.datasets import Dataset, train_counts, with_tokenizer
from perceiver.tasks import build_task
from perceiver.terminal import CommandParser, number_of, summary
from perceiver.training.run import total_steps
from ray_jobs.cli import main_entry, parse_experiment
from ray_jobs.memory_check import layout_of, share, step_of, usable
from ray_jobs.overrides import UNDOTTED
from ray_jobs.preflight import check_experiment
from ray_jobs.program import program
from ray_jobs.recomputation import describe, resolve
from ray_jobs.scale import PEAKS, plan_lines

FACTORS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training takes. Bytes and FLOPs; of one device where not said otherwise."""

    parameters: int
    unit: str
    """What throughput counts: tokens or examples."""
    units_per_step: float
    targets_per_step: int | None
    """How many of these are predicted, where not all are."""
    flops_per_unit: float
    steps: int | None
    """None: not known before the data is prepared."""
    memory: Memory
    """At the fullest moment of a step."""
    most: Memory
    """Of each kind at its own fullest moment."""
    host: float
    """Bytes of a worker's shard that are in the host's memory (with CPU offload)."""
    limit: float
    """Bytes that a device has for a step."""
    micro_batch: int
    largest_micro_batches: dict[str, int]
    """By the setting of recomputation."""
    traffic: Traffic
    checkpoint: float
    """Of all workers together."""
    seconds_per_step: float
    """Of computation."""

    @property
    def flops_per_step(self) -> float:
        return self.flops_per_unit * self.units_per_step


def make_plan(experiment: Experiment, device: Device, mfu: float) -> Plan:
    """The plan of an experiment on devices of one kind.

    Args:
        mfu: share of the devices' peak at which they compute what the model asks for (without recomputation).
    """
    task, layout, parallel = build_task(experiment), layout_of(experiment), experiment.parallel
    step, limit, batch = step_of(experiment), usable(device.memory), experiment.training.global_batch_size
    unit, per_example = task.throughput_unit()
    flops = step.flops_per_example() if isinstance(step, CountedStep) else task.flops_per_example()
    peak = getattr(device, PEAKS[experiment.training.precision])
    return Plan(
        parameters=num_parameters(experiment.model),
        unit=unit,
        units_per_step=batch * per_example,
        targets_per_step=None if (targets := task.targets_per_example()) is None else batch * targets,
        flops_per_unit=flops / per_example,
        steps=_steps(experiment),
        memory=step_memory(step, layout),
        most=most_of_each(step, layout),
        host=_shard(experiment) if parallel.cpu_offload else 0.0,
        limit=limit,
        micro_batch=layout.micro_batch_size,
        largest_micro_batches={
            name: largest_micro_batch(step, replace(layout, checkpoint_every=every), limit, share(experiment.training, parallel))
            for name, every in (("no layer", 0), ("every second layer", 2), ("every layer", 1))
        },
        traffic=step_traffic(step, layout, parallel.replicas),
        checkpoint=checkpoint_bytes(step, layout),
        seconds_per_step=batch * flops / (parallel.workers * peak * mfu),
    )


def _shard(experiment: Experiment) -> float:
    """Bytes of a worker's parameters, gradients and what its optimizer keeps."""
    layout = layout_of(experiment)
    parts = step_of(experiment).units(layout.shards)
    return 4.0 * sum(part.size + part.trained for part in parts) / layout.shards + optimizer_bytes(parts, layout)


def _steps(experiment: Experiment) -> int | None:
    training = experiment.training
    if training.max_epochs is None:
        return training.max_steps
    try:
        manifest = Dataset.find(experiment).manifest
    except UserError:  # not prepared: only an upper limit may be known
        return training.max_steps
    return total_steps(experiment, manifest.splits["train"].rows)


def _balance(experiment: Experiment) -> str | None:
    """What becomes of each class where they are balanced, as far as the data is prepared."""
    most = experiment.data.balance
    if most is None:
        return None
    try:
        counts = train_counts([part.manifest for part in Dataset.find(experiment).parts])
    except UserError:
        counts = []
    names = getattr(experiment.task, "class_names", None)
    return described(counts, names, most) if counts else f"as equal as no row more than {most} times an epoch allows"


def lines(plan: Plan, experiment: Experiment, device: Device, name: str, mfu: float, cluster: Cluster) -> Iterator[str]:
    """The plan for a person."""
    parallel, layout = experiment.parallel, layout_of(experiment)
    yield f"{experiment.preset} on {parallel.workers} x {name} ({device.memory / GIB:.1f} GiB), {experiment.training.precision}"
    yield f"  parameters         {plan.parameters:,}"
    yield f"  computation        {_si(plan.flops_per_unit)}FLOP per {plan.unit.removesuffix('s')}, {_si(plan.flops_per_step)}FLOP per step"
    yield (
        f"  step               {experiment.training.global_batch_size:,} examples, {plan.units_per_step:,.0f} {plan.unit}: "
        f"{share(experiment.training, parallel):,} examples a worker, {number_of(layout.accumulated, 'micro-batch', 'micro-batches')} of "
        f"{plan.micro_batch}"
    )
    if (balance := _balance(experiment)) is not None:
        yield f"  classes of an epoch {balance}"
    yield (
        f"  layout             {number_of(layout.shards, 'shard')} x {number_of(parallel.replicas, 'replica')}; "
        f"recomputed: {describe(parallel.recompute_every)}"
    )
    yield "  memory of a GPU     at its fullest moment    at most of this kind"
    divisor, size = (GIB, "GiB") if plan.memory.total >= GIB / 2 else (2.0**20, "MiB")
    for field in fields(Memory):
        now, most = (getattr(memory, field.name) / divisor for memory in (plan.memory, plan.most))
        yield f"    {field.name:<16} {now:8.2f} {size} {most:20.2f} {size}"
    verdict = "fits" if plan.memory.total <= plan.limit else "does NOT fit"
    yield f"    {'together':<16} {plan.memory.total / divisor:8.2f} {size} of {plan.limit / GIB:.1f} GiB: {verdict}"
    if plan.host:
        yield f"    in the host's memory {plan.host / GIB:.2f} GiB a worker: parameters, gradients, optimizer"
    yield "  largest micro-batch, recomputing " + ", ".join(f"{k}: {v or 'none fits'}" for k, v in plan.largest_micro_batches.items())
    traffic = f"{_si(plan.traffic.gathered)}B gathered, {_si(plan.traffic.reduced)}B reduced"
    if parallel.replicas > 1:
        traffic += f", {_si(plan.traffic.all_reduced)}B summed over replicas"
    yield f"  traffic of a GPU   {traffic} per step"
    yield f"  checkpoint         {_si(plan.checkpoint)}B (weights and optimizer), {_si(4.0 * plan.parameters)}B weights alone"
    yield (
        f"  at {mfu:.0%} MFU         {_si(plan.seconds_per_step)}s per step, "
        f"{plan.units_per_step / plan.seconds_per_step:,.0f} {plan.unit}/s in all"
    )
    time = step_time(step_of(experiment), layout, parallel.replicas, plan.seconds_per_step, cluster)
    if parallel.workers > 1:
        yield from plan_lines(time, cluster, plan.units_per_step, plan.unit)
    if plan.steps is None:
        yield "  whole training     unknown before the data is prepared (or give --training.max-steps)"
        return
    hours = plan.steps * time.total / 3600
    yield (
        f"  whole training     {plan.steps:,} steps, {plan.steps * plan.units_per_step:,.0f} {plan.unit}, "
        f"{_si(plan.steps * plan.flops_per_step)}FLOP: {hours:,.1f} hours, {hours * parallel.workers:,.0f} GPU-hours"
    )
    if plan.targets_per_step is not None:
        yield f"  of these {plan.unit:<10}{plan.steps * plan.targets_per_step:,} are targets"


def _si(value: float) -> str:
    """12.3 T: to be followed by a unit."""
    factor, prefix = next(((f, p) for f, p in FACTORS if value >= f), FACTORS[-1] if value else (1.0, ""))
    return f"{value / factor:.3g} {prefix}"


def find_device(name: str, memory: float | None, flops: float | None) -> Device:
    """A known device, with another memory (GiB) or peak (TFLOP/s) where these are given; both make one that is not known.

    Raises:
        UserError: neither known nor given, or given as nothing.
    """
    for option, value in (("--device-memory", memory), ("--device-flops", flops)):
        if value is not None and not value > 0:
            raise UserError(f"{option} is {value:g} and must be above 0")
    if name not in DEVICES and (memory is None or flops is None):
        raise UserError(
            f"device {name!r} is not known: use one of {', '.join(DEVICES)}, or give --device-memory GIB and --device-flops TFLOPS"
        )
    known = DEVICES.get(name, Device(name, 0.0, 0.0, 0.0))
    if memory is not None:
        known = replace(known, memory=memory * GIB)
    return known if flops is None else replace(known, bf16=flops * 1e12, tf32=flops * 1e12, fp32=flops * 1e12)


def main(argv: list[str]) -> int:
    name = program("ray_jobs.plan")
    parser = CommandParser(
        prog=name, usage=f"{name} EXPERIMENT [option value ...] [--field value ...]", description=summary(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("--device", default="a100-40gb", help=f"kind of GPU: {', '.join(DEVICES)} (%(default)s)")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="memory of another kind of GPU, in GiB")
    parser.add_argument("--device-flops", type=float, metavar="TFLOPS", help="its dense peak performance in the precision of the training")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak performance that is reached (%(default)s)")
    whole = Cluster()
    parser.add_argument("--gpus-per-node", type=int, default=whole.gpus_per_node, help="GPUs per machine (%(default)s)")
    parser.add_argument(
        "--node-link",
        type=float,
        default=whole.intra_node / GB,
        metavar="GB/S",
        help="bandwidth of a GPU from the others in its machine (%(default)g)",
    )
    parser.add_argument(
        "--network",
        type=float,
        default=whole.inter_node / GB,
        metavar="GB/S",
        help="bandwidth of a machine from others (%(default)g: 400 Gbit/s)",
    )
    own, rest = parser.parse_with_fields(argv, UNDOTTED)
    if not rest or rest[0] in ("-h", "--help"):
        print(parser.format_help())
    if not 0 < own.mfu <= 1:
        raise UserError(f"--mfu is {own.mfu} and must be above 0 and at most 1")
    for option, value in (("--gpus-per-node", own.gpus_per_node), ("--node-link", own.node_link), ("--network", own.network)):
        if not value > 0:
            raise UserError(f"{option} is {value:g} and must be above 0")
    cluster = Cluster(gpus_per_node=own.gpus_per_node, intra_node=own.node_link * GB, inter_node=own.network * GB)
    device = find_device(own.device, own.device_memory, own.device_flops)
    name = "unknown GPU" if own.device_memory and own.device_flops else own.device
    experiment = with_tokenizer(parse_experiment(rest, "ray_jobs.plan"))
    check_experiment(experiment)
    experiment, chosen = resolve(experiment, usable(device.memory))
    if chosen is not None:
        print(chosen)
    plan = make_plan(experiment, device, own.mfu)
    print("\n".join(lines(plan, experiment, device, name, own.mfu, cluster)))
    return 0


if __name__ == "__main__":
    main_entry(main)
