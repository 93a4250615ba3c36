"""The optimizer of a model: which parameters decay, and the learning rate of a step."""

import torch
from torch import nn

from perceiver.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the trainable parameters; only matrices that multiply activations decay.

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
    return config.optimizer.build([g for g in groups if g["params"]], config.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
