"""Dropout on attention weights, made for CPUs, where drawing random numbers is what it costs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def drop(weights: Tensor, probability: float) -> tuple[Tensor, float]:
    """Sets each weight to 0 with the given probability.

    On a CPU the probability is rounded to a multiple of 2^-16, and four decisions come from one 64-bit random number: a
    third of the time of `torch.nn.functional.dropout`. Compilers and GPUs have a fused dropout of their own.

    Returns:
        The weights, not yet scaled, and the factor that keeps their expectation: to be applied wherever it is cheapest.
    """
    if weights.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(weights, probability), 1.0
    threshold = round(probability * 2**16)
    if threshold == 0:
        return weights, 1.0
    numbers = torch.empty(-(-weights.numel() // 4), dtype=torch.int64, device=weights.device)
    sixteenths = numbers.random_(-(2**63), None).view(torch.int16)[: weights.numel()].view_as(weights)
    return weights.masked_fill(sixteenths < threshold - 2**15, 0.0), 1 / (1 - threshold / 2**16)
