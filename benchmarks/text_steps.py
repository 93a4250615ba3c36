"""Training steps of the full text models on a CPU: what recomputing and freezing save.

    python -m benchmarks.text_steps [--init-from WEIGHTS] [--suffix -small] [--batch-size 1] [--steps 3] [--threads 1]

Steps are those of the training loop (`perceiver.training.loop.fit`: forward, backward, gradient norm, AdamW), each case in a
process of its own, without Ray, on random bytes of the model's full length in float32:

    mlm-imdb              without and with activation checkpointing (from WEIGHTS if given: a model of this size)
    txt-clf-imdb-all      everything trained
    txt-clf-imdb-decoder  encoder frozen

Printed are the median time of a step (of processor time too: on a shared machine the one that counts) and the peak memory of
the process.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from perceiver.config import Experiment, ParallelConfig
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.tasks.masked_lm import usual_positions
from perceiver.tasks.text_classification import TextClassificationConfig
from perceiver.training.batches import Batch
from perceiver.training.init_from import find_start
from perceiver.training.loop import StepResult, fit
from perceiver.training.parallel import join_world
from perceiver.training.run import build_state

CASES = (("mlm-imdb", 0), ("mlm-imdb", 1), ("txt-clf-imdb-all", 0), ("txt-clf-imdb-decoder", 0))
"""Presets (without their suffix) and `parallel.activation_checkpointing`."""


def random_batch(experiment: Experiment, size: int) -> Batch:
    """What the task's collate makes, of random bytes."""
    length = experiment.model.input.max_seq_len
    ids = torch.randint(6, 262, (size, length))
    if isinstance(experiment.task, TextClassificationConfig):
        return {"ids": ids, "labels": torch.randint(0, 2, (size,))}
    num, _ = usual_positions(length, experiment.task.mask_probability)
    positions = torch.rand(size, length).topk(num).indices.sort().values
    return {"ids": ids, "positions": positions, "labels": ids.gather(1, positions)}


def run(name: str, recompute: int, args: argparse.Namespace) -> tuple[float, float, float, list[float], str]:
    """One case: median seconds and processor seconds of the steps but the first, peak memory in MiB, losses, and where the
    weights come from."""
    torch.set_num_threads(args.threads)
    preset = PRESETS[name + args.suffix]()
    start_from = args.init_from if name == "mlm-imdb" else None
    experiment = replace(
        preset,
        training=replace(preset.training, precision="fp32", init_from=start_from),
        parallel=ParallelConfig(activation_checkpointing=recompute, device="cpu"),
    )
    task, world = build_task(experiment), join_world(torch.device("cpu"))
    state = build_state(experiment, task, world)
    start = find_start(experiment, {name: p.shape for name, p in state.model.named_parameters()})
    origin = str(start or "random weights")
    if start is not None:
        start.apply(state.model)
    del start  # and the weights that it holds
    torch.manual_seed(0)
    times, losses = [], []

    def batches() -> Iterator[list[Batch]]:
        for _ in range(args.steps + 1):
            times.append((time.perf_counter(), time.process_time()))
            yield [random_batch(experiment, args.batch_size)]

    def after_step(result: StepResult) -> None:
        losses.append(result.loss_sum.item() / result.targets.item())

    fit(experiment.optim, experiment.training.seed, task, state, batches(), world, args.steps + 1, after_step)
    times.append((time.perf_counter(), time.process_time()))
    wall, cpu = (statistics.median(b[i] - a[i] for a, b in zip(times[1:-1], times[2:], strict=True)) for i in range(2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return wall, cpu, peak, losses, origin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init-from", help="weights that mlm-imdb starts from: a folder, a file, a run")
    parser.add_argument("--suffix", default="", help="-small: the small presets")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    measured = {}
    for name, recompute in CASES:
        with context.Pool(1) as pool:
            wall, cpu, peak, losses, origin = pool.apply(run, (name, recompute, args))
        measured[name, recompute] = cpu
        label = name + args.suffix + (", recomputing" if recompute else "")
        print(f"{label:38}{wall:8.3f} s a step {cpu:8.3f} s of processor time {peak:8,.0f} MiB", flush=True)
        print(f"  {origin}; losses {', '.join(f'{loss:.3f}' for loss in losses)}", flush=True)
    ratio = measured["txt-clf-imdb-all", 0] / measured["txt-clf-imdb-decoder", 0]
    print(f"a step of the frozen encoder's decoder is {ratio:.2f} times as fast as one of everything")


if __name__ == "__main__":
    main()
