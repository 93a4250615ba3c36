"""Steps of one worker whose model is whole beside the same with FSDP2's hooks, in turns in one process.

    python -m benchmarks.one_worker [--preset quickstart] [--batch-sizes 2 64] [--steps 20] [--rounds 5] [--out results.json]

Processor time with one thread, so that other work on the machine changes it little; medians over all steps of a side but the first of
each round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_measuring import random_batch
from perceiver.config import Experiment
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.training import parallel
from perceiver.training.loop import fit
from perceiver.training.parallel import World, join_world
from perceiver.training.run import build_state


@contextmanager
def as_one_of_many() -> Iterator[None]:
    with patch.object(parallel, "is_alone", lambda *_: False):
        yield


def step_times(experiment: Experiment, world: World, steps: int) -> list[float]:
    """Seconds of processor time of each step after the first."""
    task, times = build_task(experiment), []
    state = build_state(experiment, task, world)
    batch = random_batch(experiment, experiment.training.global_batch_size, None, world.device)

    def batches() -> Iterator[list[Any]]:
        for _ in range(steps + 1):
            times.append(time.process_time())
            yield [batch]

    fit(experiment.optim, 0, task, state, batches(), world, steps + 1, lambda result: None)
    times.append(time.process_time())
    return [after - before for before, after in zip(times[1:-1], times[2:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 64])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world, found = join_world(torch.device("cpu")), []
    for size in args.batch_sizes:
        preset = PRESETS[args.preset]()
        experiment = replace(preset, training=replace(preset.training, global_batch_size=size, precision="fp32"))
        sides: dict[str, list[float]] = {"whole": [], "sharded": []}
        for _ in range(args.rounds):
            sides["whole"] += step_times(experiment, world, args.steps)
            with as_one_of_many():
                sides["sharded"] += step_times(experiment, world, args.steps)
        whole, sharded = (1e3 * statistics.median(sides[name]) for name in ("whole", "sharded"))
        print(f"{args.preset}, batch {size}: {whole:.1f} ms whole, {sharded:.1f} ms with FSDP's hooks ({whole / sharded:.2f})", flush=True)
        found.append({"preset": args.preset, "batch": size, "whole_ms": whole, "sharded_ms": sharded})
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
