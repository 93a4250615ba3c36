"""The parts of `benchmarks.gpu_check` that compare with others: transformers, krasserm/perceiver-io."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks import step_time
from benchmarks.gpu_measuring import Check, random_batch, same, seconds, take_steps
from perceiver.models import build_model
from perceiver.presets import PRESETS


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
