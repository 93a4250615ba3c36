"""Everything that only a GPU can show, in one command of at most ten minutes.

    python -m benchmarks.gpu_check [--minutes 8] [--parts parity attention ...] [--out results.json] [--reference FOLDER]
    python -m benchmarks.gpu_check --device cpu --tiny

Needs PyTorch alone, no Ray and no data: batches are drawn at random. Each part stands alone; what it found is written before the next
one starts, and a part that fails is noted with its error. At the end there is a table with a verdict for each line that has a goal.

    parity      models in fp32 and bf16 on the device against fp64 on the CPU
    attention   Perceiver AR's causal attention: a mask, or the flash kernel aligned at the right; new lengths against known ones
    clm-c4      the step of clm-c4 at 768 tokens: as the preset has it, without recomputing, compiled; MFU, memory against the plan
    steps       steps of other presets: MFU, memory against the plan, and the operators that take longest
    waiting     how long steps wait for batches that are made and moved meanwhile
    repeat      20 steps twice: the same bits or not, with deterministic algorithms and without
    generation  tokens a second, batch 1 and 8, and compiled
    transformers  the same steps by transformers
    reference   the same step by krasserm/perceiver-io (--reference: see benchmarks.generation)
    liger       the loss over a large vocabulary by Liger Kernel's fused kernel, where that is installed: numbers, time, memory
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend

from benchmarks import generation
from benchmarks.gpu_beside import liger, others, reference
from benchmarks.gpu_measuring import Check, float32_products, line, random_batch, report_step, same, seconds, synchronize, take_steps
from benchmarks.gpu_parity import parity
from perceiver.config import Experiment
from perceiver.costs.activations import Layout
from perceiver.costs.devices import peak_flops
from perceiver.costs.memory import step_memory
from perceiver.generation.generate import generate
from perceiver.generation.options import Sampling
from perceiver.models import attend, build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task, chunked_loss
from perceiver.tasks.base import Batch
from perceiver.training.loop import StepResult, fit
from perceiver.training.parallel import join_world
from perceiver.training.prefetch import Prefetch
from perceiver.training.run import build_state

RATE_SIZE = 8192
"""Side of the square products whose rate the device is measured by."""


# ----------------------------------------------------------------------------------------------------------------- parts


def attention_kernels(check: Check) -> None:
    """Forward and backward of Perceiver AR's attention at clm-c4's sizes."""
    batch, heads, latents, size = (2, 2, 64, 16) if check.tiny else (32, 10, 512, 128)
    dtype = torch.bfloat16 if check.device.type == "cuda" else torch.float32

    def step(keys: int) -> None:
        q = torch.randn(batch, heads, latents, size, device=check.device, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(batch, heads, keys, size, device=check.device, dtype=dtype, requires_grad=True) for _ in range(2))
        attend.attend(q, k, v, causal=True).sum().backward()

    lengths = [latents + 7 * n + 1 for n in range(1, 4 if check.tiny else 30)]
    for name, aligned in (("mask", attend.causal_mask), ("aligned", attend.right_aligned)):
        with mock.patch.object(attend, "right_aligned", aligned):
            known = seconds(check.device, lambda: step(latents + latents // 2))
            new = statistics.median(seconds(check.device, lambda n=n: step(n), 1, 0) for n in lengths)
            again = statistics.median(seconds(check.device, lambda n=n: step(n), 1, 0) for n in lengths)
        check.add(f"{name}: one length, again and again", 1e3 * known, "ms")
        check.add(f"{name}: lengths that are new", 1e3 * new, "ms")
        check.add(f"{name}: the same lengths again", 1e3 * again, "ms", "new ones cost at most 10% more", new <= 1.1 * again)
    for name, kernels in (("flash", [SDPBackend.FLASH_ATTENTION]), ("cuDNN", [SDPBackend.CUDNN_ATTENTION])):
        if check.device.type == "cuda":
            with mock.patch.object(attend, "GPU_KERNELS", kernels):
                check.add(f"{name}: as many keys as queries", 1e3 * seconds(check.device, lambda: step(latents)), "ms")
    # Heads of unequal size: each filled up to a multiple of 8, or all to the same, which the flash kernel takes.
    for what, qk, values in (("masked text", 32, 160), ("MNIST", 131, 131)):
        length = 64 if check.tiny else 2048

        def uneven(qk: int = qk, values: int = values, length: int = length) -> None:
            shapes = ((length // 8, qk), (length, qk), (length, values))
            q, k, v = (torch.randn(batch, 8, *shape, device=check.device, dtype=dtype, requires_grad=True) for shape in shapes)
            attend.attend(q, k, v).sum().backward()

        for name, most in (("each", 0), ("the same", attend.LARGEST_FLASH_HEAD)):
            with mock.patch.object(attend, "LARGEST_FLASH_HEAD", most):
                check.add(f"heads of {qk} and {values} ({what}), {name}", 1e3 * seconds(check.device, uneven), "ms")


def clm_c4(check: Check) -> None:
    """The step of clm-c4, one change after the other."""
    base = PRESETS["clm-c4-small" if check.tiny else "clm-c4"]()
    size, length = (4, 192) if check.tiny else (64, 768)
    one = replace(base.parallel, workers=1, activation_checkpointing=1)
    recomputed = replace(base, parallel=one)
    plain = replace(base, parallel=replace(one, activation_checkpointing=0))
    with mock.patch.object(attend, "right_aligned", attend.causal_mask):
        report_step(check, "recomputing every layer, attention with a mask", recomputed, size, length)
    report_step(check, "recomputing every layer", recomputed, size, length)
    with mock.patch.object(chunked_loss, "triton_is_there", lambda: False):
        report_step(check, "recomputing none, loss not fused", plain, size, length)
    report_step(check, "recomputing none", plain, size, length, goal=0.55)
    large = None
    if not check.tiny:
        large = largest_size(check, plain, (256, 192, 160, 128, 96))
        if large:
            report_step(check, f"recomputing none, batch {large}", plain, large, length, goal=0.55)
            profile(check, f"batch {large}", plain, large, length)
    compiled = replace(plain, parallel=replace(plain.parallel, compile=True))
    if check.device.type == "cuda":
        report_step(check, f"recomputing none, compiled, batch {large}", compiled, large or size, length, goal=0.55, count=10)
        torch._dynamo.reset()
    lengths = torch.randint(512, 1025, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    if check.tiny:
        lengths = [130, 190, 250]
    for what, chosen in (("lengths as drawn", lengths), ("lengths in multiples of 64", [-(-n // 64) * 64 for n in lengths])):
        batches = [random_batch(plain, size, n, check.device) for n in chosen]
        steps = take_steps(check, plain, ([batch] for batch in batches))
        tokens = statistics.mean(chosen) * size
        check.add(f"{what}: tokens/s", tokens / steps.seconds, "1/s", step_ms=1e3 * steps.seconds)
        del batches
    fp32 = replace(plain, training=replace(plain.training, precision="fp32"))
    few = size if check.tiny else 16
    for precision in ("highest", "high"):
        with float32_products(precision):
            steps = take_steps(check, fp32, same(random_batch(fp32, few, length, check.device), 5))
        check.add(f"fp32, products {precision}: examples/s", few / steps.seconds, "1/s")


def largest_size(check: Check, experiment: Experiment, sizes: tuple[int, ...]) -> int | None:
    """The first of some sizes whose step the plan lets fit."""
    step, limit = build_task(experiment).step(), torch.cuda.mem_get_info(check.device)[1] * 0.93
    for size in sizes:
        layout = Layout(
            micro_batch_size=size, accumulated=1, alone=True, precision="bf16", checkpoint_every=0, cpu_offload=False, cuda=True
        )
        if step_memory(step, layout).total < limit:
            return size
    return None


def other_steps(check: Check) -> None:
    """Steps of other presets, in bf16."""
    sizes = {"mlm-imdb": 32, "img-clf-imagenet": 32, "clm-wikitext": 24, "sam-maestro": 48, "img-clf-mnist": 128}
    if check.tiny:
        sizes = {"mlm-imdb-small": 2, "quickstart": 4}
    for name, size in sizes.items():
        experiment = PRESETS[name]()
        experiment = replace(
            experiment, training=replace(experiment.training, precision="bf16"), parallel=replace(experiment.parallel, workers=1)
        )
        try:
            report_step(check, f"{name} bf16", experiment, size)
        except torch.OutOfMemoryError as error:
            check.rows.append({"part": check.part, "what": name, "error": str(error).partition("\n")[0]})
            continue
        if name in ("mlm-imdb", "img-clf-imagenet", "quickstart"):
            profile(check, name, experiment, size)


def profile(check: Check, name: str, experiment: Experiment, size: int, seq_len: int | None = None) -> None:
    """The operators that take longest in a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    cuda = check.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    batch = random_batch(experiment, size, seq_len, check.device)
    with profiled(activities=activities) as found:
        take_steps(check, experiment, same(batch, 4))
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in found.key_averages() if not cuda or event.device_type.name == "CUDA"]  # kernels, not what calls them
    top = sorted(events, key=lambda event: -getattr(event, attribute))[:20]
    rows = [[event.key[:90], getattr(event, attribute) / 1e3, event.count] for event in top]
    check.rows.append(
        {"part": check.part, "what": f"{name}: operators", "operators": rows, "value": len(rows), "unit": "", "goal": "", "holds": None}
    )
    for operator, milliseconds, count in rows:
        print(f"{'':13}{operator:92}{milliseconds:10.2f} ms {count:6}", flush=True)


