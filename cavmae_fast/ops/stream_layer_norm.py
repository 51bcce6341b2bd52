"""Residual add + LayerNorm of packed token streams, each stream with its own weight and bias.

    x' = x + delta                                    [R, D]
    y  = (x' - mean) * rstd * weight[s] + bias[s]     s: the stream of the row; mean, rstd over the row, in fp32

Backward, with g = dy * weight[s] and h = (x' - mean) * rstd:

    dx = ddelta = dx' + rstd * (g - mean(g) - h * mean(g * h))
    dweight[s] = sum over the stream's rows of dy * h,   dbias[s] = sum of dy

Forward reads x, delta and writes x', y in one pass; backward reads dx', dy, x' and writes dx (and ddelta, where its dtype
differs) in one pass, with partial weight gradients summed by a second small kernel in a fixed order: no atomics.

For backward x' is kept or, where x is kept anyway and delta is the narrower one, x and delta; it adds them again. What
takes y need not keep it: `layer_norm_origin` says how it is formed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.origin import Origin
from cavmae_fast.ops.stream_tiles import pick, stream_of_tile, sum_of_streams, three

CPU_ROWS = 1024
"Rows that PyTorch's kernels take at once on a CPU."
CPU_FORMS = {"256 rows": 256, "4096 rows": 4096}
"Other forms on a CPU: the rows taken at once."


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def stream_layer_norm_forward_kernel(
    x, delta, x_new, y,  # [R, D]
    mean, rstd,  # [R] fp32
    w0, w1, w2, b0, b1, b2,  # [D] each
    rows0, rows1, rows2, tiles0, tiles1, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, HAS_DELTA: tl.constexpr,
    STORE_SUM: tl.constexpr,
):  # fmt: skip
    """A program normalizes BLOCK_R rows at once: 4 rows of 768 keep 32 fp32 values per thread in flight with 4 warps."""
    stream, local = stream_of_tile(tl.program_id(0), tiles0, tiles1)
    first = pick(stream, 0, rows0, rows0 + rows1)
    count = pick(stream, rows0, rows1, rows2)
    row = local * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    valid = (row < count)[:, None] & inside[None, :]
    offset = (first + row).to(tl.int64)[:, None] * D + column[None, :]

    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + offset, mask=valid, other=0.0).to(tl.float32)
        # The sum is normalized as it is stored, so that backward sees the same x' as forward did.
        stored = value.to(x.dtype.element_ty)
        if STORE_SUM:
            tl.store(x_new + offset, stored, mask=valid)
        value = stored.to(tl.float32)
    mu = tl.sum(value, axis=1) / D
    centered = tl.where(inside[None, :], value - mu[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)
    tl.store(mean + first + row, mu, mask=row < count)
    tl.store(rstd + first + row, r, mask=row < count)
    w = tl.load(pick(stream, w0, w1, w2) + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pick(stream, b0, b1, b2) + column, mask=inside, other=0.0).to(tl.float32)
    result = centered * r[:, None] * w[None, :] + b[None, :]
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=valid)


@triton.jit
def stream_layer_norm_backward_kernel(
    dy, dx_new, x, delta, dx, ddelta,  # [R, D]
    mean, rstd,  # [R] fp32
    w0, w1, w2,  # [D] each
    dw_partial, db_partial,  # [programs, D] fp32
    rows0, rows1, rows2, tiles0, tiles1,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
    HAS_DX_NEW: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DDELTA: tl.constexpr,
):  # fmt: skip
    """A program sums the weight gradients of ROWS_PER_PROGRAM rows, BLOCK_R at a time, before it writes them. What was
    normalized is x, or x + delta."""
    program = tl.program_id(0)
    stream, local = stream_of_tile(program, tiles0, tiles1)
    first = pick(stream, 0, rows0, rows0 + rows1)
    count = pick(stream, rows0, rows1, rows2)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    w = tl.load(pick(stream, w0, w1, w2) + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = tl.zeros([BLOCK_D], dtype=tl.float32)
    for step in range(0, ROWS_PER_PROGRAM, BLOCK_R):
        row = local * ROWS_PER_PROGRAM + step + tl.arange(0, BLOCK_R)
        valid = (row < count)[:, None] & inside[None, :]
        offset = (first + row).to(tl.int64)[:, None] * D + column[None, :]
        mu = tl.load(mean + first + row, mask=row < count, other=0.0)
        r = tl.load(rstd + first + row, mask=row < count, other=0.0)
        g = tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        if HAS_DELTA:
            value += tl.load(delta + offset, mask=valid, other=0.0).to(tl.float32)
            value = value.to(x.dtype.element_ty).to(tl.float32)
        h = (value - mu[:, None]) * r[:, None]
        h = tl.where(valid, h, 0.0)
        dw += tl.sum(g * h, axis=0)
        db += tl.sum(g, axis=0)
        g *= w[None, :]
        mean_g = tl.sum(g, axis=1) / D
        mean_gh = tl.sum(g * h, axis=1) / D
        result = r[:, None] * (g - mean_g[:, None] - h * mean_gh[:, None])
        if HAS_DX_NEW:
            result += tl.load(dx_new + offset, mask=valid, other=0.0).to(tl.float32)
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=valid)
        if HAS_DDELTA:
            tl.store(ddelta + offset, result.to(ddelta.dtype.element_ty), mask=valid)
    tl.store(dw_partial + program * D + column, dw, mask=inside)
    tl.store(db_partial + program * D + column, db, mask=inside)


# ------------------------------------------------------------------------------------------------------- launchers


def _forward_triton(x, delta, weights, biases, rows, eps, out_dtype, store_sum, architecture):
    width = x.shape[1]
    x_new = torch.empty_like(x) if store_sum else x.new_empty(0)
    y = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    options = launch("stream_layer_norm_forward", architecture, out_dtype)
    tiles = three([triton.cdiv(n, options["BLOCK_R"]) for n in rows])
    stream_layer_norm_forward_kernel[(sum(tiles),)](
        x, delta, x_new, y, mean, rstd, *three(weights), *three(biases), *three(rows), tiles[0], tiles[1], eps,
        D=width, BLOCK_D=triton.next_power_of_2(width), HAS_DELTA=delta is not None, STORE_SUM=store_sum, **options,
    )  # fmt: skip
    return x_new, y, mean, rstd


def _backward_triton(dy, dx_new, x, delta, mean, rstd, weights, rows, delta_dtype, architecture):
    width = x.shape[1]
    dx = torch.empty_like(x)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    options = launch("stream_layer_norm_backward", architecture, dy.dtype)
    programs = three([triton.cdiv(n, options["ROWS_PER_PROGRAM"]) for n in rows])
    sums = torch.empty(2, sum(programs), width, dtype=torch.float32, device=dx.device)
    stream_layer_norm_backward_kernel[(sum(programs),)](
        dy, dx_new, x, delta, dx, ddelta, mean, rstd, *three(weights), sums[0], sums[1], *three(rows),
        programs[0], programs[1], D=width, BLOCK_D=triton.next_power_of_2(width), HAS_DX_NEW=dx_new is not None,
        HAS_DELTA=delta is not None, HAS_DDELTA=delta_dtype is not None, **options,
    )  # fmt: skip
    dw, db = (sum_of_streams(part, programs, len(rows), architecture) for part in sums)
    return dx, ddelta, dw, db


def _parts(x: Tensor, rows: Sequence[int], at_once: int = CPU_ROWS) -> Iterator[tuple[int, slice]]:
    """(stream, slice of its rows). On a CPU in pieces whose float32 copies stay in the cache, which takes two thirds of the
    time that whole streams take."""
    first = 0
    for stream, count in enumerate(rows):
        step = at_once if x.device.type == "cpu" else count
        for start in range(first, first + count, step):
            yield stream, slice(start, min(start + step, first + count))
        first += count


def _sum(x: Tensor, delta: Tensor | None, part: slice, out: Tensor | None = None) -> Tensor:
    """The rows `part` of x + delta in x's dtype, rounded once; written to those of `out`, where it is given."""
    if delta is None:
        return x[part]
    total = torch.empty_like(x[part]) if out is None else out[part]
    return total.copy_(delta[part]).add_(x[part])


