"""The gradients of a linear layer's weights and biases, for packed streams.

    dW[s] = dout^T x,    db[s] = sum of dout, both over the stream's rows    [R, N], [R, K] -> [streams, N, K], [streams, N]

PyTorch makes a product and a pass over dout for each stream. `cuda` makes all of them in one launch, and forms the sums
while it waits for the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.linear_products import bias_gradient, weight_products
from cavmae_fast.ops.product_library import weight_gradient_library, weight_gradient_limit


def _torch(dout: Tensor, x: Tensor, rows: Sequence[int], bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return weight_products(dout, x, rows), bias_gradient(dout, rows, bias_dtype)


def _fake(dout: Tensor, x: Tensor, rows: Sequence[int], bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    dw = x.new_empty(len(rows), dout.shape[1], x.shape[1])
    return dw, x.new_empty(0) if bias_dtype is None else x.new_empty(len(rows), dout.shape[1], dtype=bias_dtype)


weight_gradient = register(
    "weight_gradient",
    "(Tensor dout, Tensor x, SymInt[] rows, ScalarType? bias_dtype) -> (Tensor dw, Tensor db)",
    torch=_torch,
    cuda=weight_gradient_library,
    limit=lambda implementation, dtype, shape: weight_gradient_limit(dtype, shape),
    shape=lambda dout, x, *_: (*dout.shape, x.shape[1]),
    fake=_fake,
)
