"""The CUDA library of `csrc/`, loaded with ctypes: plain functions of pointers, sizes and a stream.

Its kernels are the `cuda` implementations of operators (the gradient through bias and GELU) and, where it was built with the
headers of CUTLASS, the 'cuda product' of the MLP's two products on Hopper. They compile, but have not yet run on a device:
`CAVMAE_OPS=cuda` asks for the first, and the tuner tries both.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

ABI_VERSION = 2
"What this file calls: `CAVMAE_ABI_VERSION` of csrc/cavmae.h."
LIBRARY = Path(__file__).parents[1] / "_native" / "libcavmae.so"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PRODUCTS = "cavmae_hidden_gradient"
"The function that is there where the library was built with CUTLASS."
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
    if hasattr(loaded, PRODUCTS):
        sizes = [size, size, size, ctypes.c_int, pointer]
        loaded.cavmae_linear_gelu.argtypes = [pointer] * 5 + sizes
        loaded.cavmae_hidden_gradient.argtypes = [pointer] * 5 + sizes
    return loaded


def has_products() -> bool:
    """Whether the library is there, with the products that need CUTLASS."""
    return library() is not None and hasattr(library(), PRODUCTS)


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
    products = "with" if has_products() else "without"
    return f"{LIBRARY}, interface version {ABI_VERSION}, {products} the products that need CUTLASS"
