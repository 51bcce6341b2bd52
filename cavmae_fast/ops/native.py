"""The CUDA library of `csrc/`, loaded with ctypes: plain functions of pointers, sizes and a stream.

No operator uses it unless asked: its kernels compile, but have not yet run on a device. `CAVMAE_NATIVE=1` selects them
for CUDA tensors (now: dGELU and the bias gradient in the backward of `linear_gelu`).
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1
"What this file calls: `CAVMAE_ABI_VERSION` of csrc/cavmae.h."
LIBRARY = Path(__file__).parents[1] / "_native" / "libcavmae.so"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HOW_TO_BUILD = "CAVMAE_BUILD_CUDA=1 pip install -e . (needs nvcc)"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, loaded on first use; None when it was not built. RuntimeError when it is of another version."""
    return load(LIBRARY) if LIBRARY.exists() else None


def load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    built_for = loaded.cavmae_abi_version()
    if built_for != ABI_VERSION:
        raise RuntimeError(
            f"{path} was built for version {built_for} of its interface, this cavmae_fast needs version {ABI_VERSION}; "
            f"build it again: {HOW_TO_BUILD}"
        )
    loaded.cavmae_error_string.argtypes, loaded.cavmae_error_string.restype = [ctypes.c_int], ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.cavmae_dgelu_bias.argtypes = [pointer, pointer, pointer, pointer, size, size, ctypes.c_int, pointer]
    return loaded


def selected(x: Tensor) -> bool:
    """Whether `CAVMAE_NATIVE=1` asks for the library and `x [rows, width]` is for it: on CUDA, in one of its dtypes,
    rows multiples of 16 bytes that start at such. RuntimeError when it is asked for and missing."""
    if os.environ.get("CAVMAE_NATIVE") != "1" or x.device.type != "cuda":
        return False
    if library() is None:
        raise RuntimeError(f"CAVMAE_NATIVE=1, but {LIBRARY} does not exist; build it: {HOW_TO_BUILD}")
    return x.dtype in DTYPES and x.shape[1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def call(name: str, *args: object) -> None:
    """Calls the library's function `name`; RuntimeError with its reason when it does not return 0."""
    loaded = library()
    code = getattr(loaded, name)(*args)
    if code != 0:
        raise RuntimeError(f"{name} failed: {loaded.cavmae_error_string(code).decode()} (code {code})")


def status() -> str:
    """One line for `cavmae-fast doctor`."""
    try:
        if library() is None:
            return f"not built; {HOW_TO_BUILD}"
    except (OSError, RuntimeError) as error:
        return f"unusable: {error}"
    use = (
        "in use (CAVMAE_NATIVE=1)"
        if os.environ.get("CAVMAE_NATIVE") == "1"
        else "not in use (CAVMAE_NATIVE=1 selects it)"
    )
    return f"{LIBRARY}, interface version {ABI_VERSION}, {use}"
