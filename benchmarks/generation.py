"""Speed of generation with the key/value cache, beside the bound from reading the weights once per step.

    python -m benchmarks.generation [--preset clm-wikitext] [--tokens 128] [--device cpu|cuda] [--threads N] [--out
    results.json] [--reference FOLDER]

Weights are random: speed does not depend on them. The bound is a matrix-vector product over as many bytes as the
model's weights have, in the same process, right before and after each run; ratios compare across machines, times do
not. A step gives one token for each row of the batch.

With --reference, krasserm/perceiver-io 0.6.0 generates in between, with a model of the same sizes. FOLDER is made by
    pip install --no-deps --target FOLDER perceiver-io==0.6.0 pytorch-lightning==1.9.5 lightning-utilities torchmetrics \
        fairscale jsonargparse 'setuptools<80'
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from perceiver.generation.generate import stream
from perceiver.generation.options import Sampling
from perceiver.models import PerceiverAR, PerceiverARConfig, build_model
from perceiver.presets import PRESETS

Clock = Callable[[], float]
"""Seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="clm-wikitext")
    parser.add_argument("--prompt", type=int, default=1024, help="prompt tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes (1 8)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="compute threads; default: PyTorch's choice")
    parser.add_argument("--busy", action="store_true", help="count CPU time, not the clock's: on a machine that others use, one thread")
    parser.add_argument("--uncached", action="store_true", help="measure generation without cache too (8 tokens)")
    parser.add_argument("--compile", action="store_true", help="measure generation with a compiled step too")
    parser.add_argument("--reference", type=Path, help="folder with krasserm/perceiver-io: measure it too (8 tokens, CPU)")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args()
    if args.threads or args.busy:
        torch.set_num_threads(1 if args.busy else args.threads)
    clock = time.process_time if args.busy else time.perf_counter
    device = torch.device(args.device)
    config = PRESETS[args.preset]().model
    assert isinstance(config, PerceiverARConfig), "generation is Perceiver AR's"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = build_model(config).to(device=device, dtype=dtype).eval().requires_grad_(False)
    results = []
    for batch in args.batches:
        # As many latents as there are, and one, from which they grow.
        for num_latents in sorted({min(config.max_latents, args.prompt), least_latents(config, args.prompt)}, reverse=True):
            for mode in ["cached"] + ["compiled"] * args.compile + ["uncached"] * args.uncached:
                tokens = args.tokens if mode != "uncached" else min(8, args.tokens)
                results.append(measure(model, batch, args.prompt, num_latents, tokens, args.repeats, mode, clock))
                print_row(results[-1], first=len(results) == 1)
        if args.reference:
            results.append(measure_reference(args.reference, model, batch, args.prompt, args.repeats, clock))
            print_row(results[-1], first=False)
    if args.out:
        args.out.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "results": results}, indent=1))


def least_latents(config: PerceiverARConfig, prompt: int) -> int:
    return max(1, prompt - (config.max_seq_len - config.max_latents))


