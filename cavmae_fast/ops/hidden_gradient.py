"""The gradient of an MLP's hidden layer: what fc2 hands back, taken on through the GELU before it, and fc1's bias gradient.

    dz = (dout W2[s]) * (Phi(z) + z phi(z)),    db1[s] = sum of dz over the stream's rows       [R, M], [R, N] -> [R, N]

z are the values before the GELU. With PyTorch the product, the derivative and the sum are three passes over memory; `triton`
and `pieces` make one of the last two; 'triton product' and `cuda` do all of it as they finish each tile. With
'torch side by side' the products of two streams are launched beside each other (`stream_linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cavmae_fast.ops.dgelu_bias import dgelu_bias_pieces, dgelu_bias_torch, dgelu_bias_triton
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.linear_products import SIDE_BY_SIDE, input_gradient, onednn_limit
from cavmae_fast.ops.product_kernels import hidden_gradient_product
from cavmae_fast.ops.product_library import hidden_gradient_library, product_limit
from cavmae_fast.ops.side_by_side import Run, in_turn, side_by_side


def _separate(
    dgelu_bias: Callable[..., tuple[Tensor, Tensor]],
    dout: Tensor,
    pre: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[int],
    bias_dtype: torch.dtype,
    onednn: bool = False,
    run: Run = in_turn,
    **options: str,
) -> tuple[Tensor, Tensor]:
    """The product, then `dgelu_bias`."""
    return dgelu_bias(input_gradient(dout, weights, rows, onednn, run), pre, rows, bias_dtype, **options)


def _limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    if implementation == "cuda":
        return product_limit(dtype, shape)
    return onednn_limit(implementation.split(",")[0], dtype)


def _fake(dout, pre, weights, rows, bias_dtype):
    return torch.empty_like(pre), pre.new_empty(len(weights), pre.shape[1], dtype=bias_dtype)


hidden_gradient = register(
    "hidden_gradient",
    "(Tensor dout, Tensor pre, Tensor[] weights, SymInt[] rows, ScalarType bias_dtype) -> (Tensor dpre, Tensor db)",
    torch=partial(_separate, dgelu_bias_torch),
    triton=partial(_separate, dgelu_bias_triton),
    cuda=hidden_gradient_library,
    kernels={
        "triton product": hidden_gradient_product,
        SIDE_BY_SIDE: partial(_separate, dgelu_bias_torch, run=side_by_side),
    },
    forms={
        "onednn": partial(_separate, dgelu_bias_torch, onednn=True),
        "pieces": partial(_separate, dgelu_bias_pieces),
        "onednn, pieces": partial(_separate, dgelu_bias_pieces, onednn=True),
    },
    limit=_limit,
    shape=lambda dout, pre, *_: (*dout.shape, pre.shape[1]),
    fake=_fake,
)
"""dout `[R, M]`, pre `[R, N]`, weights `[M, N]`, one for each of the row ranges `rows` -> (dpre `[R, N]` in pre's dtype, db
`[streams, N]` in `bias_dtype`)."""
