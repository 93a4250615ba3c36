"""The GPUs that are known: their memory and their peak."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A kind of GPU, by its maker's data sheet."""

    part: str
    """Part of the name that its driver gives it."""
    memory: float
    """Bytes that a program sees (less than the name says: some hold their error correction)."""
    bf16: float
    """Dense peak in FLOP/s, without sparsity (T4 and V100: of fp16, they have no bf16 units)."""
    fp32: float
    """Peak in FLOP/s without TF32."""


GIB = 2**30
# More special parts of names before those that they contain.
DEVICES = {
    "h200": Device("H200", 139.8 * GIB, 989e12, 67e12),
    "h100-pcie": Device("H100 PCIe", 79.1 * GIB, 756e12, 51e12),
    "h100": Device("H100", 79.1 * GIB, 989e12, 67e12),
    "a100-40gb": Device("A100-SXM4-40GB", 39.4 * GIB, 312e12, 19.5e12),
    "a100-80gb": Device("A100", 79.1 * GIB, 312e12, 19.5e12),
    "l40s": Device("L40S", 44.4 * GIB, 362e12, 91.6e12),
    "l4": Device("L4", 22.0 * GIB, 121e12, 30.3e12),
    "a10g": Device("A10G", 22.0 * GIB, 70e12, 31.5e12),
    "v100-16gb": Device("V100", 15.8 * GIB, 125e12, 15.7e12),
    "t4": Device("T4", 14.6 * GIB, 65e12, 8.1e12),
    "b200": Device("B200", 178.0 * GIB, 2250e12, 75e12),
    "rtx-4090": Device("RTX 4090", 23.6 * GIB, 165e12, 82.6e12),
    "rtx-3090": Device("RTX 3090", 23.6 * GIB, 71e12, 35.6e12),
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known.bf16 for known in DEVICES.values() if known.part in name), None)
