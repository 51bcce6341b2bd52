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

from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.fp8 import GRADIENTS, VALUES, Handed, Quantized, empty_quantized, fp8_limit, quantize_rows
from cavmae_fast.ops.layer_norm_kernels import backward_triton, forward_triton, update_sums
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.origin import Origin
from cavmae_fast.ops.residual import Residual, new_carrier

CPU_ROWS = 1024
"Rows that PyTorch's kernels take at once on a CPU."
CPU_FORMS = {"256 rows": 256, "4096 rows": 4096}
"Other forms on a CPU: the rows taken at once."


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
    return dx, ddelta, sums, update_sums(dx if delta_dtype is None else ddelta, rows, updates, update_dtype)


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
    triton=forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "stream_layer_norm_backward",
    "(Tensor dy, Tensor? dx_new, Tensor x, Tensor? delta, Tensor mean, Tensor rstd, Tensor[] weights, SymInt[] rows,"
    " ScalarType dx_dtype, ScalarType? delta_dtype, int updates, ScalarType? update_dtype)"
    " -> (Tensor dx, Tensor ddelta, Tensor sums, Tensor dupdate)",
    torch=_backward_torch,
    forms={name: partial(_backward_torch, at_once=rows) for name, rows in CPU_FORMS.items()},
    triton=backward_triton,
    fake=_backward_fake,
)


def _quantized_torch(x, delta, weights, biases, rows, eps, out_dtype, store_sum, store_y):
    x_new, y, mean, rstd = _forward(x, delta, weights, biases, rows, eps, out_dtype, store_sum)
    quantized = quantize_rows(y, VALUES)
    return x_new, y if store_y else x.new_empty(0, dtype=out_dtype), mean, rstd, *quantized


def _quantized_triton(x, delta, weights, biases, rows, eps, out_dtype, store_sum, store_y, architecture):
    quantized = empty_quantized(x, VALUES)
    arguments = (x, delta, weights, biases, rows, eps, out_dtype, store_sum, architecture)
    return *forward_triton(*arguments, quantized, store_y), *quantized


def _quantized_fake(x, delta, weights, biases, rows, eps, out_dtype, store_sum, store_y):
    x_new, y, mean, rstd = _forward_fake(x, delta, weights, biases, rows, eps, out_dtype, store_sum)
    return x_new, y if store_y else x.new_empty(0, dtype=out_dtype), mean, rstd, *empty_quantized(x, VALUES)


_forward_quantized = register(
    "fp8_layer_norm",
    "(Tensor x, Tensor? delta, Tensor[] weights, Tensor[] biases, SymInt[] rows, float eps, ScalarType out_dtype,"
    " bool store_sum, bool store_y) -> (Tensor x_new, Tensor y, Tensor mean, Tensor rstd, Tensor q, Tensor scale)",
    torch=_quantized_torch,
    triton=_quantized_triton,
    dtype=lambda x, delta, weights, biases, rows, eps, out_dtype, *_: out_dtype,
    limit=fp8_limit,
    fake=_quantized_fake,
)
"""`stream_layer_norm`, and what fp8 holds of y; without `store_y` in its place. 'torch' makes two passes."""


def _quantized_backward_torch(*arguments):
    dx, ddelta, sums, dupdate = _backward(*arguments)
    return dx, ddelta, sums, dupdate, *quantize_rows(ddelta if ddelta.numel() else dx, GRADIENTS)


def _quantized_backward_triton(dy, *arguments, architecture):
    quantized = empty_quantized(dy, GRADIENTS)
    return *backward_triton(dy, *arguments, architecture, quantized), *quantized


_backward_quantized = register(
    "fp8_layer_norm_backward",
    "(Tensor dy, Tensor? dx_new, Tensor x, Tensor? delta, Tensor mean, Tensor rstd, Tensor[] weights, SymInt[] rows,"
    " ScalarType dx_dtype, ScalarType? delta_dtype, int updates, ScalarType? update_dtype)"
    " -> (Tensor dx, Tensor ddelta, Tensor sums, Tensor dupdate, Tensor q, Tensor scale)",
    torch=_quantized_backward_torch,
    triton=_quantized_backward_triton,
    dtype=lambda dy, *_: dy.dtype,
    limit=fp8_limit,
    fake=lambda dy, *arguments: (*_backward_fake(dy, *arguments), *empty_quantized(dy, GRADIENTS)),
)
"""`stream_layer_norm_backward`, and what fp8 holds of delta's gradient, `ddelta` or `dx` where that is empty."""


