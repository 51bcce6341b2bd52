"""Linear layer of packed token streams: one weight for all rows, or each stream with its own.

    y = x W[s]^T + b[s]            x [R, K], W[s] [N, K], b[s] [N] -> [R, N];  s: the stream of the row

Backward, with the sums over the stream's rows:

    dx = dy W[s],    dW[s] = dy^T x,    db[s] = sum of dy

The products are those of `linear_products.py`, or of `fp8_products.py`; dW and db are an operator of their own
(`weight_gradient.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.fp8 import VALUES, Handed, Quantized, check_fp8, handed_on, quantize_rows
from cavmae_fast.ops.fp8_products import fp8_input_gradient, fp8_linear
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_products import (
    SIDE_BY_SIDE,
    backward_side_by_side,
    bias_gradient,
    input_gradient,
    linear_forward,
    onednn_limit,
)
from cavmae_fast.ops.origin import Origin, origin_or_itself
from cavmae_fast.ops.side_by_side import side_by_side
from cavmae_fast.ops.weight_gradient import weight_gradient


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


def linear_backward(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[int],
    bias_dtype: torch.dtype | None,
    needs_dx: bool,
    onednn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx `[R, K]`, or empty when not needed; dW `[streams, N, K]`; db `[streams, N]`, empty for dtype None). `onednn`: by
    its product, of dx alone."""
    dx = input_gradient(dout, weights, rows, onednn) if needs_dx else x.new_empty(0)
    return dx, *weight_gradient(dout, x, rows, bias_dtype)


def _forward_fake(x, weights, biases, rows):
    return x.new_empty(x.shape[0], weights[0].shape[0])


def backward_fake(dout, x, weights, rows, bias_dtype, needs_dx):
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dw = x.new_empty(len(weights), *weights[0].shape)
    return dx, dw, x.new_empty(0) if bias_dtype is None else x.new_empty(len(weights), dout.shape[1], dtype=bias_dtype)


forward_operator = register(
    "stream_linear",
    "(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] rows) -> Tensor",
    torch=linear_forward,
    kernels={SIDE_BY_SIDE: partial(linear_forward, run=side_by_side)},
    forms={"onednn": partial(linear_forward, onednn=True)},
    limit=lambda implementation, dtype, shape: onednn_limit(implementation, dtype),
    fake=_forward_fake,
)
backward_operator = register(
    "stream_linear_backward",
    "(Tensor dout, Tensor x, Tensor[] weights, SymInt[] rows, ScalarType? bias_dtype, bool needs_dx)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    torch=linear_backward,
    kernels={SIDE_BY_SIDE: backward_side_by_side},
    forms={"onednn": partial(linear_backward, onednn=True)},
    fake=backward_fake,
)


class _StreamLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, form, fp8, quantized, handed, count, *tensors):
        kept, parameters = tensors[:count], tensors[count:]
        weights, biases = list(parameters[: len(parameters) // 2]), list(parameters[len(parameters) // 2 :])
        ctx.save_for_backward(*kept, *weights)
        ctx.rows, ctx.form, ctx.fp8, ctx.count, ctx.bias_dtypes = rows, form, fp8, count, [b.dtype for b in biases]
        ctx.handed = handed
        if fp8:
            return fp8_linear(quantized or quantize_rows(x, VALUES), weights, biases, rows, x.dtype)
        return forward_operator(x, weights, biases, rows)

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors  # once: where it is formed again for this call, a second call is an error
        kept, weights = tensors[: ctx.count], list(tensors[ctx.count :])
        needs_dx, needs_db = ctx.needs_input_grad[0], any(ctx.needs_input_grad[-len(weights) :])
        dout, bias_dtype = dout.contiguous(), ctx.bias_dtypes[0] if needs_db else None
        in_product = needs_dx and not ctx.fp8
        dx, dw, db = backward_operator(dout, ctx.form(*kept), weights, ctx.rows, bias_dtype, in_product)
        if needs_dx and ctx.fp8:
            dx = fp8_input_gradient(handed_on(ctx.handed, dout), weights, ctx.rows, dout.dtype)
        dbs = [part.to(dtype) for part, dtype in zip(db.unbind(0), ctx.bias_dtypes)] if needs_db else [None] * len(weights)
        return dx if needs_dx else None, *[None] * (6 + ctx.count), *dw.unbind(0), *dbs


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
    quantized: Quantized | None = None,
    handed: Handed | None = None,
) -> Tensor:
    """`x W^T + b` for packed streams, with one weight for all of them or one for each.

    x `[R, K]`, weights `[N, K]` in x's dtype and biases `[N]`, one of each or one for every stream of `layout`. Returns
    `[R, N]` in x's dtype; bias gradients are summed in float32. `origin`: how x is formed again in the backward pass,
    instead of kept. `fp8`: this product and that of x's gradient are of 8-bit numbers (`ops/fp8.py`); `quantized`: what fp8
    holds of x, where it is known: x itself is then read by the backward pass alone, and with an origin not at all; `handed`:
    where what fp8 holds of the result's gradient may be found. Raises
    ValueError or TypeError when something does not fit.
    """
    rows = check_linear(x, weights, biases, layout)
    if fp8:
        check_fp8(x.device, *weights[0].shape)
    x = x if quantized else x.contiguous()
    form, kept = origin_or_itself(x, origin)
    return _StreamLinear.apply(x, rows, form, fp8, quantized, handed, len(kept), *kept, *weights, *biases)