def measure(
    model: PerceiverAR,
    batch: int,
    prompt: int,
    num_latents: int,
    tokens: int,
    repeats: int,
    mode: str,
    clock: Clock,
) -> dict[str, Any]:
    """Prefill and steps of one setting ("cached", "compiled" or "uncached"): medians over the repeats, each between two
    measurements of the bound."""
    device = next(model.parameters()).device
    ids = torch.randint(6, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    runs = []
    if mode == "compiled":
        list(step_times(model, ids, num_latents, 3, mode, clock))
    for _ in range(repeats):
        before = read_seconds(model, clock)
        times = list(step_times(model, ids, num_latents, tokens, mode, clock))
        bound = (before + read_seconds(model, clock)) / 2
        prefill, steps = times[0], times[1:]
        step, quarter = statistics.mean(steps), max(1, len(steps) // 4)
        runs.append(
            {
                "prefill_ms": 1e3 * prefill,
                "step_ms": 1e3 * step,
                "first_quarter_ms": 1e3 * statistics.mean(steps[:quarter]),
                "last_quarter_ms": 1e3 * statistics.mean(steps[-quarter:]),
                "tokens_per_s": batch / step,
                "bound_ms": 1e3 * bound,
                "x_bound": step / bound,
            }
        )
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "batch": batch,
        "latents": num_latents,
        "mode": mode,
        **middle,
        "cache_MiB": cache_bytes(model, batch, prompt + tokens) / 2**20,
        "peak_MiB": peak_bytes(device) / 2**20,
    }


def measure_reference(folder: Path, model: PerceiverAR, batch: int, prompt: int, repeats: int, clock: Clock) -> dict[str, Any]:
    """The reference in a process of its own, like `measure`: it has no cache, so all its steps cost the same."""
    config, tokens = model.config, 8
    sizes = {name: getattr(config, name) for name in ("vocab_size", "max_seq_len", "num_channels", "num_heads")}
    sizes |= {"num_latents": config.max_latents, "num_self_attention_layers": config.num_self_attention_layers}
    settings = {"model": sizes, "batch": batch, "prompt": prompt, "tokens": tokens, "threads": torch.get_num_threads()}
    script = Path(__file__).with_name("reference_generation.py")
    runs = []
    for _ in range(repeats):
        before = read_seconds(model, clock)
        child = subprocess.run(
            [sys.executable, str(script), json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": str(folder.absolute())}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        run = json.loads(child.stdout.splitlines()[-1])
        bound, step = 1e3 * (before + read_seconds(model, clock)) / 2, run["step_ms"]
        quarters = {"first_quarter_ms": step, "last_quarter_ms": step}
        runs.append({**run, **quarters, "tokens_per_s": 1e3 * batch / step, "bound_ms": bound, "x_bound": step / bound})
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"batch": batch, "latents": min(config.max_latents, prompt), "mode": "reference", **middle, "cache_MiB": 0.0}


def step_times(model: PerceiverAR, ids: torch.Tensor, num_latents: int, tokens: int, mode: str, clock: Clock) -> Iterator[float]:
    """Seconds of the prefill with the first token, then of each further token."""
    generated = stream(
        model,
        ids,
        max_new_tokens=tokens,
        num_latents=num_latents,
        sampling=Sampling(temperature=0),
        use_cache=mode != "uncached",
        compile=mode == "compiled",
    )
    done = object()
    while True:
        start = clock()
        token = next(generated, done)
        if token is done:
            return
        synchronize(ids.device)
        yield clock() - start


def read_seconds(model: PerceiverAR, clock: Clock, repeats: int = 15) -> float:
    """Seconds to read as many bytes as the model's weights, as a matrix-vector product does: the median of some."""
    weights = sum(p.numel() for p in model.parameters())
    sample = next(model.parameters())
    matrix = torch.ones(weights // 512, 512, device=sample.device, dtype=sample.dtype)
    vector = torch.ones(512, device=sample.device, dtype=sample.dtype)
    times = [seconds(lambda: torch.mv(matrix, vector), sample.device, clock) for _ in range(repeats)]
    return statistics.median(times)


def seconds(function: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(model: PerceiverAR, batch: int, num_tokens: int) -> int:
    """Memory of the key/value cache."""
    config = model.config
    tokens = min(config.max_seq_len, num_tokens)
    latents = min(config.max_latents, tokens)
    places = tokens + config.num_self_attention_layers * latents
    return 2 * batch * config.num_channels * places * next(model.parameters()).element_size()


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the device, or of the process (Linux counts it in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_row(row: dict[str, Any], first: bool) -> None:
    """One line; above the first one the names of its columns."""
    columns = {
        "batch": f"{row['batch']}",
        "latents": f"{row['latents']}",
        "mode": row["mode"],
        "prefill ms": f"{row['prefill_ms']:.1f}",
        "step ms": f"{row['step_ms']:.2f}",
        "first/last quarter": f"{row['first_quarter_ms']:.2f} / {row['last_quarter_ms']:.2f}",
        "tokens/s": f"{row['tokens_per_s']:.1f}",
        "bound ms": f"{row['bound_ms']:.2f}",
        "x bound": f"{row['x_bound']:.2f}",
        "cache MiB": f"{row['cache_MiB']:.1f}",
        "peak MiB": f"{row['peak_MiB']:.0f}",
    }
    widths = {name: max(len(name), 9) + 2 for name in columns}
    if first:
        print("".join(f"{name:>{widths[name]}}" for name in columns))
    print("".join(f"{value:>{widths[name]}}" for name, value in columns.items()), flush=True)


if __name__ == "__main__":
    main()
