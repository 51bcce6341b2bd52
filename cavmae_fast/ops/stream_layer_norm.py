"""Residual add + LayerNorm of packed token streams, each stream with its own weight and bias.

    x' = x + delta                                    [R, D]
    y  = (x' - mean) * rstd * weight[s] + bias[s]     s: the stream of the row; mean, rstd over the row, in fp32

Backward, with g = dy * weight[s] and h = (x' - mean) * rstd:

    dx = ddelta = dx' + rstd * (g - mean(g) - h * mean(g * h))
    dweight[s] = sum over the stream's rows of dy * h,   dbias[s] = sum of dy

Forward reads x, delta and writes x', y in one pass; backward reads dx', dy, x' and writes dx (and ddelta, where its dtype
differs) in one pass, with partial weight gradients summed by a second small kernel in a fixed order: no atomics.

The gradient of a bias that was added to delta is the column sum of ddelta: it can be formed in the same pass, instead of
in one of its own (`owed`; the launch option UPDATE_SUMS says which).

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
from cavmae_fast.ops.residual import Residual, new_carrier
from cavmae_fast.ops.stream_linear import bias_gradient
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
    sums,  # [programs, 2 or 3, D] fp32
    rows0, rows1, rows2, tiles0, tiles1,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
    HAS_DX_NEW: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DDELTA: tl.constexpr, UPDATE_SUMS: tl.constexpr,
):  # fmt: skip
    """A program sums the gradients of weight and bias over ROWS_PER_PROGRAM rows, BLOCK_R at a time, before it writes them;
    with UPDATE_SUMS that of delta, too. What was normalized is x, or x + delta."""
    program = tl.program_id(0)
    stream, local = stream_of_tile(program, tiles0, tiles1)
    first = pick(stream, 0, rows0, rows0 + rows1)
    count = pick(stream, rows0, rows1, rows2)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    w = tl.load(pick(stream, w0, w1, w2) + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = tl.zeros([BLOCK_D], dtype=tl.float32)
    update = tl.zeros([BLOCK_D], dtype=tl.float32)
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
        if UPDATE_SUMS:
            update += tl.sum(result, axis=0)
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=valid)
        if HAS_DDELTA:
            tl.store(ddelta + offset, result.to(ddelta.dtype.element_ty), mask=valid)
    own = sums + program.to(tl.int64) * (3 if UPDATE_SUMS else 2) * D + column
    tl.store(own, dw, mask=inside)
    tl.store(own + D, db, mask=inside)
    if UPDATE_SUMS:
        tl.store(own + 2 * D, update, mask=inside)


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


def _backward_triton(
    dy, dx_new, x, delta, mean, rstd, weights, rows, dx_dtype, delta_dtype, updates, update_dtype, architecture
):  # fmt: skip
    width = x.shape[1]
    dx = torch.empty_like(x, dtype=dx_dtype)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    options = dict(launch("stream_layer_norm_backward", architecture, dy.dtype))
    apart = not options.pop("UPDATE_SUMS")
    kinds = 2 if apart or not updates else 3
    programs = three([triton.cdiv(n, options["ROWS_PER_PROGRAM"]) for n in rows])
    sums = torch.empty(sum(programs), kinds, width, dtype=torch.float32, device=dx.device)
    stream_layer_norm_backward_kernel[(sum(programs),)](
        dy, dx_new, x, delta, dx, ddelta, mean, rstd, *three(weights), sums, *three(rows),
        programs[0], programs[1], D=width, BLOCK_D=triton.next_power_of_2(width), HAS_DX_NEW=dx_new is not None,
        HAS_DELTA=delta is not None, HAS_DDELTA=delta_dtype is not None, UPDATE_SUMS=kinds == 3, **options,
    )  # fmt: skip
    totals = sum_of_streams(sums, programs, len(rows), architecture)
    if kinds == 3:
        dupdate = torch.empty(updates, width, dtype=update_dtype, device=dx.device)
        dupdate.copy_(totals[2] if updates == len(rows) else totals[2].sum(0, keepdim=True))
    else:
        dupdate = _update_sums(dx if delta_dtype is None else ddelta, rows, updates, update_dtype)
    return dx, ddelta, totals[:2], dupdate


def _update_sums(ddelta: Tensor, rows: Sequence[int], updates: int, dtype: torch.dtype | None) -> Tensor:
    """The column sums of ddelta, `[updates, D]`: of each stream's rows, or of all rows; empty for 0."""
    if not updates:
        return ddelta.new_empty(0)
    return bias_gradient(ddelta, rows if updates == len(rows) else [sum(rows)], dtype)


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


def _backward_torch(
    dy, dx_new, x, delta, mean, rstd, weights, rows, dx_dtype, delta_dtype, updates, update_dtype, at_once=CPU_ROWS
):  # fmt: skip
    statistics = mean.dtype
    dx = torch.empty_like(x, dtype=dx_dtype)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    sums = torch.zeros(2, len(rows), x.shape[1], dtype=statistics, device=dx.device)
    for stream, part in _parts(x, rows, at_once):
        # In the statistics' dtype throughout: PyTorch's bf16 weight gradient on the CPU loses a good part of its bits.
        w = weights[stream].to(statistics)
        result, dw_part, db_part = torch.ops.aten.native_layer_norm_backward(
            dy[part].to(statistics), _sum(x, delta, part).to(statistics), x.shape[1:], mean[part].unsqueeze(1),
            rstd[part].unsqueeze(1), w, torch.zeros_like(w), [True, True, True],
        )  # fmt: skip
        if dx_new is not None:
            result.add_(dx_new[part])
        dx[part].copy_(result), sums[0, stream].add_(dw_part), sums[1, stream].add_(db_part)
        if delta_dtype is not None:
            ddelta[part].copy_(result)
    return dx, ddelta, sums, _update_sums(dx if delta_dtype is None else ddelta, rows, updates, update_dtype)


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(x, delta, weights, biases, rows, eps, out_dtype, store_sum):
    statistics = torch.promote_types(x.dtype, torch.float32)
    x_new = torch.empty_like(x) if store_sum else x.new_empty(0)
    mean, rstd = (x.new_empty(x.shape[0], dtype=statistics) for _ in range(2))
    return x_new, torch.empty_like(x, dtype=out_dtype), mean, rstd


