"""Linear layer of packed token streams: one weight for all rows, or each stream with its own.

    y = x W[s]^T + b[s]            x [R, K], W[s] [N, K], b[s] [N] -> [R, N];  s: the stream of the row

Backward, with the sums over the stream's rows:

    dx = dy W[s],    dW[s] = dy^T x,    db[s] = sum of dy

PyTorch's GEMMs do the work. One weight is one GEMM over all rows; with one for each stream every GEMM writes its slice
of one output, so that nothing is concatenated. `linear_gelu` builds on the same functions. dW and db are an operator of
their own (`weight_gradient.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cavmae_fast import compat
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.fp8 import GRADIENTS, VALUES, backward_products, check_fp8, forward_products, rounded_rows
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.origin import Origin, origin_or_itself
from cavmae_fast.ops.weight_gradient import bias_gradient, weight_gradient

# ---------------------------------------------------------------------------------------------------------- products


def linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[int],
    fp8: bool = False,
    onednn: bool = False,
) -> Tensor:
    """`x W^T + b`, each of the row ranges `rows` with its own weight and bias -> `[R, N]`. `fp8`: of what fp8 holds of x
    and W (`ops/fp8.py`); `onednn`: by its product."""
    if fp8 and x.device.type == "cuda":
        return forward_products(x, weights, biases, rows)
    if fp8:
        x, *weights = (rounded_rows(t, VALUES) for t in (x, *weights))
    in_bf16 = len(weights) == 1 and x.device.type == "cpu" and x.dtype == torch.bfloat16
    if onednn or (in_bf16 and compat.has_fused_linear(x.dtype)):
        # oneDNN adds the bias inside its product; addmm first copies the bias into every row of the result, which takes a
        # fifth of its time in bf16.
        parts = [compat.fused_linear(x_s, w, b.to(x.dtype)) for x_s, w, b in zip(x.split(rows), weights, biases)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    out = x.new_empty(x.shape[0], weights[0].shape[0])
    for x_s, out_s, w, b in zip(x.split(rows), out.split(rows), weights, biases):
        torch.addmm(b.to(x.dtype), x_s, w.t(), out=out_s)
    return out


def linear_backward(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[int],
    needs_dx: bool,
    fp8: bool = False,
    onednn: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dx `[R, K]`, or empty when not needed; dW `[streams, N, K]`)."""
    dx = input_gradient(dout, weights, rows, fp8, onednn) if needs_dx else x.new_empty(0)
    return dx, weight_gradient(dout, x, rows, None)[0]


def input_gradient(
    dout: Tensor, weights: Sequence[Tensor], rows: Sequence[int], fp8: bool = False, onednn: bool = False
) -> Tensor:
    """`dout W`, each of the row ranges `rows` with its own weight -> `[R, K]`. `fp8`: of what fp8 holds of dout and W;
    `onednn`: by its product."""
    if fp8 and dout.device.type == "cuda":
        return backward_products(dout, weights, rows)
    if fp8:
        dout, weights = rounded_rows(dout, GRADIENTS), [rounded_rows(w.t().contiguous(), VALUES).t() for w in weights]
    if onednn:
        parts = [compat.fused_linear(dout_s, w.t(), None) for dout_s, w in zip(dout.split(rows), weights)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    dx = dout.new_empty(dout.shape[0], weights[0].shape[1])
    for dout_s, w, dx_s in zip(dout.split(rows), weights, dx.split(rows)):
        torch.mm(dout_s, w, out=dx_s)
    return dx


def check_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], layout: StreamLayout, number: str = ""
) -> list[int]:
    """Raises unless the arguments fit; returns the rows that each weight is for. `number`: which of several layers the
    weights and biases are of, as their names end."""
    layout.check("x", x)
    if len(weights) not in (1, len(layout.lengths)):
        raise ValueError(f"weights{number} has {len(weights)} entries; {layout} takes 1 or {len(layout.lengths)}")
    shape = (weights[0].shape[0], x.shape[1])
    if any(w.shape != shape for w in weights):
        raise ValueError(
            f"weights{number} have shapes {[list(w.shape) for w in weights]}; an input of width {x.shape[1]} needs"
            f" [N, {x.shape[1]}]"
        )
    if len(biases) != len(weights) or any(b.shape != shape[:1] for b in biases):
        raise ValueError(
            f"biases{number} have shapes {[list(b.shape) for b in biases]}; {len(weights)} weights need one [{shape[0]}]"
            " each"
        )
    if any(w.dtype != x.dtype for w in weights):
        dtypes = [w.dtype for w in weights]
        raise TypeError(f"weights{number} have dtypes {dtypes}; x has {x.dtype}, and they must be the same")
    return [layout.rows] if len(weights) == 1 else layout.rows_per_stream


# -------------------------------------------------------------------------------------------------- torch operators