def waiting(check: Check) -> None:
    """Batches are collated on the host, as a worker does, while the device computes."""
    experiment = PRESETS["clm-c4-small" if check.tiny else "clm-c4"]()
    experiment = replace(experiment, parallel=replace(experiment.parallel, workers=1, activation_checkpointing=0))
    size, length = (4, 192) if check.tiny else (64, 768)
    host = random_batch(experiment, size, length, torch.device("cpu"))

    def batches() -> Iterator[list[Batch]]:
        for _ in range(4 if check.tiny else 16):
            batch = {name: tensor.clone() for name, tensor in host.items()}
            yield [{name: tensor.pin_memory() for name, tensor in batch.items()} if check.device.type == "cuda" else batch]

    prefetch = Prefetch(batches(), check.device)
    task = build_task(experiment)
    state = build_state(experiment, task, check.world)
    begun: list[float] = []
    waited: list[float] = []

    def after_step(result: StepResult) -> None:
        begun.append(time.perf_counter())
        waited.append(prefetch.wait_seconds)

    fit(experiment.optim, 0, task, state, prefetch, check.world, 1000, after_step)
    synchronize(check.device)
    total = time.perf_counter() - begun[0]
    share = (waited[-1] - waited[0]) / total
    check.add("share of the time that steps wait for batches", 100 * share, "%", "< 1%", share < 0.01)
    enqueued = (begun[-1] - begun[0]) / total
    check.add("share of the time until the last step is queued", 100 * enqueued, "%")