def _forward_torch(x, delta, weights, biases, rows, eps, out_dtype, store_sum, at_once=CPU_ROWS):
    x_new = torch.empty_like(x) if store_sum else x.new_empty(0)
    statistics = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=statistics, device=x.device) for _ in range(2))
    for stream, part in _parts(x, rows, at_once):
        value = _sum(x, delta, part, x_new if store_sum else None)
        w, b = weights[stream].to(statistics), biases[stream].to(statistics)
        result, mu, r = torch.native_layer_norm(value.to(statistics), value.shape[1:], w, b, eps)
        y[part].copy_(result), mean[part].copy_(mu.squeeze(1)), rstd[part].copy_(r.squeeze(1))
    return x_new, y, mean, rstd


def _backward_torch(dy, dx_new, x, delta, mean, rstd, weights, rows, delta_dtype, at_once=CPU_ROWS):
    statistics = mean.dtype
    dx = torch.empty_like(x)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    dw, db = (torch.zeros(len(rows), x.shape[1], dtype=statistics, device=dx.device) for _ in range(2))
    for stream, part in _parts(x, rows, at_once):
        # In the statistics' dtype throughout: PyTorch's bf16 weight gradient on the CPU loses a good part of its bits.
        w = weights[stream].to(statistics)
        result, dw_part, db_part = torch.ops.aten.native_layer_norm_backward(
            dy[part].to(statistics), _sum(x, delta, part).to(statistics), x.shape[1:], mean[part].unsqueeze(1),
            rstd[part].unsqueeze(1), w, torch.zeros_like(w), [True, True, True],
        )  # fmt: skip
        if dx_new is not None:
            result.add_(dx_new[part])
        dx[part].copy_(result), dw[stream].add_(dw_part), db[stream].add_(db_part)
        if delta_dtype is not None:
            ddelta[part].copy_(result)
    return dx, ddelta, dw, db


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(x, delta, weights, biases, rows, eps, out_dtype, store_sum):
    statistics = torch.promote_types(x.dtype, torch.float32)
    x_new = torch.empty_like(x) if store_sum else x.new_empty(0)
    mean, rstd = (x.new_empty(x.shape[0], dtype=statistics) for _ in range(2))
    return x_new, torch.empty_like(x, dtype=out_dtype), mean, rstd


