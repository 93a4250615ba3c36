"""Time per step under Ray Train and Ray Data against the same loop without Ray, on the same prepared data.

    python -m benchmarks.ray_overhead [--steps 120] [--out results.json] [--source FOLDER]

Both train the img-clf-mnist model with one worker and the same number of threads, through perceiver/training/run.py; only who
reads the shards and who started the process differ. Runs alternate, so that both see the same machine; the first steps of a run
(start of the readers) are left out. Prints seconds per step, their ratio, and the share of time that Ray's run waited for data.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from perceiver.config import Experiment, from_dict, to_dict
from perceiver.data.manifest import Manifest
from perceiver.datasets import Dataset
from perceiver.presets import PRESETS
from perceiver.runs import Run
from perceiver.tasks import build_task
from perceiver.training.batches import read_here
from perceiver.training.parallel import join_world
from perceiver.training.run import Training

EVERY = 20
"""Steps between two measurements."""


def without_ray(config: dict, data: str, run: str, threads: int) -> None:
    torch.set_num_threads(threads)
    experiment = from_dict(config)
    world = join_world(torch.device("cpu"))
    Training(experiment, build_task(experiment), data, Manifest.load(data), world, Path(run), read_here).run()


def with_ray(experiment: Experiment, data: str, run: Path) -> None:
    from ray_jobs import driver
    from ray_jobs.preflight import plan_resources
    from ray_jobs.ray_env import connect

    with connect(experiment.parallel):
        driver.train(experiment, data, Run(run), plan_resources(experiment))


def steady(run: Path) -> list[dict]:
    """The measurements of a run after its first ones."""
    return [record for record in Run(run).metrics() if "step_seconds" in record][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--source", default="mnist-mini", help="MNIST: a name or a folder (see docs/data.md)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the worker")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = PRESETS["img-clf-mnist"]()
    experiment = replace(
        base,
        data=replace(base.data, source=args.source),
        training=replace(base.training, global_batch_size=128, max_epochs=None, max_steps=args.steps),
        parallel=replace(base.parallel, threads_per_worker=args.threads),
        run=replace(base.run, log_every=EVERY, val_every=10**9, checkpoint_every=10**9, val_batches=1),
    )
    from ray_jobs.preprocess import prepare

    prepare(experiment)
    data = Dataset.find(experiment).folder
    seconds: dict[str, list[float]] = {"without Ray": [], "with Ray": []}
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            plain, ray = Path(folder) / f"plain-{repeat}", Path(folder) / f"ray-{repeat}"
            process = multiprocessing.get_context("spawn").Process(
                target=without_ray, args=(to_dict(experiment), data, str(plain), args.threads)
            )
            process.start()
            process.join()
            with_ray(experiment, data, ray)
            seconds["without Ray"] += [record["step_seconds"] for record in steady(plain)]
            seconds["with Ray"] += [record["step_seconds"] for record in steady(ray)]
            waits += [record["data_wait"] for record in steady(ray)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "seconds_per_step": medians,
        "ratio": medians["with Ray"] / medians["without Ray"],
        "data_wait": statistics.median(waits),
        "threads": args.threads,
        "all": seconds,
    }
    for name, value in medians.items():
        print(f"{name:<12} {value * 1000:8.1f} ms per step (median of {len(seconds[name])} intervals of {EVERY} steps)")
    print(f"ratio        {results['ratio']:8.3f}   data wait {results['data_wait']:.2%}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
