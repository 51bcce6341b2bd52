"""What the machine itself can do; the clocks are the tuner's (`cavmae_fast.tuning.clock`)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import DTYPES
from cavmae_fast.tuning.clock import captured, elapsed, interleave, spin, summary, synchronize

__all__ = ["captured", "ceilings", "elapsed", "interleave", "rotations", "spin", "summary", "synchronize"]

CACHE_TIMES = 4
"Inputs rotate through this many times the last-level cache, so that no call finds its inputs there."
MODEL_SHAPES = [(45312, 768, 3072), (45312, 3072, 768), (181248, 512, 2048), (181248, 2048, 512), (8192, 8192, 8192)]
"(rows, k, n) of the models' products at batch 256, and a large square one."
CPU_SHAPES = [(708, 768, 3072), (708, 3072, 768), (2832, 512, 2048), (2832, 2048, 512), (2048, 2048, 2048)]
TINY_SHAPES = [(64, 64, 64)]


def rotations(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of `set_bytes` it takes to rotate past the last-level cache (1 on a CPU)."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(1, min(32, math.ceil(CACHE_TIMES * cache / max(set_bytes, 1))))


# -------------------------------------------------------------------------------------------------------- ceilings


def ceilings(device: torch.device, dtypes: list[str], tiny: bool = False) -> dict[str, Any]:
    """What the machine sustains: products in TFLOP/s by dtype and shape, on random data, and a copy in GB/s, counting
    bytes read and bytes written."""
    on_gpu = device.type == "cuda"
    shapes = TINY_SHAPES if tiny else MODEL_SHAPES if on_gpu else CPU_SHAPES
    found: dict[str, Any] = {"gemm_tflops": {}, "gemm_shapes": {}}
    spin(device)
    for dtype in dtypes:
        rates = {}
        for m, k, n in shapes:
            x, weight = (torch.randn(*size, device=device).to(DTYPES[dtype]) for size in ((m, k), (n, k)))
            ms = interleave({"gemm": lambda x=x, weight=weight: F.linear(x, weight)}, device, 5, 20.0)
            rates[f"{m}x{k}x{n}"] = 2e-9 * m * k * n / ms["gemm"]["median_ms"]
            del x, weight
        found["gemm_shapes"][dtype] = rates
        found["gemm_tflops"][dtype] = max(rates.values())
    size = 1 << (16 if tiny else 32 if on_gpu else 28)  # bytes
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ms = interleave({"copy": lambda: target.copy_(source)}, device, 5, 20.0)
    found["copy_gb_per_s"] = 2e-6 * size / ms["copy"]["median_ms"]
    return found