def onednn_limit(implementation: str, dtype: torch.dtype) -> str | None:
    """Why oneDNN's product cannot be had."""
    return (
        f"oneDNN has no product in {dtype} here"
        if implementation == "onednn" and not compat.has_fused_linear(dtype)
        else None
    )


def _backward_torch(dout, x, weights, rows, bias_dtype, needs_dx, fp8=False, onednn=False):
    dx = input_gradient(dout, weights, rows, fp8, onednn) if needs_dx else x.new_empty(0)
    return dx, *weight_gradient(dout, x, rows, bias_dtype)


def _forward_fake(x, weights, biases, rows, fp8=False):
    return x.new_empty(x.shape[0], weights[0].shape[0])


def backward_fake(dout, x, weights, rows, bias_dtype, needs_dx, fp8=False):
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dw = x.new_empty(len(weights), *weights[0].shape)
    return dx, dw, x.new_empty(0) if bias_dtype is None else x.new_empty(len(weights), dout.shape[1], dtype=bias_dtype)


forward_operator = register(
    "stream_linear",
    "(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] rows, bool fp8=False) -> Tensor",
    torch=linear_forward,
    forms={"onednn": partial(linear_forward, onednn=True)},
    limit=lambda implementation, dtype, shape: onednn_limit(implementation, dtype),
    fake=_forward_fake,
)
backward_operator = register(
    "stream_linear_backward",
    "(Tensor dout, Tensor x, Tensor[] weights, SymInt[] rows, ScalarType? bias_dtype, bool needs_dx,"
    " bool fp8=False) -> (Tensor dx, Tensor dw, Tensor db)",
    torch=_backward_torch,
    forms={"onednn": partial(_backward_torch, onednn=True)},
    fake=backward_fake,
)


class _StreamLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, form, fp8, count, *tensors):
        kept, parameters = tensors[:count], tensors[count:]
        weights, biases = list(parameters[: len(parameters) // 2]), list(parameters[len(parameters) // 2 :])
        ctx.save_for_backward(*kept, *weights)
        ctx.rows, ctx.form, ctx.fp8, ctx.count, ctx.bias_dtypes = rows, form, fp8, count, [b.dtype for b in biases]
        return forward_operator(x, weights, biases, rows, fp8)

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors  # once: where it is formed again for this call, a second call is an error
        kept, weights = tensors[: ctx.count], list(tensors[ctx.count :])
        needs_dx, needs_db = ctx.needs_input_grad[0], any(ctx.needs_input_grad[-len(weights) :])
        options = (ctx.rows, ctx.bias_dtypes[0] if needs_db else None, needs_dx, ctx.fp8)
        dx, dw, db = backward_operator(dout.contiguous(), ctx.form(*kept), weights, *options)
        dbs = [part.to(dtype) for part, dtype in zip(db.unbind(0), ctx.bias_dtypes)] if needs_db else [None] * len(weights)
        return dx if needs_dx else None, *[None] * (4 + ctx.count), *dw.unbind(0), *dbs


class _OwnBias(torch.autograd.Function):
    """`delta` as it is; the gradients of the biases that were added to it are its column sums."""

    @staticmethod
    def forward(ctx, delta, rows, *biases):
        ctx.rows, ctx.dtypes = rows, [b.dtype for b in biases]
        return delta.view_as(delta)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, *bias_gradient(gradient.contiguous(), ctx.rows, ctx.dtypes[0]).unbind(0)


def with_bias_gradients(delta: Tensor, biases: Sequence[Tensor], layout: StreamLayout) -> Tensor:
    """`delta [R, N]`, which was made with the values of `biases` alone (`bias.detach()`), with their gradients: for where no
    LayerNorm gives them (`stream_layer_norm`'s `owed`). One bias for all rows, or one for each stream of `layout`."""
    return _OwnBias.apply(delta, [layout.rows] if len(biases) == 1 else layout.rows_per_stream, *biases)


def stream_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: StreamLayout,
    *,
    origin: Origin | None = None,
    fp8: bool = False,
) -> Tensor:
    """`x W^T + b` for packed streams, with one weight for all of them or one for each.

    x `[R, K]`, weights `[N, K]` in x's dtype and biases `[N]`, one of each or one for every stream of `layout`. Returns
    `[R, N]` in x's dtype; bias gradients are summed in float32. `origin`: how x is formed again in the backward pass,
    instead of kept. `fp8`: this product and that of x's gradient are of 8-bit numbers (`ops/fp8.py`). Raises ValueError or
    TypeError when something does not fit.
    """
    rows = check_linear(x, weights, biases, layout)
    if fp8:
        check_fp8(x.device, *weights[0].shape)
    x = x.contiguous()
    form, kept = origin_or_itself(x, origin)
    return _StreamLinear.apply(x, rows, form, fp8, len(kept), *kept, *weights, *biases)
