"""Where a model computes, and in which dtype its matrix products run.

**fp8** is bfloat16 in which the products of all blocks are of 8-bit numbers: forward and the gradients of inputs in e4m3 and
e5m2 with a scale for every row (`ops/fp8.py`), the gradients of weights in bfloat16. What comes before and after the blocks
stays in bfloat16. It is a way to compute and no property of a model: nothing of it is kept in weights or checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cavmae_fast.ops.fp8 import check_fp8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GAIN = 1.25
"How many times as fast as in float32 a CPU must multiply in bfloat16 before 'auto' takes bfloat16."

_fp8 = False


def dtype_of(name: str) -> torch.dtype:
    """What an option `--dtype` computes all else in: a key of `DTYPES`, or 'fp8'."""
    return torch.bfloat16 if name == "fp8" else DTYPES[name]


@contextlib.contextmanager
def fp8_products() -> Iterator[None]:
    """Within, the blocks of all models multiply 8-bit numbers, under autocast to bfloat16: `with precision.autocast()` is
    both. The backward pass of what is computed within follows it, wherever it runs."""
    global _fp8
    before, _fp8 = _fp8, True
    try:
        yield
    finally:
        _fp8 = before


def in_fp8() -> bool:
    """Whether `fp8_products` is in force."""
    return _fp8


@dataclass(frozen=True)
class Precision:
    """The device of a model and the dtype of its matrix products; parameters and statistics stay in float32.

    `fp8`: with dtype bfloat16, the blocks' products are of 8-bit numbers. On a CPU this is the arithmetic of a GPU's fp8
    units, and slower than bfloat16: it is there to see what fp8 learns. Raises Fp8Error (ValueError) on a GPU without them.
    """

    device: torch.device
    dtype: torch.dtype
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.fp8:
            check_fp8(self.device)
            if self.dtype != torch.bfloat16:
                raise ValueError(f"fp8 goes with dtype torch.bfloat16; it is {self.dtype}")

    @staticmethod
    def named(device: torch.device, name: str) -> Precision:
        """That of an option `--dtype`: a key of `DTYPES`, or 'fp8'."""
        return Precision(device, dtype_of(name), name == "fp8")

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast to the dtype, and `fp8_products` where it is that; nothing for float32."""
        with contextlib.ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            if self.fp8:
                stack.enter_context(fp8_products())
            yield

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
