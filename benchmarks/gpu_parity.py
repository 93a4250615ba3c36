"""The part of `benchmarks.gpu_check` that compares models on the device with fp64 on the CPU."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_measuring import Check, random_batch
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.tasks import build_task
from perceiver.tasks.base import Batch


def parity(check: Check) -> None:
    """Logits and gradients of small models against those in fp64 on the CPU."""
    for name in ("clm-wikitext-small", "mlm-imdb-small", "quickstart"):
        config = PRESETS[name]().model
        experiment = replace(PRESETS[name](), model=without_dropout(config))
        batch = random_batch(experiment, 2, None, torch.device("cpu"))
        task = build_task(experiment)
        expected = gradients(task, build_model(experiment.model).double(), batch)
        for precision, dtype, most in (("fp32", torch.float32, 1e-3), ("bf16", torch.bfloat16, 0.1)):
            model = build_model(experiment.model).to(check.device, dtype)
            found = gradients(task, model, {key: value.to(check.device) for key, value in batch.items()})
            error = float((found - expected).norm() / expected.norm())
            check.add(f"{name} {precision}: relative error of the gradient", error, "", f"< {most:g}", error < most)


def without_dropout(config: Any) -> Any:
    """The model without random choices."""
    changes: dict[str, Any] = {}
    for name in ("post_attention_dropout", "residual_dropout"):
        if hasattr(config, name):
            changes[name] = 0.0
    for name in ("encoder", "decoder"):
        if hasattr(config, name):
            changes[name] = replace(getattr(config, name), dropout=0.0)
    return replace(config, **changes)


def gradients(task: Any, model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of a batch's mean loss as one fp64 vector on the CPU. Batches of numbers take the model's type."""
    dtype = next(model.parameters()).dtype
    if "images" in batch:
        loss = F.cross_entropy(model((batch["images"].double() / 127.5 - 1).to(dtype)).float().double(), batch["labels"], reduction="sum")
    else:
        loss, _ = task.loss(model, batch)
    (loss / task.num_targets(batch)).backward()
    return torch.cat([p.grad.detach().double().flatten().cpu() for p in model.parameters() if p.grad is not None])
