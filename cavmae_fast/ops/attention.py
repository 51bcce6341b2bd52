"""Multi-head self-attention of packed token streams, each sample of each stream on its own.

    out = softmax(q k^T / sqrt(W)) v          W = D / heads, for every (stream, sample, head)
    lse = log2 sum exp of each row of q k^T / sqrt(W)       kept for the backward, in base 2 as the kernels use it

Two forms: `attention` reads one packed qkv `[R, 3 D]`, and its backward writes one dqkv; `query_attention` reads the
queries `[Rq, D]` of one layout, and keys and values `[R, 2 D]` of another. Either is one launch forward, and one or two
backward: dS = P * (dout v^T - rowsum(dout * out)), with P formed again from lse. The kernels are in `attention_forward.py`,
`attention_backward.py` and `attention_one_pass.py`, a backward pass in CUDA in `attention_library.py` (form 'cuda', whose
forward pass is Triton's), their PyTorch counterpart in `attention_torch.py` and, for CPUs, `attention_cpu.py`. Other
people's kernels (`attention_backends.py`) can take their place by name (`backend=`).

The gradient of the bias of the layer that made q, k and v is the column sums of their gradients: it can be formed where
these are (`owed`), in the kernel or in a pass behind it, as the launch says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cavmae_fast import compat
from cavmae_fast.ops import attention_backends
from cavmae_fast.ops.attention_backward import attention_backward_triton
from cavmae_fast.ops.attention_forward import attention_forward_triton
from cavmae_fast.ops.attention_library import attention_backward_library, attention_limit
from cavmae_fast.ops.attention_tiles import MAX_HEAD_WIDTH, launch_key
from cavmae_fast.ops.attention_torch import attention_backward_torch, attention_forward_torch
from cavmae_fast.ops.dispatch import choose, interpreting, register
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.stream_linear import with_bias_gradients

BACKENDS = ("torch", "triton", *attention_backends.BACKENDS)
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {
    "triton": (*_HALF, torch.float32),
    "sdpa_flash": _HALF,
    "sdpa_cudnn": _HALF,
    "sdpa_efficient": (*_HALF, torch.float32),
    "flash_attn": _HALF,
    "xformers": (*_HALF, torch.float32),
}
CPU_FORMS: dict[str, dict[str, int]] = {
    "flash": {"products": False},
    "products": {"products": True},
    "products in 2 MiB": {"products": True, "group_bytes": 2 << 20},
}
"Forms of PyTorch's implementation on a CPU: both passes by its flash kernel, or both by batched products."


# -------------------------------------------------------------------------------------------------- torch operators


def _limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """What the kernels do not take, or a package that is no longer there; `shape` is (head width,), or (head width,
    longest stream)."""
    if implementation in attention_backends.PACKAGES and not attention_backends.installed(implementation):
        return f"{attention_backends.PACKAGES[implementation]} is not installed"
    if implementation == "flash" and dtype.itemsize > 2:
        return "PyTorch's implementation is that already"
    if implementation == "cuda":
        return attention_limit(dtype, shape)
    if implementation != "triton":
        return None
    if dtype not in _DTYPES["triton"]:
        return f"the kernels take no {dtype}"
    return f"the kernels take heads of width {MAX_HEAD_WIDTH} at most, not {shape[0]}" if shape[0] > MAX_HEAD_WIDTH else None


def _forward_fake(q, kv, batch, q_lengths, lengths, heads, implementation):
    lse = q.new_empty(heads, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape[0], q.shape[1] // (3 if kv is None else 1)), lse


def _backward_fake(dout, q, kv, out, lse, batch, q_lengths, lengths, heads, owed, owed_dtype, implementation):
    dbias = q.new_empty((owed, 3 * out.shape[1]) if owed else 0, dtype=owed_dtype)
    return torch.empty_like(q), q.new_empty(0) if kv is None else torch.empty_like(kv), dbias


def _forward_for_library(*arguments):
    """The library has a backward pass alone: the kernel before it is Triton's."""
    return _forward(*arguments, "triton")