def repeat(check: Check) -> None:
    """The same steps twice."""
    for name, size in (("clm-c4-small", 16), ("mlm-imdb-small", 16), ("quickstart", 64)):
        experiment = PRESETS[name]()
        experiment = replace(experiment, parallel=replace(experiment.parallel, workers=1, activation_checkpointing=0))
        batch = random_batch(experiment, 4 if check.tiny else size, None, check.device)
        count = 3 if check.tiny else 20
        times = {}
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                first, second = (take_steps(check, experiment, same(batch, count), digest=True) for _ in range(2))
            finally:
                torch.use_deterministic_algorithms(False)
            times[deterministic] = second.seconds
            equal = first.weights == second.weights
            what = f"{name}, {count} steps twice, {'deterministic' if deterministic else 'as usual'}: the same bits"
            check.add(what, float(equal), "", "the same" if deterministic else "", equal if deterministic else None)
        check.add(f"{name}: time of deterministic steps / usual ones", times[True] / times[False], "")


def generating(check: Check) -> None:
    """Generation with the cache."""
    config = PRESETS["clm-wikitext-small" if check.tiny else "clm-wikitext"]().model
    prompt, tokens = (64, 4) if check.tiny else (1024, 64)
    dtype = torch.bfloat16 if check.device.type == "cuda" else torch.float32
    model = build_model(config).to(check.device, dtype).eval().requires_grad_(False)
    modes = ["cached"] if check.device.type == "cpu" else ["cached", "compiled"]
    for batch in (1, 8):
        for mode in modes:
            row = generation.measure(model, batch, prompt, min(prompt, config.max_latents), tokens, 2, mode, time.perf_counter)
            check.add(f"batch {batch}, {mode}: tokens/s", row["tokens_per_s"], "1/s", x_bound=row["x_bound"], step_ms=row["step_ms"])
            check.add(f"batch {batch}, {mode}: step / reading the weights", row["x_bound"], "")
    if check.device.type == "cuda":
        exact = build_model(replace(config, init_scale=0.1)).to(check.device).eval().requires_grad_(False)
        ids = torch.randint(6, config.vocab_size, (2, prompt), generator=torch.Generator().manual_seed(0)).to(check.device)
        found = [generate(exact, ids, max_new_tokens=32, num_latents=8, sampling=Sampling(temperature=0), compile=c) for c in (False, True)]
        equal = bool(found[0].equal(found[1]))
        check.add("fp32: the recorded step gives the same ids", float(equal), "", "the same", equal)