class _StreamLayerNorm(torch.autograd.Function):
    """Where the residual stream has a carrier, gradients go by way of it, and x itself has none."""

    @staticmethod
    def forward(ctx, x, carrier, delta, rows, eps, out_dtype, keep_sum, fp8, store_y, handed, *parameters):
        count = len(rows)
        weights, biases, updates = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        arguments = (x, delta, list(weights), list(biases), rows, eps, out_dtype, delta is not None)
        x_new, y, mean, rstd, *quantized = _forward_quantized(*arguments, store_y) if fp8 else _forward(*arguments)
        y = y if store_y else new_carrier(x, out_dtype)
        kept = (x, delta) if delta is None or not keep_sum else (x_new, None)
        ctx.save_for_backward(*kept, mean, rstd, *weights)
        ctx.rows, ctx.delta_dtype, ctx.handed = rows, None if delta is None else delta.dtype, handed
        ctx.carried, ctx.dx_dtype = carrier is not None, x.dtype if carrier is None else carrier.dtype
        ctx.bias_dtypes, ctx.update_dtypes = [b.dtype for b in biases], [b.dtype for b in updates]
        ctx.set_materialize_grads(False)
        # x is handed on even where nothing is added to it: its other gradient then arrives here, and is added on the way.
        if carrier is None:
            ctx.mark_non_differentiable(*quantized)
            return x.view_as(x) if delta is None else x_new, y, *quantized
        x_new = x.detach() if delta is None else x_new
        ctx.mark_non_differentiable(x_new, *quantized)
        return x_new, y, *quantized, new_carrier(x, carrier.dtype)

    @staticmethod
    def backward(ctx, dx_new, dy, *others):
        x, delta, mean, rstd, *weights = ctx.saved_tensors
        dx_new = others[-1] if ctx.carried else dx_new
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        separate = ctx.delta_dtype if ctx.delta_dtype not in (None, ctx.dx_dtype) else None
        dx_new = None if dx_new is None else dx_new.contiguous()
        kinds = (ctx.dx_dtype, separate, len(ctx.update_dtypes), ctx.update_dtypes[0] if ctx.update_dtypes else None)
        backward = _backward if ctx.handed is None else _backward_quantized
        dx, ddelta, sums, dupdate, *held = backward(dy, dx_new, x, delta, mean, rstd, weights, ctx.rows, *kinds)
        if ctx.delta_dtype is None:
            ddelta = None
        elif separate is None:
            ddelta = dx
        if ctx.handed is not None:
            ctx.handed.put(ddelta, Quantized(*held))
        dws = [part.to(w.dtype) for part, w in zip(sums[0], weights)]
        dbs = [part.to(dtype) for part, dtype in zip(sums[1], ctx.bias_dtypes)]
        dupdates = dupdate.unbind(0) if ctx.update_dtypes else ()
        dxs = (None, dx) if ctx.carried else (dx, None)
        return *dxs, ddelta, *[None] * 7, *dws, *dbs, *dupdates


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
    x, y, _ = _apply(x, delta, weights, biases, layout, eps, out_dtype, keep_sum, owed)
    return x, y


def quantized_layer_norm(
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
    values: bool = True,
    handed: Handed | None = None,
) -> tuple[Tensor | Residual, Tensor, Quantized]:
    """As `stream_layer_norm`, and what fp8 holds of the LayerNorm (`ops/fp8.py`), for the product that takes it.

    `values`: the LayerNorm itself is written, too, for what else reads it; else it is a tensor without values (of the memory
    of one element), through which its gradient passes. `handed`: where to leave what fp8 holds of delta's gradient.
    """
    if handed is not None and delta is None:
        raise ValueError("handed is given without a delta, whose gradient it is for")
    return _apply(x, delta, weights, biases, layout, eps, out_dtype, keep_sum, owed, True, values, handed)


def _apply(
    x: Tensor | Residual,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: StreamLayout,
    eps: float,
    out_dtype: torch.dtype | None,
    keep_sum: bool,
    owed: Sequence[Tensor],
    fp8: bool = False,
    values: bool = True,
    handed: Handed | None = None,
) -> tuple[Tensor | Residual, Tensor, Quantized | None]:
    x, carrier = x if isinstance(x, Residual) else (x, None)
    layout.check("x", x)
    width = x.shape[1]
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta has shape {list(delta.shape)}; x has {list(x.shape)}")
    for name, group in (("weights", weights), ("biases", biases)):
        if len(group) != len(layout.lengths) or any(v.shape != (width,) for v in group):
            shapes = [list(v.shape) for v in group]
            raise ValueError(f"{name} have shapes {shapes}; {len(layout.lengths)} streams need one [{width}] each")
        if len({v.dtype for v in group}) > 1:
            raise TypeError(f"{name} have dtypes {[v.dtype for v in group]}; they must have one")
    if owed and (delta is None or len(owed) not in (1, len(layout.lengths)) or any(b.shape != (width,) for b in owed)):
        shapes = [list(b.shape) for b in owed]
        raise ValueError(f"owed has shapes {shapes}; it takes [{width}], once or for each stream, and only with a delta")
    delta = None if delta is None else delta.contiguous()
    parameters = [p.contiguous() for p in (*weights, *biases)]
    arguments = (delta, layout.rows_per_stream, eps, out_dtype or x.dtype, keep_sum, fp8, values, handed)
    x, y, *others = _StreamLayerNorm.apply(x.contiguous(), carrier, *arguments, *parameters, *owed)
    return x if carrier is None else Residual(x, others[-1]), y, Quantized(*others[:2]) if fp8 else None


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
