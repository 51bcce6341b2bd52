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
from cavmae_fast.ops.product_library import weight_gradient_library, weight_gradient_limit


def bias_gradient(dout: Tensor, rows: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """Column sums `[streams, N]` of each row range; empty for dtype None. PyTorch sums bf16 and fp16 in fp32 and rounds
    once, to `dtype`."""
    if dtype is None:
        return dout.new_empty(0)
    db = torch.empty(len(rows), dout.shape[1], dtype=dtype, device=dout.device)
    for dout_s, db_s in zip(dout.split(rows), db):
        torch.sum(dout_s, 0, dtype=dtype, out=db_s)
    return db


def _as_left_factor(dout: Tensor, x: Tensor) -> Tensor:
    """dout^T for the product `dout^T x`. The CPU's bf16 GEMM is half as fast with a transposed left factor. Writing the
    factor out saves time where dout is the narrower of the two (measured at 2832 rows, 2048 -> 512: 25 %), and costs time
    where it is the wider."""
    slow = dout.device.type == "cpu" and dout.dtype in (torch.bfloat16, torch.float16)
    return dout.t().contiguous() if slow and x.shape[1] >= 2 * dout.shape[1] else dout.t()


def _torch(dout: Tensor, x: Tensor, rows: Sequence[int], bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    dw = x.new_empty(len(rows), dout.shape[1], x.shape[1])
    for dout_s, x_s, dw_s in zip(dout.split(rows), x.split(rows), dw):
        torch.mm(_as_left_factor(dout_s, x_s), x_s, out=dw_s)
    return dw, bias_gradient(dout, rows, bias_dtype)


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
