"""The CUDA library of `csrc/`, loaded with ctypes: plain functions of pointers, sizes and a stream.

Its kernels are the `cuda` implementations of operators: the MLP's matrix products, and attention's backward pass.
They compile, but have not yet run on a device: `CAVMAE_OPS=cuda` asks for them, and the tuner tries them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 4
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
    for function in (loaded.cavmae_linear_gelu, loaded.cavmae_hidden_gradient):
        function.argtypes = [pointer] * 6 + [ctypes.c_int, size, size, ctypes.c_int, pointer]
    streams = [pointer, ctypes.c_int, size, size]
    loaded.cavmae_weight_gradient_workspace.argtypes = [pointer, *streams]
    loaded.cavmae_weight_gradient.argtypes = [*[pointer] * 3, size, pointer, pointer, *streams, ctypes.c_int, pointer]
    loaded.cavmae_attention_longest.argtypes, loaded.cavmae_attention_longest.restype = [size], size
    loaded.cavmae_attention_backward.argtypes = [
        *[pointer] * 9, size, size, pointer, pointer, ctypes.c_int, size, size, size, ctypes.c_int, pointer,
    ]  # fmt: skip
    return loaded


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """The addresses of tensors, as the library's functions take one for each stream."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def sizes(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def call(name: str, *args: object) -> None:
    """Calls the library's function `name`; RuntimeError with its reason when it does not return 0."""
    loaded = library()
    code = getattr(loaded, name)(*args)
    if code != 0:
        raise RuntimeError(f"{name} failed: {loaded.cavmae_error_string(code).decode()} (code {code})")


def aligned(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, from multiples of 16 bytes on, as the library takes them."""
    return [t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone().contiguous() for t in tensors]


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def device_limit(generations: Sequence[int]) -> str | None:
    """Why the current device does not run a kernel for these generations of GPUs."""
    if not torch.cuda.is_available():
        return None  # the dispatcher asks of a CPU's tensors, too, and refuses them itself
    major, minor = torch.cuda.get_device_capability()
    return None if major in generations else f"the CUDA library's kernel is not for compute capability {major}.{minor}"


def status() -> str:
    """One line for `cavmae-fast doctor`."""
    try:
        if library() is None:
            return f"not built; {HOW_TO_BUILD}"
    except (OSError, RuntimeError) as error:
        return f"unusable: {error}"
    return f"{LIBRARY}, interface version {ABI_VERSION}"
