"""Optimizers, weight-decay groups and learning-rate schedules."""

import math

import torch
from torch import nn

from perceiver.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or Adam over the trainable parameters; only matrices that multiply activations decay.

    Weights of linear layers and token embeddings (which are output matrices, too) decay; biases, norms, learned latents,
    queries and position embeddings do not. The learning rate is a tensor-free number set every step by `set_learning_rate`.
    """
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decaying |= {id(p) for name, p in model.named_parameters() if name.endswith("txt_embedding.weight")}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in decaying], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in decaying], "weight_decay": 0.0},
    ]
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return cls([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`.

    Linear warm-up from 0, then constant, or half a cosine down to `min_lr_fraction`, where it stays.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    low = config.min_lr_fraction
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
