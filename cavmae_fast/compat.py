"""Every private interface of torch that this package uses, each as a function that says what it falls back to.

Private means: with an underscore in its name, so that torch may change it without notice. Each is looked up when it is
used, not when this file is imported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _autocast_keys() -> Any:
    key = torch._C.DispatchKey
    return torch._C.DispatchKeySet(key.AutocastCPU) | torch._C.DispatchKeySet(key.AutocastCUDA)


def without_autocast() -> contextlib.AbstractContextManager:
    """Switches autocast off for a block, on CPUs and GPUs, whatever dtypes it is set to.

    Private: `torch._C._ExcludeDispatchKeyGuard`, a microsecond. Without it: `torch.autocast(enabled=False)`, several.
    """
    if hasattr(torch._C, "_ExcludeDispatchKeyGuard") and hasattr(torch._C, "DispatchKeySet"):
        return torch._C._ExcludeDispatchKeyGuard(_autocast_keys())
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def constant_for_compile(function: Callable) -> Callable:
    """Marks a function whose result torch.compile takes as a constant, computed once while it traces.

    Private: the attribute that `torch.compiler.assume_constant_result` sets. Calling that instead imports all of dynamo,
    a second of import time. Where torch reads another attribute, torch.compile traces through the function.
    """
    function._dynamo_marked_constant = True
    return function


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """`optimizer.step()`, which changes nothing where `bad`, a scalar on the parameters' device, is true.

    Private: fused optimizers (`_step_supports_amp_scaling`) read the attribute `found_inf` on the device, as they do for
    `torch.amp.GradScaler`, so the host need not wait. With any other optimizer the host reads `bad`, and waits for it.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not bool(bad):
            optimizer.step()
        return
    optimizer.found_inf = bad.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def rank_store() -> torch.distributed.Store | None:
    """The key-value store that the ranks of `torch.distributed`'s default group met in. Private:
    `distributed_c10d._get_default_store`; without it None, and what is told through it is not checked."""
    get = getattr(torch.distributed.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor, *, fast: bool
) -> None:
    """`a b^T + bias` of 8-bit a `[M, K]` and b `[N, K]` with a scale for each row, `[M, 1]` and `[N, 1]`, into out `[M, N]`.
    `fast`: sums with as few bits as the units have.

    Private: `aten._scaled_mm_v2.out`. Without it: `torch.nn.functional.scaled_mm`, whose result is copied to out.
    """
    rows = torch.nn.functional.ScalingType.RowWise
    operator = getattr(torch.ops.aten, "_scaled_mm_v2", None)
    if operator is not None and "out" in operator.overloads():
        recipe = [rows.value]
        scales = ([scale_a], recipe, [], [scale_b.t()], recipe, [])
        operator.out(a, b.t(), *scales, bias, out.dtype, use_fast_accum=fast, out=out)
        return
    options = {"bias": bias, "output_dtype": out.dtype, "use_fast_accum": fast}
    out.copy_(torch.nn.functional.scaled_mm(a, b.t(), scale_a, rows, scale_b.t(), rows, **options))


# ---------------------------------------------------------------------------------------------------------------- CPU


@functools.cache
def has_fused_linear(dtype: torch.dtype) -> bool:
    """Whether `fused_linear` takes `dtype`: PyTorch may be built without oneDNN, and for bf16 oneDNN asks a CPU for AVX-512
    or bf16 instructions. Private: `torch.ops.mkldnn._is_mkldnn_bf16_supported`; without it the answer is no."""
    names = ("_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` by oneDNN on the CPU, the bias added inside the product. Private:
    `torch.ops.mkldnn._linear_pointwise`; ask `has_fused_linear` first, and take `torch.addmm` without it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def flash_attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's attention kernel for CPUs: q, k, v `[B, H, L, W]`, any strides -> out `[B, H, Lq, W]`, natural log of the
    rows' sums of exponentials `[B, H, Lq]` in float32 (float64 for float64).

    Private: `aten._scaled_dot_product_flash_attention_for_cpu`. Without it: the matrix of scores, written out.
    """
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is not None:
        return kernel(q, k, v, scale=scale)
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).mT * scale
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.to(exact)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def flash_attention_cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `flash_attention_cpu` -> dq, dk, dv, each of its tensor's shape.

    Private: `aten._scaled_dot_product_flash_attention_for_cpu_backward`. Without it: the matrix of scores, written out.
    """
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if kernel is not None:
        return kernel(dout, q, k, v, out, lse, 0.0, False, scale=scale)
    p = (q @ k.mT * scale - lse.unsqueeze(-1).to(q.dtype)).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ dout


def softmax_backward_(gradient: Tensor, p: Tensor) -> Tensor:
    """The gradient of a softmax over the last dimension, whose result was `p`, written over `gradient`.

    Private: `aten._softmax_backward_data`. Without it: p (g - sum of p g), with two more passes over the memory.
    """
    kernel = getattr(torch.ops.aten, "_softmax_backward_data", None)
    if kernel is None:
        return gradient.sub_((gradient * p).sum(-1, keepdim=True)).mul_(p)
    return kernel.out(gradient, p, -1, gradient.dtype, grad_input=gradient)  # row by row: in place is safe


def foreach(operation: str, tensors: list[Tensor], *args: Any) -> None:
    """`operation`, a method that works in place, on each tensor in few launches; `args` are numbers, or lists with one
    argument for each tensor.

    Private: `torch._foreach_*`. Without it: one tensor after the other.
    """
    together = getattr(torch, f"_foreach_{operation}", None)
    if together is not None:
        together(tensors, *args)
        return
    for place, tensor in enumerate(tensors):
        getattr(tensor, operation)(*(arg[place] if isinstance(arg, list) else arg for arg in args))


# -------------------------------------------------------------------------------------------------------------- shapes


def fake_tensors() -> contextlib.AbstractContextManager:
    """While it is entered, tensors have shapes and no contents, and real ones are taken as such.

    Private: `torch._subclasses.FakeTensorMode`, what torch.compile traces with. There is nothing to fall back to.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def operator_mode() -> type:
    """The class whose method `__torch_dispatch__` is called in place of every operator while an instance is entered.

    Private: the module of `torch.utils._python_dispatch.TorchDispatchMode`. There is nothing to fall back to.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor was made within `fake_tensors()`. Private: `torch._subclasses.FakeTensor`."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
