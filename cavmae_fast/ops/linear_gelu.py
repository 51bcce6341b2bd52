"""Linear layer of packed token streams with the exact (erf) GELU on top: the first half of a transformer's MLP.

    z = x W[s]^T + b[s],    y = gelu(z) = z Phi(z)            [R, K] -> [R, N];  s: the stream of the row

Backward, with z kept in x's dtype:

    dz = dy * (Phi(z) + z phi(z)),    dx = dz W[s],    dW[s] = dz^T x,    db[s] = sum of dz over the stream's rows

The products are `stream_linear`'s, which 'torch side by side' launches as there; `dgelu_bias` computes dz and db. 'triton
product' and `cuda` have a product of their own for the forward pass, which adds the bias and applies the GELU as it finishes
each tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.ops.dgelu_bias import dgelu_bias_pieces, dgelu_bias_torch, dgelu_bias_triton
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_products import SIDE_BY_SIDE, backward_side_by_side, linear_forward, onednn_limit
from cavmae_fast.ops.product_kernels import linear_gelu_product
from cavmae_fast.ops.product_library import linear_gelu_library, product_limit
from cavmae_fast.ops.side_by_side import in_turn, side_by_side
from cavmae_fast.ops.stream_linear import backward_fake, check_linear, linear_backward

CPU_FORMS = ("onednn", "pieces")


def _limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    if implementation in CPU_FORMS:
        return onednn_limit(implementation, dtype)
    return product_limit(dtype, shape) if implementation == "cuda" else None


def _forward_torch(x, weights, biases, rows, keep_pre, onednn=False, run=in_turn):
    pre = linear_forward(x, weights, biases, rows, onednn, run)
    if keep_pre:
        return F.gelu(pre), pre
    return torch.ops.aten.gelu_(pre), x.new_empty(0)


def _backward(dgelu_bias, dy, pre, x, weights, rows, bias_dtype, needs_dx, products=linear_backward, **options):
    dpre, db = dgelu_bias(dy, pre, rows, bias_dtype, **options)
    dx, dw, _ = products(dpre, x, weights, rows, None, needs_dx)
    return dx, dw, db


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(x, weights, biases, rows, keep_pre):
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    return y, torch.empty_like(y) if keep_pre else x.new_empty(0)


forward_operator = register(
    "linear_gelu",
    "(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] rows, bool keep_pre) -> (Tensor y, Tensor pre)",
    torch=_forward_torch,
    cuda=linear_gelu_library,
    kernels={"triton product": linear_gelu_product, SIDE_BY_SIDE: partial(_forward_torch, run=side_by_side)},
    shape=lambda x, weights, *_: (*x.shape, weights[0].shape[0]),
    forms={"onednn": partial(_forward_torch, onednn=True), "pieces": _forward_torch},
    fake=_forward_fake,
)
backward_operator = register(
    "linear_gelu_backward",
    "(Tensor dy, Tensor pre, Tensor x, Tensor[] weights, SymInt[] rows, ScalarType bias_dtype, bool needs_dx)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    torch=partial(_backward, dgelu_bias_torch),
    triton=partial(_backward, dgelu_bias_triton),
    kernels={
        "triton product": partial(_backward, dgelu_bias_triton),
        SIDE_BY_SIDE: partial(_backward, dgelu_bias_torch, products=backward_side_by_side),
    },
    forms={
        "onednn": partial(_backward, dgelu_bias_torch, products=partial(linear_backward, onednn=True)),
        "pieces": partial(_backward, dgelu_bias_pieces),
    },
    limit=_limit,
    fake=lambda dy, pre, *rest: backward_fake(dy, *rest),
)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, keep_pre, *parameters):
        count = len(parameters) // 2
        weights, biases = list(parameters[:count]), list(parameters[count:])
        y, pre = forward_operator(x, weights, biases, rows, keep_pre)
        ctx.save_for_backward(pre, x, *weights)
        ctx.rows, ctx.bias_dtypes = rows, [b.dtype for b in biases]
        return y

    @staticmethod
    def backward(ctx, dy):
        pre, x, *weights = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx, dw, db = backward_operator(dy.contiguous(), pre, x, weights, ctx.rows, ctx.bias_dtypes[0], needs_dx)
        dbs = [part.to(dtype) for part, dtype in zip(db.unbind(0), ctx.bias_dtypes)]
        return dx if needs_dx else None, None, None, *dw.unbind(0), *dbs


def linear_gelu(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], layout: StreamLayout) -> Tensor:
    """`gelu(x W^T + b)` with the exact (erf) GELU for packed streams, with one weight for all of them or one for each.

    x `[R, K]`, weights `[N, K]` in x's dtype and biases `[N]`, one of each or one for every stream of `layout`. Returns
    `[R, N]` in x's dtype. The values before the GELU are kept in x's dtype for backward. Raises ValueError or TypeError
    when something does not fit.
    """
    rows = check_linear(x, weights, biases, layout)
    keep_pre = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases))
    return _LinearGelu.apply(x.contiguous(), rows, keep_pre, *weights, *biases)
