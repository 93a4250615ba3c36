"""The memory that `perceiver plan` gives for a step of each preset, beside what a step takes on this machine.

    python -m benchmarks.plan_memory [PRESET ...] [--limit-gib 12] [--out results.json]

Every preset takes steps of the training's own loop at full size, in fp32, with one worker and as many examples at once as the options
allow, twice, each time in a process of its own:

    tensors     the most that PyTorch's allocator had given out at once, while a model was built and took two steps
    resident    by how much the process's memory grew at its peak over three steps: tensors, what the allocator could not use again,
                and work space of the libraries

Plans count tensors. A preset whose step is planned above the limit even with one example is left out, and said so.
"""

import argparse
import gc
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from perceiver.config import Experiment, ParallelConfig
from perceiver.costs.devices import GIB
from perceiver.costs.memory import step_memory
from perceiver.models import ClassOutput
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.training.loop import fit
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state
from ray_jobs.memory_check import layout_of, step_of

MIB = 2.0**20
NUM_CLASSES = 10
"""Of presets that find the classes in the data."""
NUM_SAMPLES = 16000
"""Of presets that find the length of sounds in the data: a second of those that come with the package."""
LEFT_OUT = ("table-heads",)
"""Presets without a model before there is data: its heads are the data's columns."""


def experiment_of(name: str, micro_batch: int) -> Experiment:
    """A preset in fp32 with one worker; what it would find in the data is ten classes, or a table of a number and a list of 48."""
    made: Any = PRESETS[name]()
    if name == "tables":
        table = replace(made.model.input, columns=("a", "past"), shapes=("scalar", "48"))
        settings = {"loss": "classes", "targets": ("y",), "target_shapes": ("scalar",), "target_mean": (0.1,) * NUM_CLASSES}
        made = replace(made, task=replace(made.task, **settings), model=replace(made.model, input=table))
    elif isinstance(output := getattr(made.model, "output", None), ClassOutput) and not output.num_classes:
        made = replace(made, model=replace(made.model, output=replace(output, num_classes=NUM_CLASSES)))
    if getattr(getattr(made.model, "input", None), "num_samples", None) == 0:
        made = replace(made, model=replace(made.model, input=replace(made.model.input, num_samples=NUM_SAMPLES)))
    return replace(
        made,
        data=replace(made.data, tokenizer="bytes"),
        training=replace(made.training, precision="fp32", global_batch_size=micro_batch, init_from=None, init_encoder_from=None),
        parallel=ParallelConfig(device="cpu", micro_batch_size=micro_batch),
    )


def planned(experiment: Experiment) -> float:
    """Bytes of a step by the plan, on a CPU."""
    return step_memory(step_of(experiment), layout_of(experiment, cuda=False)).total


def take_steps(experiment: Experiment, steps: int) -> None:
    """Builds the model and trains it on batches of the greatest size."""
    task, world = build_task(experiment), join_world(torch.device("cpu"))
    batch = task.dummy_batch(experiment.training.global_batch_size)
    state = build_state(experiment, task, world)

    def batches() -> Iterator[list[dict[str, torch.Tensor]]]:
        for _ in range(steps):
            yield [{name: tensor.clone() for name, tensor in batch.items()}]

    fit(experiment.optim, experiment.training.seed, task, state, batches(), world, steps, lambda result: None)


def tensors(name: str, micro_batch: int, threads: int) -> float:
    """The most bytes that the allocator has given out at once. Run in a fresh process."""
    torch.set_num_threads(threads)
    experiment = experiment_of(name, micro_batch)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_steps(experiment, 2)
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        live += change
        peak = max(peak, live)
    return float(peak)


def resident(name: str, micro_batch: int, threads: int) -> float:
    """By how many bytes the process grows at its peak. Run in a fresh process."""
    torch.set_num_threads(threads)
    take_steps(experiment_of("quickstart", 1), 1)  # loads what every step needs
    experiment = experiment_of(name, micro_batch)
    planned(experiment)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    take_steps(experiment, 3)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1]) * 1024


def plan_of(name: str, most: int, limit: float, gflop: float) -> tuple[int, float]:
    """The examples at once, at most `most` and halved until plan and computation are within the limits, and the plan."""
    size = most
    while True:
        experiment = experiment_of(name, size)
        total = planned(experiment)
        if size == 1 or (total <= limit and size * build_task(experiment).flops_per_example() <= gflop * 1e9):
            return size, total
        size //= 2


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own, forked from this one, which has loaded everything and computed nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="all, where none is named")
    parser.add_argument("--limit-gib", type=float, default=12.0, help="steps that are planned above this are not tried (%(default)s)")
    parser.add_argument("--examples", type=int, default=8, help="examples at once, at most (%(default)s)")
    parser.add_argument("--gflop", type=float, default=2000.0, help="computation of a step, above which examples are halved (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file; measurements of other presets that it holds stay")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if args.out is not None and args.out.exists():
        rows = {row["preset"]: row for row in json.loads(args.out.read_text())["rows"]}
    print(f"{'preset':28}{'examples':>9}{'plan MiB':>10}{'tensors':>10}{'plan/tensors':>14}{'resident':>10}")
    for name in args.presets or [name for name in PRESETS if name not in LEFT_OUT]:
        size, plan = plan_of(name, args.examples, args.limit_gib * GIB, args.gflop)
        row: dict[str, Any] = {"preset": name, "examples": size, "plan_mib": plan / MIB}
        text = f"{name:28}{size:9}{plan / MIB:10,.1f}"
        if plan <= args.limit_gib * GIB:
            counted, grown = (alone(function, name, size, args.threads) / MIB for function in (tensors, resident))
            row |= {"tensors_mib": counted, "resident_mib": grown}
            text += f"{counted:10,.1f}{row['plan_mib'] / counted - 1:+14.1%}{grown:10,.1f}"
        print(text if "tensors_mib" in row else f"{text}   above the limit: not tried", flush=True)
        rows[name] = row
        if args.out is not None:
            order = [rows[preset] for preset in PRESETS if preset in rows]
            args.out.write_text(json.dumps({"torch": torch.__version__, "precision": "fp32", "rows": order}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
