"""Multi-head self-attention of packed token streams, each sample of each stream on its own.

    out = softmax(q k^T / sqrt(W)) v          W = D / heads, for every (stream, sample, head)
    lse = log2 sum exp of each row of q k^T / sqrt(W)       kept for the backward, in base 2 as the kernels use it

Two forms: `attention` reads one packed qkv `[R, 3 D]`, and its backward writes one dqkv; `query_attention` reads the
queries `[Rq, D]` of one layout, and keys and values `[R, 2 D]` of another. Either is one launch forward, two backward:
dS = P * (dout v^T - rowsum(dout * out)), with P formed again from lse. The kernels are in `attention_kernels.py`, what
the CPU runs in `attention_cpu.py`. Other people's kernels can take their place by name (`backend=`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.ops.attention_cpu import attention_backward_cpu, attention_forward_cpu
from cavmae_fast.ops.attention_kernels import MAX_HEAD_WIDTH, attention_backward_triton, attention_forward_triton
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.registry import interpreting, register, use_triton

BACKENDS = ("torch", "triton", "sdpa", "flash_attn", "xformers")
OPTIONAL_PACKAGES = {"flash_attn": "flash-attn", "xformers": "xformers"}
LOG2E = math.log2(math.e)
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {"triton": (*_HALF, torch.float32), "flash_attn": _HALF, "xformers": (*_HALF, torch.float32)}


# --------------------------------------------------------------------------------------------- PyTorch counterparts


def _stream_views(x: Tensor, parts: int, batch: int, lengths: Sequence[int], heads: int) -> list[tuple[Tensor, ...]]:
    """Packed `[rows, parts * D]` -> for each stream its `parts` views `[batch, length, heads, W]`."""
    streams = zip(x.split([batch * length for length in lengths]), lengths)
    return [s.view(batch, length, parts, heads, x.shape[1] // parts // heads).unbind(2) for s, length in streams]


def _operands(q, kv, batch, q_lengths, lengths, heads) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each stream its q, k, v as views `[batch, length, heads, W]`."""
    if kv is None:
        return _stream_views(q, 3, batch, lengths, heads)
    queries, others = _stream_views(q, 1, batch, q_lengths, heads), _stream_views(kv, 2, batch, lengths, heads)
    return [(*a, *b) for a, b in zip(queries, others)]


def _lse_views(lse: Tensor, batch: int, q_lengths: Sequence[int]) -> list[Tensor]:
    """lse `[heads, Rq]` -> for each stream a view `[batch, heads, length]`."""
    streams = zip(lse.split([batch * length for length in q_lengths], dim=1), q_lengths)
    return [s.unflatten(1, (batch, length)).transpose(0, 1) for s, length in streams]


def _forward_torch(q, kv, batch, q_lengths, lengths, heads):
    lse = q.new_empty(heads, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    outputs = []
    parts = zip(_operands(q, kv, batch, q_lengths, lengths, heads), _lse_views(lse, batch, q_lengths))
    for (qs, ks, vs), lse_s in parts:
        scale = qs.shape[-1] ** -0.5
        if q.device.type == "cpu":
            out_s, sums = attention_forward_cpu(qs, ks, vs, scale)
        else:
            qs, ks, vs = (t.transpose(1, 2).to(lse.dtype) for t in (qs, ks, vs))
            scores = qs @ ks.mT * scale
            sums = scores.logsumexp(-1)
            out_s = ((scores - sums.unsqueeze(-1)).exp() @ vs).transpose(1, 2)
        torch.mul(sums, LOG2E, out=lse_s)
        outputs.append(out_s.reshape(-1, out_s[0, 0].numel()).to(q.dtype))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0], lse


def _backward_torch(dout, q, kv, out, lse, batch, q_lengths, lengths, heads):
    dq = torch.empty_like(q)
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    parts = zip(
        _operands(q, kv, batch, q_lengths, lengths, heads),
        _operands(dq, None if kv is None else dkv, batch, q_lengths, lengths, heads),
        _stream_views(dout, 1, batch, q_lengths, heads),
        _stream_views(out, 1, batch, q_lengths, heads),
        _lse_views(lse, batch, q_lengths),
    )
    for (qs, ks, vs), grads, (dout_s,), (out_s,), lse_s in parts:
        scale, lse_s = qs.shape[-1] ** -0.5, lse_s / LOG2E
        if q.device.type == "cpu":
            attention_backward_cpu(dout_s, qs, ks, vs, out_s, lse_s, scale, *grads)
            continue
        qs, ks, vs, g, o = (t.transpose(1, 2).to(lse.dtype) for t in (qs, ks, vs, dout_s, out_s))
        p = (qs @ ks.mT * scale - lse_s.unsqueeze(-1)).exp()
        ds = p * (g @ vs.mT - (g * o).sum(-1, keepdim=True)) * scale
        for to, grad in zip(grads, (ds @ ks, ds.mT @ qs, p.mT @ g)):
            to.copy_(grad.transpose(1, 2))
    return dq, dkv


