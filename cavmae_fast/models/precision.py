"""Where a model computes, and in which dtype its matrix products run."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GAIN = 1.25
"How many times as fast as in float32 a CPU must multiply in bfloat16 before 'auto' takes bfloat16."


@dataclass(frozen=True)
class Precision:
    """The device of a model and the dtype of its matrix products; parameters and statistics stay in float32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to the dtype; nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in float16, whose small gradients would otherwise vanish; does nothing in other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def find_device(name: str) -> torch.device:
    """The device called `name` ('auto', 'cpu', 'cuda' or 'cuda:N'; auto: a GPU where there is one).

    Raises ValueError, naming the option, for any other name and for a device that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = device is not None and device.type in ("cpu", "cuda")
    if not known or (device.type == "cuda" and (device.index or 0) >= count):
        here = "PyTorch finds no CUDA device" if not count else f"PyTorch finds {count} CUDA devices"
        raise ValueError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N ({here})")
    return device


def choose_dtype(device: torch.device) -> tuple[str, str]:
    """The dtype that 'auto' stands for on `device`, 'bfloat16' or 'float32', and why."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU has matrix units for it"
        return "float32", "this GPU has no matrix units for bfloat16"
    low, full = product_seconds()
    times = f"a product took {1e3 * low:.2f} ms in bfloat16, {1e3 * full:.2f} ms in float32"
    return ("bfloat16", times) if full >= GAIN * low else ("float32", f"{times}; {GAIN}x as fast is asked for")


@functools.cache
def product_seconds() -> tuple[float, float]:
    """Shortest times of one matrix product on this CPU in bfloat16 and in float32.

    Measured, because what a CPU's features promise does not say it: AMX and AVX-512 units for bfloat16 differ by a factor
    of eight, and without them PyTorch emulates it.
    """
    operands = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    best = dict.fromkeys(operands, float("inf"))
    for _ in range(8):  # in turns, so that another program's burst of work falls on both
        for dtype, x in operands.items():
            begin = time.perf_counter()
            F.linear(x, x)
            best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return best[torch.bfloat16], best[torch.float32]


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product, measured (the best of a few): what a step can be compared with."""
    side = 8192 if device.type == "cuda" else 1024
    x = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):  # the first ones choose and load a kernel
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        F.linear(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best