# `implementation`, 'triton', 'cuda', 'torch' or one of `CPU_FORMS`, is what `_attend` chose, once for forward and backward.
# With kv None, q is the packed qkv. lse [heads, Rq] is in base 2, float32 (float64 for float64).
_forward = register(
    "attention",
    "(Tensor q, Tensor? kv, SymInt batch, SymInt[] q_lengths, SymInt[] lengths, int heads, str implementation)"
    " -> (Tensor out, Tensor lse)",
    torch=attention_forward_torch,
    triton=attention_forward_triton,
    cuda=_forward_for_library,
    forms={name: partial(attention_forward_torch, **options) for name, options in CPU_FORMS.items()},
    elsewhere=tuple(attention_backends.BACKENDS),
    fake=_forward_fake,
    limit=_limit,
    caller_chooses=True,
)
_backward = register(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor? kv, Tensor out, Tensor lse, SymInt batch, SymInt[] q_lengths, SymInt[] lengths,"
    " int heads, int owed, ScalarType? owed_dtype, str implementation) -> (Tensor dq, Tensor dkv, Tensor dbias)",
    torch=attention_backward_torch,
    triton=attention_backward_triton,
    cuda=attention_backward_library,
    forms={name: partial(attention_backward_torch, **options) for name, options in CPU_FORMS.items()},
    fake=_backward_fake,
    caller_chooses=True,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, arguments, implementation, *owed):
        out, lse = _forward(q, kv, *arguments, implementation)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.arguments, ctx.implementation = arguments, implementation
        ctx.owed_dtypes = [bias.dtype for bias in owed]
        return out

    @staticmethod
    def backward(ctx, dout):
        q, kv, out, lse = ctx.saved_tensors
        count = len(ctx.owed_dtypes)
        wanted = any(ctx.needs_input_grad[4:])
        owing = (count, ctx.owed_dtypes[0]) if wanted else (0, None)
        dq, dkv, dbias = _backward(dout.contiguous(), q, kv, out, lse, *ctx.arguments, *owing, ctx.implementation)
        dbiases = dbias.unbind(0) if wanted else [None] * count
        return dq, None if kv is None else dkv, None, None, *dbiases


# -------------------------------------------------------------------------------------------------------- back ends


