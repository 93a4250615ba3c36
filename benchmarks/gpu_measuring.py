"""What the parts of `benchmarks.gpu_check` measure with: batches drawn at random, steps and their times."""

import gc
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceiver.config import Experiment
from perceiver.costs.activations import Layout
from perceiver.costs.flops import num_kept, training_flops
from perceiver.costs.memory import step_memory
from perceiver.models import PerceiverARConfig
from perceiver.tasks import build_task
from perceiver.tasks.base import Batch
from perceiver.training.loop import StepResult, fit
from perceiver.training.parallel import World
from perceiver.training.run import build_state


@dataclass
class Check:
    """The device, and what has been found on it."""

    device: torch.device
    tiny: bool
    until: float
    reference: Path | None
    world: World
    rows: list[dict[str, Any]] = field(default_factory=list)
    part: str = ""
    peak: float | None = None

    def add(self, what: str, value: float, unit: str, goal: str = "", holds: bool | None = None, **more: Any) -> None:
        """A line of the table. A goal is a sentence, which `holds` or not; on a CPU none is judged."""
        judged = holds if self.device.type == "cuda" else None
        self.rows.append({"part": self.part, "what": what, "value": value, "unit": unit, "goal": goal, "holds": judged, **more})
        print(line(self.rows[-1]), flush=True)


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in row:
        return f"{row['part']:11}FAILED: {row['error']}"
    verdict = {True: "yes", False: "NO", None: ""}[row["holds"]]
    return f"{row['part']:11}{row['what']:58}{row['value']:>12,.4g} {row['unit']:12}{verdict:4}{row['goal']}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, function: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of a call."""
    for _ in range(warm_up):
        function()
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def random_batch(experiment: Experiment, size: int, seq_len: int | None, device: torch.device) -> Batch:
    """A batch as the experiment's task makes them, its values drawn at random.

    Args:
        seq_len: tokens of a Perceiver AR's window; None: the longest.
    """
    generator, model = torch.Generator().manual_seed(0), experiment.model
    batch = build_task(experiment).dummy_batch(size)
    if isinstance(model, PerceiverARConfig):
        length = seq_len or model.max_seq_len
        prefix = length - model.max_latents
        batch["ids"] = torch.randint(model.vocab_size, (size, length), generator=generator)
        batch["labels"] = torch.randint(model.vocab_size, (size, model.max_latents), generator=generator)
        if "prefix_keep" in batch:
            kept = num_kept(prefix, model.cross_attention_dropout)
            batch["prefix_keep"] = torch.rand(size, prefix, generator=generator).topk(kept).indices.sort().values
    else:
        outputs = getattr(model.output, "num_classes", None) or getattr(model.output, "vocab_size", None) or 2
        for name, tensor in batch.items():
            if name == "labels":
                batch[name] = torch.randint(outputs, tensor.shape, generator=generator)
            elif name == "positions":
                longest = model.input.max_seq_len
                batch[name] = torch.rand(size, longest, generator=generator).topk(tensor.shape[1]).indices.sort().values
            elif tensor.dtype == torch.uint8:
                batch[name] = torch.randint(256, tensor.shape, generator=generator, dtype=torch.uint8)
            elif tensor.dtype == torch.int64:
                batch[name] = torch.randint(6, 262, tensor.shape, generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass
class Steps:
    """Some steps of the training loop."""

    seconds: float
    """Median of a step."""
    peak_bytes: float
    loss: float
    weights: str
    """A digest of the weights after them; "": not asked for."""


def take_steps(check: Check, experiment: Experiment, batches: Iterator[list[Batch]], digest: bool = False) -> Steps:
    """Trains on batches with the real loop, from the initial weights. The first two steps are not timed, where there are more."""
    device = check.device
    task = build_task(experiment)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    state = build_state(experiment, task, check.world)
    times, losses = [time.perf_counter()], []

    def after_step(result: StepResult) -> bool:
        synchronize(device)
        times.append(time.perf_counter())
        losses.append(float(result.loss_sum / result.targets.clamp(min=1)))
        return time.monotonic() > check.until

    fit(experiment.optim, experiment.training.seed, task, state, batches, check.world, 1000, after_step)
    peak = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0
    steps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)][min(2, len(times) - 2) :]
    return Steps(statistics.median(steps), peak, losses[-1], weights_digest(state.model) if digest else "")


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(whole.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def same(batch: Batch, count: int, micro_batches: int = 1) -> Iterator[list[Batch]]:
    for _ in range(count):
        yield [batch] * micro_batches


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """How products of fp32 are computed: "highest" (fp32) or "high" (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def report_step(
    check: Check, what: str, experiment: Experiment, size: int, seq_len: int | None = None, goal: float | None = None, count: int = 8
) -> Steps:
    """Times steps of `size` examples at once; adds their MFU, and their memory beside the plan's."""
    batch = random_batch(experiment, size, seq_len, check.device)
    steps = take_steps(check, experiment, same(batch, count))
    flops = size * training_flops(experiment.model, seq_len=seq_len)
    check.add(f"{what}: examples/s", size / steps.seconds, "1/s", step_ms=1e3 * steps.seconds, batch=size, loss=steps.loss)
    if check.peak:
        mfu = flops / steps.seconds / check.peak
        check.add(f"{what}: MFU", 100 * mfu, "%", f">= {goal:.0%}" if goal else "", mfu >= goal if goal else None)
    if steps.peak_bytes:
        layout = Layout(
            micro_batch_size=size, accumulated=1, alone=True, precision=experiment.training.precision,
            checkpoint_every=experiment.parallel.recompute_every, cpu_offload=False, cuda=True, optimizer=experiment.optim.optimizer,
        )  # fmt: skip
        planned = step_memory(build_task(experiment).step(), layout).total
        ratio = steps.peak_bytes / planned
        check.add(f"{what}: memory / plan", ratio, "", "within 10%", abs(ratio - 1) <= 0.1, peak=steps.peak_bytes, plan=planned)
    return steps
