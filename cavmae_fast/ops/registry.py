"""How an operator reaches PyTorch, and which implementation runs.

Every operator is registered with `torch.library` under the name space `cavmae_fast` with one schema, one fake and one or
two implementations: `torch` (PyTorch's own kernels, any device) and `triton` (ours). Which one runs is decided per call
from the device and from `CAVMAE_OPS`:

- `auto` (default): Triton on the CUDA architectures where the GPU suite has shown that very kernel right (`proven.json`,
  written by `benchmarks/gpu_suite.py`), PyTorch elsewhere;
- `triton`: Triton wherever the tensors are on a CUDA device, and on CPU tensors under `TRITON_INTERPRET=1`;
- `torch`: PyTorch everywhere.

`override(mode)` sets the same for a block of code and wins over the variable.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cavmae_fast.ops import _triton

NAMESPACE = "cavmae_fast"
MODES = ("auto", "triton", "torch")
PROVEN_FILE = Path(__file__).with_name("proven.json")

_library = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_override: str | None = None
#: operator name -> True when it has a Triton implementation
operators: dict[str, bool] = {}


def mode() -> str:
    """The mode in force: `override` first, then the environment variable `CAVMAE_OPS`, then `auto`."""
    value = _override or os.environ.get("CAVMAE_OPS", "auto")
    if value not in MODES:
        raise ValueError(f"CAVMAE_OPS is {value!r}; it must be one of {', '.join(MODES)}")
    return value


@contextlib.contextmanager
def override(value: str) -> Iterator[None]:
    """Runs a block with the implementation `value` ('auto', 'triton' or 'torch')."""
    global _override
    if value not in MODES:
        raise ValueError(f"mode is {value!r}; it must be one of {', '.join(MODES)}")
    before, _override = _override, value
    try:
        yield
    finally:
        _override = before


@functools.cache
def proven() -> dict[str, list[str]]:
    """Operator name -> CUDA architectures ('sm_90') on which its Triton kernels passed the GPU suite."""
    return json.loads(PROVEN_FILE.read_text())


@functools.cache
def architecture(index: int) -> str:
    """'sm_90' for a Hopper GPU: the key of `proven.json`."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(name: str, device: torch.device) -> bool:
    """Whether the operator `name` runs its Triton kernels on `device`."""
    if not _triton.AVAILABLE:
        if mode() == "triton":
            raise RuntimeError("CAVMAE_OPS=triton, but Triton is not installed: pip install triton (Linux)")
        return False
    match mode():
        case "torch":
            return False
        case "triton":
            return device.type == "cuda" or interpreting()
        case _:
            return device.type == "cuda" and architecture(device.index or 0) in proven().get(name, [])


def register(
    name: str, schema: str, *, reference: Callable, fake: Callable, triton: Callable | None = None
) -> torch._ops.OpOverload:
    """Registers `cavmae_fast::name` and returns its callable.

    `schema` is the part after the name, `(Tensor x, float eps) -> Tensor`. `reference` and `triton` take the schema's
    arguments and return new tensors that alias no input; `fake` returns empty tensors of the same shapes and strides.
    The first tensor among the arguments decides the device; with a float64 tensor among them `reference` runs always.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = name.removesuffix("_backward")
    operators[operator] = triton is not None

    def run(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        # Operators compute in the dtypes they are given: autocast, which modules alone read, must not change them.
        # Triton launches on the current device, wherever its tensors are.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST), torch.cuda.device_of(tensors[0]):
            # Kernels count in float32: float64 is for oracles, and PyTorch's.
            exact = any(tensor.dtype == torch.float64 for tensor in tensors)
            run_triton = triton is not None and not exact and use_triton(operator, tensors[0].device)
            return (triton if run_triton else reference)(*args)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
