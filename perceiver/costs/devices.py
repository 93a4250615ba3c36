"""The GPUs that are known: their memory and their peak. And whether this machine's CPU has units for bf16."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

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
    tf32: float | None = None
    """Dense peak in FLOP/s with TF32; None: half of that of bf16, where there are bf16 units."""
    has_bf16: bool = True

    @property
    def tf32_peak(self) -> float:
        """Peak in FLOP/s of fp32 products that may use TF32."""
        return self.tf32 or (self.bf16 / 2 if self.has_bf16 else self.fp32)


GIB = 2**30
DEVICES = {
    "h200": Device("H200", 139.8 * GIB, 989e12, 67e12),
    "h200-nvl": Device("H200 NVL", 139.8 * GIB, 835e12, 60e12),
    "h100-nvl": Device("H100 NVL", 93.1 * GIB, 835e12, 60e12),
    "h100-pcie": Device("H100 PCIe", 79.1 * GIB, 756e12, 51e12),
    "h100": Device("H100", 79.1 * GIB, 989e12, 67e12),
    "a100-40gb": Device("A100-SXM4-40GB", 39.4 * GIB, 312e12, 19.5e12),
    "a100-80gb": Device("A100", 79.1 * GIB, 312e12, 19.5e12),
    "l40s": Device("L40S", 44.4 * GIB, 362e12, 91.6e12),
    "l40": Device("L40", 44.4 * GIB, 181e12, 90.5e12),
    "l4": Device("L4", 22.0 * GIB, 121e12, 30.3e12),
    "a10g": Device("A10G", 22.0 * GIB, 70e12, 31.5e12),
    "v100-16gb": Device("V100", 15.8 * GIB, 125e12, 15.7e12, has_bf16=False),
    "v100-32gb": Device("V100-SXM2-32GB", 31.7 * GIB, 125e12, 15.7e12, has_bf16=False),
    "t4": Device("T4", 14.6 * GIB, 65e12, 8.1e12, has_bf16=False),
    "b200": Device("B200", 178.0 * GIB, 2250e12, 75e12),
    "rtx-4090": Device("RTX 4090", 23.6 * GIB, 165e12, 82.6e12),
    "rtx-3090": Device("RTX 3090", 23.6 * GIB, 71e12, 35.6e12),
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    known = device_named(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16


def cpu_has_bf16(description: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether this machine's CPU has units for bf16; None: it does not say (other systems than Linux)."""
    try:
        lines = description.read_text().splitlines()
    except OSError:
        return None
    features = {word for line in lines if line.startswith(("flags", "Features")) for word in line.partition(":")[2].split()}
    return bool(features & {"avx512_bf16", "amx_bf16", "bf16"}) if features else None


def device_named(name: str) -> Device | None:
    """The kind of GPU that a driver calls so ("NVIDIA H100 80GB HBM3"); None: it is not known.

    Of kinds whose parts stand in the name as whole words, the one with the longest: an L40S is neither an L40 nor an L4.
    """
    words = re.compile(r"[^A-Za-z0-9]+")
    spaced = f" {words.sub(' ', name)} "
    found = [known for known in DEVICES.values() if f" {words.sub(' ', known.part)} " in spaced]
    return max(found, key=lambda known: len(known.part), default=None)