def _backward_fake(dy, dx_new, x, delta, mean, rstd, weights, rows, dx_dtype, delta_dtype, updates, update_dtype):
    dx = torch.empty_like(x, dtype=dx_dtype)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    dupdate = (dx if delta_dtype is None else ddelta).new_empty((updates, x.shape[1]) if updates else 0, dtype=update_dtype)
    return dx, ddelta, mean.new_empty(2, len(rows), x.shape[1]), dupdate


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
    " ScalarType dx_dtype, ScalarType? delta_dtype, int updates, ScalarType? update_dtype)"
    " -> (Tensor dx, Tensor ddelta, Tensor sums, Tensor dupdate)",
    torch=_backward_torch,
    forms={name: partial(_backward_torch, at_once=rows) for name, rows in CPU_FORMS.items()},
    triton=_backward_triton,
    fake=_backward_fake,
)


class _StreamLayerNorm(torch.autograd.Function):
    """Where the residual stream has a carrier, gradients go by way of it, and x itself has none."""

    @staticmethod
    def forward(ctx, x, carrier, delta, rows, eps, out_dtype, keep_sum, *parameters):
        count = len(rows)
        weights, biases, updates = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        x_new, y, mean, rstd = _forward(x, delta, list(weights), list(biases), rows, eps, out_dtype, delta is not None)
        kept = (x, delta) if delta is None or not keep_sum else (x_new, None)
        ctx.save_for_backward(*kept, mean, rstd, *weights)
        ctx.rows, ctx.delta_dtype = rows, None if delta is None else delta.dtype
        ctx.carried, ctx.dx_dtype = carrier is not None, x.dtype if carrier is None else carrier.dtype
        ctx.bias_dtypes, ctx.update_dtypes = [b.dtype for b in biases], [b.dtype for b in updates]
        ctx.set_materialize_grads(False)
        # x is handed on even where nothing is added to it: its other gradient then arrives here, and is added on the way.
        if carrier is None:
            return x.view_as(x) if delta is None else x_new, y
        x_new = x.detach() if delta is None else x_new
        ctx.mark_non_differentiable(x_new)
        return x_new, y, new_carrier(x, carrier.dtype)

    @staticmethod
    def backward(ctx, dx_new, dy, dcarrier=None):
        x, delta, mean, rstd, *weights = ctx.saved_tensors
        dx_new = dcarrier if ctx.carried else dx_new
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        separate = ctx.delta_dtype if ctx.delta_dtype not in (None, ctx.dx_dtype) else None
        dx_new = None if dx_new is None else dx_new.contiguous()
        kinds = (ctx.dx_dtype, separate, len(ctx.update_dtypes), ctx.update_dtypes[0] if ctx.update_dtypes else None)
        dx, ddelta, sums, dupdate = _backward(dy, dx_new, x, delta, mean, rstd, weights, ctx.rows, *kinds)
        if ctx.delta_dtype is None:
            ddelta = None
        elif separate is None:
            ddelta = dx
        dws = [part.to(w.dtype) for part, w in zip(sums[0], weights)]
        dbs = [part.to(dtype) for part, dtype in zip(sums[1], ctx.bias_dtypes)]
        dupdates = dupdate.unbind(0) if ctx.update_dtypes else ()
        dxs = (None, dx) if ctx.carried else (dx, None)
        return *dxs, ddelta, None, None, None, None, *dws, *dbs, *dupdates


def stream_layer_norm(
    x: Tensor | Residual,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: StreamLayout,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    *,
    keep_sum: bool = True,
    owed: Sequence[Tensor] = (),
) -> tuple[Tensor | Residual, Tensor]:
    """`x + delta`, and its LayerNorm with each stream's own weight and bias.

    x `[R, D]` (the residual stream), delta `[R, D]` or None (nothing to add), weights and biases: one `[D]` for each
    stream of `layout`. Returns `(x + delta` in x's dtype, its LayerNorm in `out_dtype)` (default: x's dtype). Statistics
    are computed in float32. `keep_sum`: keep x + delta for backward; else x and delta, which takes less memory where x is
    kept anyway.

    `owed`: biases `[D]` that were added where delta was made, one for all rows or one for each stream, and whose gradients
    are owed: they are column sums of delta's gradient, and are given here, where that one is formed, if delta was made with
    the biases' values alone (`bias.detach()`) and is used nowhere else.

    A `Residual` for x is a stream whose gradient is narrower, and gives one. Raises ValueError when a shape does not fit.
    """
    x, carrier = x if isinstance(x, Residual) else (x, None)
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
    if owed and (delta is None or len(owed) not in (1, len(layout.lengths)) or any(b.shape != (width,) for b in owed)):
        shapes = [list(b.shape) for b in owed]
        raise ValueError(f"owed has shapes {shapes}; it takes [{width}], once or for each stream, and only with a delta")
    delta = None if delta is None else delta.contiguous()
    parameters = [p.contiguous() for p in (*weights, *biases)]
    arguments = (delta, layout.rows_per_stream, eps, out_dtype or x.dtype, keep_sum, *parameters, *owed)
    x, y, *carriers = _StreamLayerNorm.apply(x.contiguous(), carrier, *arguments)
    return Residual(x, *carriers) if carriers else x, y


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
