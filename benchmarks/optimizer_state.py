"""Memory and time of a step of AdamW with moments in 32 and in 8 bits, and whether a saved state continues bit for bit.

    python -m benchmarks.optimizer_state [--preset clm-c4] [--repeats 9]

One process, on a GPU where there is one; gradients are random. The optimizer's step alone is timed, without forward and backward pass.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from perceiver.config import AdamW, AdamW8bit, OptimConfig, OptimizerConfig
from perceiver.models import build_model
from perceiver.presets import PRESETS
from perceiver.training.optim import build_optimizer


def set_gradients(model: nn.Module, seed: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device) * 1e-3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(model: nn.Module, config: OptimizerConfig, repeats: int) -> tuple[float, float, float]:
    """MB of the state, MB of the step's passing tensors (0 on CPUs: not measured), and median milliseconds of a step."""
    optimizer = build_optimizer(model, OptimConfig(optimizer=config))
    set_gradients(model, 0)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    passing, times = 0, []
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = time.perf_counter()
        optimizer.step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    if torch.cuda.is_available():
        passing = torch.cuda.max_memory_allocated() - before
    return size / 1e6, passing / 1e6, statistics.median(times)


def continues(model: nn.Module, config: OptimizerConfig) -> bool:
    """Whether a state that is read back takes the same next step, bit for bit."""
    optimizer = build_optimizer(model, OptimConfig(optimizer=config))
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    found = []
    for _ in range(2):
        set_gradients(model, 3)
        optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
        optimizer = build_optimizer(model, OptimConfig(optimizer=config))
        set_state_dict(model, optimizer, model_state_dict=copy.deepcopy(saved[0]), optim_state_dict=copy.deepcopy(saved[1]))
    return all(map(torch.equal, *found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="clm-c4")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(PRESETS[args.preset]().model).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.preset}: {parameters:,} parameters on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}")
    for config in (AdamW(), AdamW8bit()):
        size, passing, milliseconds = measure(model, config, args.repeats)
        same = "bit for bit" if continues(model, config) else "with OTHER bits"
        print(f"{type(config).__name__}: state {size:,.1f} MB, passing {passing:,.1f} MB, {milliseconds:,.2f} ms a step, continues {same}")


if __name__ == "__main__":
    main()