def _backward_fake(dy, dx_new, x, delta, mean, rstd, weights, rows, delta_dtype):
    dx = torch.empty_like(x)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    dw, db = (mean.new_empty(len(rows), x.shape[1]) for _ in range(2))
    return dx, ddelta, dw, db


_forward = register(
    "stream_layer_norm",
    "(Tensor x, Tensor? delta, Tensor[] weights, Tensor[] biases, SymInt[] rows, float eps, ScalarType out_dtype,"
    " bool store_sum) -> (Tensor x_new, Tensor y, Tensor mean, Tensor rstd)",
    torch=_forward_torch,
    forms={name: partial(_forward_torch, at_once=rows) for name, rows in CPU_FORMS.items()},
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "stream_layer_norm_backward",
    "(Tensor dy, Tensor? dx_new, Tensor x, Tensor? delta, Tensor mean, Tensor rstd, Tensor[] weights, SymInt[] rows,"
    " ScalarType? delta_dtype) -> (Tensor dx, Tensor ddelta, Tensor dw, Tensor db)",
    torch=_backward_torch,
    forms={name: partial(_backward_torch, at_once=rows) for name, rows in CPU_FORMS.items()},
    triton=_backward_triton,
    fake=_backward_fake,
)


class _StreamLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, rows, eps, out_dtype, keep_sum, *parameters):
        count = len(parameters) // 2
        weights, biases = list(parameters[:count]), list(parameters[count:])
        x_new, y, mean, rstd = _forward(x, delta, weights, biases, rows, eps, out_dtype, delta is not None)
        kept = (x, delta) if delta is None or not keep_sum else (x_new, None)
        ctx.save_for_backward(*kept, mean, rstd, *weights)
        ctx.rows, ctx.delta_dtype = rows, None if delta is None else delta.dtype
        ctx.bias_dtypes = [b.dtype for b in biases]
        ctx.set_materialize_grads(False)
        return y if delta is None else (x_new, y)

    @staticmethod
    def backward(ctx, *grads):
        x, delta, mean, rstd, *weights = ctx.saved_tensors
        dx_new, dy = (None, *grads) if ctx.delta_dtype is None else grads
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        separate = ctx.delta_dtype if ctx.delta_dtype not in (None, x.dtype) else None
        dx, ddelta, dw, db = _backward(
            dy, None if dx_new is None else dx_new.contiguous(), x, delta, mean, rstd, weights, ctx.rows, separate
        )
        if ctx.delta_dtype is None:
            ddelta = None
        elif separate is None:
            ddelta = dx
        dws = [part.to(w.dtype) for part, w in zip(dw.unbind(0), weights)]
        dbs = [part.to(dtype) for part, dtype in zip(db.unbind(0), ctx.bias_dtypes)]
        return dx, ddelta, None, None, None, None, *dws, *dbs


