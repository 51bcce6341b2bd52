"""Triton, or what stands for it where it is not installed (it exists for Linux alone).

Without it every operator runs its PyTorch implementation; asking for a kernel by name is an error that says so.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

AVAILABLE = importlib.util.find_spec("triton") is not None


class _MissingKernel:
    def __init__(self, function: Any) -> None:
        self.__name__ = function.__name__

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(f"the kernel {self.__name__} needs Triton, which is not installed: pip install triton (Linux)")


if AVAILABLE:
    import triton
    import triton.language as tl
else:
    triton = SimpleNamespace(
        jit=_MissingKernel,
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    tl = SimpleNamespace(constexpr=lambda value: value)
