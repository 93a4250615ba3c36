"""The parts of `benchmarks.gpu_check` that compare with others: transformers, krasserm/perceiver-io, Liger Kernel."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from benchmarks import step_time
from benchmarks.gpu_measuring import Check, random_batch, same, seconds, take_steps
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.tasks.base import IGNORE_INDEX
from perceiver.tasks.chunked_loss import chunked_cross_entropy


def others(check: Check) -> None:
    """The same work by transformers, forward, backward and AdamW, in the same process."""
    for name, size in (("mlm-imdb", 16), ("img-clf-imagenet", 16)):
        if check.tiny:
            break
        for precision in ("fp32", "bf16"):
            found = {}
            for side in ("ours", "transformers"):
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(check.device)
                step = other_step(check, name, side, size, precision)
                found[side] = seconds(check.device, step, 5, 2), torch.cuda.max_memory_allocated(check.device)
                del step
            faster = found["transformers"][0] / found["ours"][0]
            less = found["transformers"][1] / found["ours"][1]
            check.add(f"{name} {precision}: transformers' step / ours", faster, "", ">= 1", faster >= 1, ours_ms=1e3 * found["ours"][0])
            check.add(f"{name} {precision}: transformers' memory / ours", less, "", ">= 1", less >= 1)


def reference(check: Check) -> None:
    """A step of krasserm/perceiver-io's byte language model, in a process of its own, and ours."""
    if check.reference is None:
        return
    script = Path(__file__).with_name("reference_step.py")
    for precision in ("fp32", "bf16"):
        settings = {"device": str(check.device), "precision": precision, "tiny": check.tiny, "batch": 2 if check.tiny else 24}
        gc.collect()
        if check.device.type == "cuda":
            torch.cuda.empty_cache()
        child = subprocess.run(
            [sys.executable, str(script), json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": str(check.reference.absolute())}, capture_output=True, text=True,
        )  # fmt: skip
        if child.returncode:
            raise RuntimeError(child.stderr[-1500:])
        theirs = json.loads(child.stdout.splitlines()[-1])
        experiment = PRESETS["clm-wikitext"]()
        if check.tiny:
            experiment = replace(experiment, model=replace(experiment.model, num_self_attention_layers=1))
        experiment = replace(
            experiment, training=replace(experiment.training, precision=precision), parallel=replace(experiment.parallel, workers=1)
        )
        ours = take_steps(check, experiment, same(random_batch(experiment, settings["batch"], None, check.device), 2 if check.tiny else 7))
        faster = theirs["step_ms"] / (1e3 * ours.seconds)
        check.add(f"clm-wikitext {precision}: the reference's step / ours", faster, "", ">= 3", faster >= 3, reference_ms=theirs["step_ms"])
        if ours.peak_bytes:
            check.add(f"clm-wikitext {precision}: the reference's memory / ours", theirs["peak_bytes"] / ours.peak_bytes, "")


def liger(check: Check) -> None:
    """The loss of clm-c4 with its gradients, by the fused kernel of Liger Kernel (where it is installed) and by this project. On a CPU only
    in Triton's interpreter (TRITON_INTERPRET=1).
    """
    cuda = check.device.type == "cuda"
    if find_spec("liger_kernel") is None or not (cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    model = PRESETS["clm-c4"]().model
    rows, classes, channels = (48, 200, 32) if check.tiny else (32 * model.max_latents, model.vocab_size, model.num_channels)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, channels, generator=generator) for size in (rows, classes))
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[:: rows // 8] = IGNORE_INDEX
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden, weight = (t.to(check.device, dtype).requires_grad_() for t in (hidden, weight / channels**0.5))
    labels = labels.to(check.device)

    def own() -> torch.Tensor:
        return chunked_cross_entropy(hidden, weight, None, labels)[0]

    def theirs() -> torch.Tensor:
        found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, IGNORE_INDEX, 0.0, 0.0, "sum")
        return found[0] if isinstance(found, tuple) else found

    ours, other = (value_and_gradients(loss, hidden, weight) for loss in (own, theirs))
    near = 2e-2 if cuda else 1e-5
    for name, a, b in zip(("loss", "gradient of the hidden states", "gradient of the matrix"), ours, other, strict=True):
        apart = ((a - b).norm() / a.norm()).item()
        check.add(f"Liger's {name} and ours, difference", apart, "", f"<= {near:g}", apart <= near)
    if not cuda:
        return
    times, memory = [], []
    for loss in (own, theirs):
        torch.cuda.reset_peak_memory_stats(check.device)
        times.append(seconds(check.device, partial(value_and_gradients, loss, hidden, weight)))
        memory.append(torch.cuda.max_memory_allocated(check.device))
    check.add("Liger's time / ours", times[1] / times[0], "", ">= 1", times[1] >= times[0], ours_ms=1e3 * times[0])
    check.add("Liger's memory / ours", memory[1] / memory[0], "", ">= 1", memory[1] >= memory[0])


def value_and_gradients(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """A loss and its gradients with respect to what it is computed from, in fp32."""
    value = loss()
    return [t.float() for t in (value, *torch.autograd.grad(value, inputs))]


def other_step(check: Check, name: str, side: str, size: int, precision: str) -> Callable[[], None]:
    """A training step of `benchmarks.step_time`'s workload."""
    torch.manual_seed(0)
    workload = step_time.WORKLOADS[name]
    batch = {key: value.to(check.device) for key, value in workload.batch(size).items()}
    if side == "ours":
        model: nn.Module = build_model(PRESETS[name]().model)
        loss = workload.loss
    else:
        made = step_time.transformers_step(name, batch)
        assert made is not None
        model, other = made
        loss = lambda model, batch: other(model)  # noqa: E731
    model = model.to(check.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(check.device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model, batch)
        value.backward()
        optimizer.step()

    return step