# -------------------------------------------------------------------------------------------------- torch operators


def _runs_triton(q, kv, heads, backend) -> bool:
    if backend == "auto":
        width = q.shape[1] // heads // (3 if kv is None else 1)
        return resolve_backend("auto", q.device, q.dtype, width) == "triton"
    return backend == "triton"


def _forward_any(q, kv, batch, q_lengths, lengths, heads, backend):
    run = attention_forward_triton if _runs_triton(q, kv, heads, backend) else _forward_torch
    return run(q, kv, batch, q_lengths, lengths, heads)


def _backward_any(dout, q, kv, out, lse, batch, q_lengths, lengths, heads, backend):
    run = attention_backward_triton if _runs_triton(q, kv, heads, backend) else _backward_torch
    return run(dout, q, kv, out, lse, batch, q_lengths, lengths, heads)


def _forward_fake(q, kv, batch, q_lengths, lengths, heads, backend):
    lse = q.new_empty(heads, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape[0], q.shape[1] // (3 if kv is None else 1)), lse


def _backward_fake(dout, q, kv, out, lse, batch, q_lengths, lengths, heads, backend):
    return torch.empty_like(q), q.new_empty(0) if kv is None else torch.empty_like(kv)


# The argument `backend` is 'triton', 'torch' or 'auto', which asks the registry: so both implementations are the same.
# With kv None, q is the packed qkv. lse [heads, Rq]: base 2, float32 (float64 for float64).
_forward = register(
    "attention",
    "(Tensor q, Tensor? kv, SymInt batch, SymInt[] q_lengths, SymInt[] lengths, int heads, str backend)"
    " -> (Tensor out, Tensor lse)",
    torch=_forward_any, triton=_forward_any, fake=_forward_fake,
)  # fmt: skip
_backward = register(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor? kv, Tensor out, Tensor lse, SymInt batch, SymInt[] q_lengths, SymInt[] lengths,"
    " int heads, str backend) -> (Tensor dq, Tensor dkv)",
    torch=_backward_any, triton=_backward_any, fake=_backward_fake,
)  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, *arguments):
        out, lse = _forward(q, kv, *arguments)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.arguments = arguments
        return out

    @staticmethod
    def backward(ctx, dout):
        q, kv, out, lse = ctx.saved_tensors
        dq, dkv = _backward(dout.contiguous(), q, kv, out, lse, *ctx.arguments)
        return dq, None if kv is None else dkv, *[None] * len(ctx.arguments)


# -------------------------------------------------------------------------------------------------------- back ends


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _state(name: str, device: torch.device) -> str:
    """'available', or why the back end `name` cannot run on `device`."""
    if name in OPTIONAL_PACKAGES and not _installed(name):
        return f"it is not installed: pip install {OPTIONAL_PACKAGES[name]}"
    if name in ("torch", "sdpa") or device.type == "cuda" or (name == "triton" and interpreting()):
        return "available"
    return "it needs a CUDA device" + (" (or TRITON_INTERPRET=1)" if name == "triton" else "")


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Back end -> 'available', or why it cannot run on `device`."""
    return {name: _state(name, torch.device(device)) for name in BACKENDS}


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_width: int = 64) -> str:
    """The back end that `name` stands for: 'auto' gives 'triton' where its kernels are proven, else 'torch' (CPU) or
    'sdpa'. Raises ValueError for an unknown name or a dtype or width that the back end does not take, RuntimeError for
    one that cannot run here."""
    device = torch.device(device)
    if name == "auto":
        if use_triton("attention", device) and dtype in _DTYPES["triton"] and head_width <= MAX_HEAD_WIDTH:
            return "triton"
        return "torch" if device.type == "cpu" else "sdpa"
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


# What `torch.compiler.assume_constant_result` sets: a decorator here would import all of dynamo with this module.
resolve_backend._dynamo_marked_constant = True


def _sdpa(q, kv, batch, q_lengths, lengths, heads):
    outputs = []
    for parts in _operands(q, kv, batch, q_lengths, lengths, heads):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in parts))
        outputs.append(out.transpose(1, 2).reshape(-1, heads * out.shape[-1]))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@functools.lru_cache(maxsize=64)
def _boundaries(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Row at which each sample begins, and the end: int32 `[samples + 1]`, flash-attn's `cu_seqlens`."""
    counts = torch.tensor([0, *(length for length in lengths for _ in range(batch))])
    return counts.cumsum(0).to(device, torch.int32)