def _state(name: str, device: torch.device) -> str:
    """'available', or why the back end `name` cannot run on `device`."""
    package = attention_backends.PACKAGES.get(name)
    if package and not attention_backends.installed(name):
        return f"it is not installed: pip install {package}"
    if name == "kept":
        return "available" if device.type == "cpu" else "it is for CPUs: it keeps all probabilities"
    if name in ("torch", "sdpa", *CPU_FORMS) or device.type == "cuda" or (name == "triton" and interpreting()):
        return "available"
    return "it needs a CUDA device" + (" (or TRITON_INTERPRET=1)" if name == "triton" else "")


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Back end -> 'available', or why it cannot run on `device`."""
    return {name: _state(name, torch.device(device)) for name in BACKENDS}


@compat.constant_for_compile
def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_width: int = 64, longest: int | None = None
) -> str:
    """The back end that `name` stands for: 'auto' gives what was found right and fastest for streams of up to `longest`
    tokens (None: whatever their length), else 'torch' (CPU) or 'sdpa'. Raises ValueError for an unknown name or a dtype
    or width that the back end does not take, RuntimeError for one that cannot run here."""
    device = torch.device(device)
    if name == "auto":
        key = "" if longest is None else launch_key((longest,), head_width)
        shape = (head_width,) if longest is None else (head_width, longest)
        chosen = choose("attention", device, dtype, shape, key).implementation
        return "sdpa" if chosen == "torch" and device.type != "cpu" else chosen
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of auto, {', '.join(BACKENDS)}")
    state = _state(name, device)
    if state != "available":
        raise RuntimeError(f"backend {name!r} cannot run on {device}: {state}")
    if dtype not in _DTYPES.get(name, (dtype,)):
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[name])
        raise ValueError(f"backend {name!r} got {str(dtype).removeprefix('torch.')}; it takes {allowed}")
    if name == "triton" and head_width > MAX_HEAD_WIDTH:
        raise ValueError(f"backend 'triton' got heads of width {head_width}; it takes at most {MAX_HEAD_WIDTH}")
    return name


# ------------------------------------------------------------------------------------------------- public functions


def _attend(q, kv, query_layout, layout, heads, width, backend, owed):
    d = heads * width
    if owed and (len(owed) not in (1, len(layout.lengths)) or any(b.shape != (3 * d,) for b in owed)):
        shapes = [list(b.shape) for b in owed]
        raise ValueError(f"owed has shapes {shapes}; it takes [{3 * d}], once or for each of {len(layout.lengths)} streams")
    name = resolve_backend(backend, q.device, q.dtype, width, max(*query_layout.lengths, *layout.lengths))
    q, kv = q.contiguous(), None if kv is None else kv.contiguous()
    arguments = (layout.batch, list(query_layout.lengths), list(layout.lengths), heads)
    if name in ("torch", "triton", "cuda", *CPU_FORMS):
        return _Attention.apply(q, kv, arguments, name, *owed)
    if owed:
        q = with_bias_gradients(q, [b[: q.shape[1]] for b in owed], query_layout)
        kv = None if kv is None else with_bias_gradients(kv, [b[d:] for b in owed], layout)
    return attention_backends.BACKENDS[name](q, kv, *arguments)


def _check_heads(name: str, x: Tensor, parts: int, num_heads: int) -> None:
    if num_heads < 1 or x.shape[1] % (parts * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}; it must be at least 1, and the width {x.shape[1]} of {name} a multiple of"
            f" {parts} * num_heads"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point tensor")


def attention(
    qkv: Tensor, layout: StreamLayout, num_heads: int, *, backend: str = "auto", owed: Sequence[Tensor] = ()
) -> Tensor:
    """Self-attention of every sample of every stream.

    qkv `[R, 3 D]` packed by `layout` (queries, keys, values, each of `num_heads` heads of width D / num_heads)
    -> `[R, D]` in qkv's dtype. `backend`: 'auto' or one of `BACKENDS`; see `resolve_backend`.

    `owed`: biases `[3 D]` that were added where qkv was made, one for all rows or one for each stream, and whose gradients
    are owed: they are column sums of qkv's gradient, and are given here, where that one is formed, if qkv was made with the
    biases' values alone (`bias.detach()`) and is used nowhere else.

    Raises ValueError when a shape or dtype does not fit, TypeError for integers, RuntimeError when a named back end cannot
    run.
    """
    layout.check("qkv", qkv)
    _check_heads("qkv", qkv, 3, num_heads)
    return _attend(qkv, None, layout, layout, num_heads, qkv.shape[1] // 3 // num_heads, backend, owed)


def query_attention(
    q: Tensor,
    kv: Tensor,
    query_layout: StreamLayout,
    layout: StreamLayout,
    num_heads: int,
    *,
    backend: str = "auto",
    owed: Sequence[Tensor] = (),
) -> Tensor:
    """Attention of some tokens' queries to all tokens of their sample.

    q `[Rq, D]` packed by `query_layout`, kv `[R, 2 D]` (keys, then values) packed by `layout`, which has the same batch
    and number of streams -> `[Rq, D]` in q's dtype. `backend`, `owed` (biases `[3 D]` of queries, keys and values, in that
    order) and errors as in `attention`.
    """
    query_layout.check("q", q)
    layout.check("kv", kv)
    if query_layout.batch != layout.batch or len(query_layout.lengths) != len(layout.lengths):
        raise ValueError(f"query_layout is {query_layout}; layout {layout} needs its batch and number of streams")
    _check_heads("q", q, 1, num_heads)
    if kv.shape[1] != 2 * q.shape[1] or kv.dtype != q.dtype or kv.device != q.device:
        raise ValueError(
            f"kv has shape {list(kv.shape)}, {kv.dtype}, {kv.device}; q {list(q.shape)}, {q.dtype}, {q.device}"
            f" needs [{layout.rows}, {2 * q.shape[1]}] of its dtype and device"
        )
    return _attend(q, kv, query_layout, layout, num_heads, q.shape[1] // num_heads, backend, owed)
