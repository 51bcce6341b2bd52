"""The MLP of packed token streams: two linear layers with the exact (erf) GELU between them.

    z = x W1[s]^T + b1[s],    y = gelu(z),    out = y W2[s]^T + b2[s]        [R, K] -> [R, N] -> [R, M]

The operators are `linear_gelu`, `hidden_gradient` and `stream_linear`. This is one step for autograd, so that there is a
choice of what is kept for backward: z and y are the largest tensors of a transformer.

    recompute      kept       formed again in the backward pass
    'none'         z and y    nothing
    'elementwise'  z          y, in one pass over z
    'mlp'          neither    both, by the first product

The gradients are the same bits whichever is chosen, as long as `linear_gelu` computes the GELU as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.ops.fp8 import VALUES, Handed, Quantized, check_fp8, fp8_gelu, handed_on, quantize_rows
from cavmae_fast.ops.fp8_products import fp8_hidden_gradient, fp8_input_gradient, fp8_linear
from cavmae_fast.ops.hidden_gradient import hidden_gradient
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import forward_operator as linear_gelu_forward
from cavmae_fast.ops.origin import Origin, origin_or_itself
from cavmae_fast.ops.stream_linear import backward_operator as linear_backward
from cavmae_fast.ops.stream_linear import check_linear
from cavmae_fast.ops.stream_linear import forward_operator as linear_forward

RECOMPUTE = ("none", "elementwise", "mlp")


class _StreamMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, form, recompute, keeps, fp8, quantized, handed, *tensors):
        kept, (w1, b1, w2, b2) = _groups(tensors, 4, len(rows))
        if fp8:
            pre = fp8_linear(quantized or quantize_rows(x, VALUES), w1, b1, rows, x.dtype)
            y, *y_quantized = fp8_gelu(pre, keeps and recompute == "none")
            out = fp8_linear(Quantized(*y_quantized), w2, b2, rows, x.dtype)
        else:
            y, pre = linear_gelu_forward(x, w1, b1, rows, keeps and recompute != "mlp")
            out = linear_forward(y, w2, b2, rows)
        hidden = {"none": (pre, y), "elementwise": (pre,), "mlp": ()}[recompute]
        ctx.save_for_backward(*hidden, *kept, *w1, *b1, *w2)
        ctx.rows, ctx.form, ctx.hidden, ctx.fp8, ctx.handed = rows, form, len(hidden), fp8, handed
        ctx.bias_dtypes = b1[0].dtype, b2[0].dtype
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors, (w1, b1, w2) = _groups(ctx.saved_tensors, 3, len(ctx.rows))
        hidden, kept = tensors[: ctx.hidden], tensors[ctx.hidden :]
        x = ctx.form(*kept)
        dout, (dtype1, dtype2), needs_dx = dout.contiguous(), ctx.bias_dtypes, ctx.needs_input_grad[0]
        if ctx.fp8:
            pre = hidden[0] if hidden else fp8_linear(quantize_rows(x, VALUES), w1, b1, ctx.rows, x.dtype)
            held, again = handed_on(ctx.handed, dout), len(hidden) < 2
            dpre, db1, quantized, y = fp8_hidden_gradient(held, pre, w2, ctx.rows, dtype1, again=again)
            y = y if again else hidden[1]
        else:
            if not hidden:
                y, pre = linear_gelu_forward(x, w1, b1, ctx.rows, True)
            else:
                pre, y = hidden if len(hidden) == 2 else (hidden[0], F.gelu(hidden[0]))
            dpre, db1 = hidden_gradient(dout, pre, w2, ctx.rows, dtype1)
        owed = not any(ctx.needs_input_grad[-len(w2) :])  # the second layer's bias gradients are formed elsewhere
        _, dw2, db2 = linear_backward(dout, y, w2, ctx.rows, None if owed else dtype2, False)
        dx, dw1, _ = linear_backward(dpre, x, w1, ctx.rows, None, needs_dx and not ctx.fp8)
        if needs_dx and ctx.fp8:
            dx = fp8_input_gradient(quantized, w1, ctx.rows, x.dtype)
        gradients = [part for group in (dw1, db1, dw2) for part in group.unbind(0)]
        gradients += [None] * len(w2) if owed else db2.unbind(0)
        return dx if needs_dx else None, *[None] * (7 + len(kept)), *gradients


def _groups(tensors: Sequence[Tensor], count: int, size: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The last `count` groups of `size` tensors, after what comes before them."""
    first = len(tensors) - count * size
    return list(tensors[:first]), [list(tensors[i : i + size]) for i in range(first, len(tensors), size)]


def stream_mlp(
    x: Tensor,
    weights1: Sequence[Tensor],
    biases1: Sequence[Tensor],
    weights2: Sequence[Tensor],
    biases2: Sequence[Tensor],
    layout: StreamLayout,
    *,
    recompute: str = "none",
    origin: Origin | None = None,
    fp8: bool = False,
    quantized: Quantized | None = None,
    handed: Handed | None = None,
) -> Tensor:
    """`gelu(x W1^T + b1) W2^T + b2` for packed streams, with one set of weights for all of them or one for each.

    x `[R, K]`, weights1 `[N, K]` and weights2 `[M, N]` in x's dtype, biases1 `[N]` and biases2 `[M]`, one of each or one for
    every stream of `layout`. Returns `[R, M]` in x's dtype. `recompute`: one of `RECOMPUTE`, what of the hidden layer is
    formed again in the backward pass instead of kept; `origin`: how x is, instead of kept. `fp8`: both products and those of
    their inputs' gradients are of 8-bit numbers (`ops/fp8.py`); `quantized`: what fp8 holds of x, and `handed`,
    as in `stream_linear`. Raises
    ValueError or TypeError when something does not fit.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is {recompute!r}; it must be one of {', '.join(RECOMPUTE)}")
    rows = check_linear(x, weights1, biases1, layout, "1")
    if len(weights2) != len(weights1):
        raise ValueError(f"weights2 has {len(weights2)} entries, and weights1 {len(weights1)}; they must be as many")
    check_linear(x.new_empty(1).expand(layout.rows, weights1[0].shape[0]), weights2, biases2, layout, "2")
    if fp8:
        check_fp8(x.device, *weights1[0].shape, *weights2[0].shape)
    parameters = (*weights1, *biases1, *weights2, *biases2)
    x = x if quantized else x.contiguous()
    form, kept = origin_or_itself(x, origin)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    return _StreamMlp.apply(x, rows, form, recompute, needs_grad, fp8, quantized, handed, *kept, *parameters)