def _flash_attn(q, kv, batch, q_lengths, lengths, heads):
    import flash_attn

    keys, most = _boundaries(batch, tuple(lengths), q.device), max(lengths)
    if kv is None:
        packed = q.view(q.shape[0], 3, heads, -1)
        return flash_attn.flash_attn_varlen_qkvpacked_func(packed, keys, most).flatten(1)
    queries = _boundaries(batch, tuple(q_lengths), q.device)
    q, kv = q.view(q.shape[0], heads, -1), kv.view(kv.shape[0], 2, heads, -1)
    return flash_attn.flash_attn_varlen_kvpacked_func(q, kv, queries, keys, max(q_lengths), most).flatten(1)


@functools.lru_cache(maxsize=64)
def _block_mask(batch: int, q_lengths: tuple[int, ...], lengths: tuple[int, ...], device: torch.device):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    counts = [[length for length in each for _ in range(batch)] for each in (q_lengths, lengths)]
    return BlockDiagonalMask.from_seqlens(*counts, device=device)


def _xformers(q, kv, batch, q_lengths, lengths, heads):
    from xformers.ops import memory_efficient_attention

    mask = _block_mask(batch, tuple(q_lengths), tuple(lengths), q.device)
    parts = q.chunk(3, dim=1) if kv is None else (q, *kv.chunk(2, dim=1))
    out = memory_efficient_attention(*(t.unflatten(1, (heads, -1)).unsqueeze(0) for t in parts), attn_bias=mask)
    return out.squeeze(0).flatten(1)


# ------------------------------------------------------------------------------------------------- public functions


def _attend(q, kv, query_layout, layout, heads, width, backend):
    name = resolve_backend(backend, q.device, q.dtype, width)
    q, kv = q.contiguous(), None if kv is None else kv.contiguous()
    arguments = (layout.batch, list(query_layout.lengths), list(layout.lengths), heads)
    if name in ("torch", "triton"):
        return _Attention.apply(q, kv, *arguments, backend)
    return {"sdpa": _sdpa, "flash_attn": _flash_attn, "xformers": _xformers}[name](q, kv, *arguments)


def _check_heads(name: str, x: Tensor, parts: int, num_heads: int) -> None:
    if num_heads < 1 or x.shape[1] % (parts * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}; it must be at least 1, and the width {x.shape[1]} of {name} a multiple of"
            f" {parts} * num_heads"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point tensor")


def attention(qkv: Tensor, layout: StreamLayout, num_heads: int, *, backend: str = "auto") -> Tensor:
    """Self-attention of every sample of every stream.

    qkv `[R, 3 D]` packed by `layout` (queries, keys, values, each of `num_heads` heads of width D / num_heads)
    -> `[R, D]` in qkv's dtype. `backend`: 'auto' or one of `BACKENDS`; see `resolve_backend`. Raises ValueError when a
    shape or dtype does not fit, TypeError for integers, RuntimeError when a named back end cannot run.
    """
    layout.check("qkv", qkv)
    _check_heads("qkv", qkv, 3, num_heads)
    return _attend(qkv, None, layout, layout, num_heads, qkv.shape[1] // 3 // num_heads, backend)


def query_attention(
    q: Tensor, kv: Tensor, query_layout: StreamLayout, layout: StreamLayout, num_heads: int, *, backend: str = "auto"
) -> Tensor:
    """Attention of some tokens' queries to all tokens of their sample.

    q `[Rq, D]` packed by `query_layout`, kv `[R, 2 D]` (keys, then values) packed by `layout`, which has the same batch
    and number of streams -> `[Rq, D]` in q's dtype. `backend` and errors as in `attention`.
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
    return _attend(q, kv, query_layout, layout, num_heads, q.shape[1] // num_heads, backend)