def stream_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: StreamLayout,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    *,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """`x + delta`, and its LayerNorm with each stream's own weight and bias.

    x `[R, D]` (the residual stream), delta `[R, D]` or None (nothing to add), weights and biases: one `[D]` for each
    stream of `layout`. Returns `(x + delta` in x's dtype, its LayerNorm in `out_dtype)` (default: x's dtype). Statistics
    are computed in float32. `keep_sum`: keep x + delta for backward; else x and delta, which takes less memory where x is
    kept anyway. Raises ValueError when a shape does not fit.
    """
    layout.check("x", x)
    width = x.shape[1]
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta has shape {list(delta.shape)}; x has {list(x.shape)}")
    for name, values in (("weights", weights), ("biases", biases)):
        if len(values) != len(layout.lengths) or any(v.shape != (width,) for v in values):
            shapes = [list(v.shape) for v in values]
            raise ValueError(f"{name} have shapes {shapes}; {len(layout.lengths)} streams need one [{width}] each")
        if len({v.dtype for v in values}) > 1:
            raise TypeError(f"{name} have dtypes {[v.dtype for v in values]}; they must have one")
    delta = None if delta is None else delta.contiguous()
    parameters = [p.contiguous() for p in (*weights, *biases)]
    result = _StreamLayerNorm.apply(
        x.contiguous(), delta, layout.rows_per_stream, eps, out_dtype or x.dtype, keep_sum, *parameters
    )
    return (x, result) if delta is None else result


def layer_norm_origin(
    x: Tensor,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: StreamLayout,
    eps: float,
    out_dtype: torch.dtype,
) -> Origin:
    """How the LayerNorm that `stream_layer_norm` returns for these arguments is formed again."""
    form = partial(_form, delta is not None, layout.rows_per_stream, eps, out_dtype)
    return Origin(form, (x, *([] if delta is None else [delta]), *weights, *biases))


def _form(has_delta: bool, rows: list[int], eps: float, out_dtype: torch.dtype, x: Tensor, *tensors: Tensor) -> Tensor:
    delta, parameters = (tensors[0], tensors[1:]) if has_delta else (None, tensors)
    weights, biases = list(parameters[: len(rows)]), list(parameters[len(rows) :])
    return _forward(x, delta, weights, biases, rows, eps, out_dtype, False)[1]