PARTS: dict[str, Callable[[Check], None]] = {
    "parity": parity,
    "attention": attention_kernels,
    "clm-c4": clm_c4,
    "steps": other_steps,
    "waiting": waiting,
    "repeat": repeat,
    "generation": generating,
    "transformers": others,
    "reference": reference,
    "liger": liger,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="start no part after this (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a try of the command itself")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps")
    parser.add_argument("--reference", type=Path, help="folder with krasserm/perceiver-io (see benchmarks.generation)")
    parser.add_argument("--out", type=Path, help="JSON file, written after every part")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need
    device = torch.device(args.device)
    started = time.monotonic()
    check = Check(device, args.tiny, started + 60 * args.minutes + 60, args.reference, join_world(device))
    check.peak = peak_flops(device)
    about: dict[str, Any] = {"torch": torch.__version__, "tiny": args.tiny, "device": str(device)}
    if device.type == "cuda":
        a = torch.randn(RATE_SIZE, RATE_SIZE, device=device, dtype=torch.bfloat16)
        rate = 2 * RATE_SIZE**3 / seconds(device, lambda: a @ a)
        about |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "product_flops": rate, "peak_flops": check.peak}
        print(f"{about['device']}, torch {torch.__version__}: bf16 products of {RATE_SIZE} at {rate / 1e12:.0f} TFLOP/s", flush=True)
        del a
    for name in args.parts:
        check.part, begun = name, time.monotonic()
        if begun - started > 60 * args.minutes:
            check.rows.append({"part": name, "error": "not started: the time is over"})
            continue
        try:
            PARTS[name](check)
        except Exception as error:  # whatever one part meets, the others are still wanted
            check.rows.append({"part": name, "error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()})
            print(traceback.format_exc(), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        about[f"seconds of {name}"] = round(time.monotonic() - begun, 1)
        if args.out:
            write(args.out, {"about": about, "rows": check.rows})
    print(f"\n{about}\n", *map(line, check.rows), sep="\n")
    return 1 if any("error" in row for row in check.rows) else 0


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
