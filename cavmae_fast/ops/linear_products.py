"""The three products of a linear layer of packed streams by PyTorch's GEMMs, and the sums of its bias's gradient.

    y = x W[s]^T + b[s],    dx = dy W[s],    dW[s] = dy^T x,    db[s] = sum of dy        s: the stream of the row

One weight is one GEMM over all rows; with one for each stream every GEMM writes its slice of one output, so that nothing is
concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast import compat


def onednn_limit(implementation: str, dtype: torch.dtype) -> str | None:
    """Why oneDNN's product cannot be had."""
    return (
        f"oneDNN has no product in {dtype} here"
        if implementation == "onednn" and not compat.has_fused_linear(dtype)
        else None
    )


def linear_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int], onednn: bool = False
) -> Tensor:
    """`x W^T + b`, each of the row ranges `rows` with its own weight and bias -> `[R, N]`. `onednn`: by its product."""
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


def input_gradient(dout: Tensor, weights: Sequence[Tensor], rows: Sequence[int], onednn: bool = False) -> Tensor:
    """`dout W`, each of the row ranges `rows` with its own weight -> `[R, K]`. `onednn`: by its product."""
    if onednn:
        parts = [compat.fused_linear(dout_s, w.t(), None) for dout_s, w in zip(dout.split(rows), weights)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    dx = dout.new_empty(dout.shape[0], weights[0].shape[1])
    for dout_s, w, dx_s in zip(dout.split(rows), weights, dx.split(rows)):
        torch.mm(dout_s, w, out=dx_s)
    return dx


def weight_gradient(dout: Tensor, x: Tensor, rows: Sequence[int]) -> Tensor:
    """`dout^T x` of each row range -> `[streams, N, K]`."""
    dw = x.new_empty(len(rows), dout.shape[1], x.shape[1])
    for dout_s, x_s, dw_s in zip(dout.split(rows), x.split(rows), dw):
        torch.mm(_as_left_factor(dout_s, x_s), x_s, out=dw_s)
    return dw


def _as_left_factor(dout: Tensor, x: Tensor) -> Tensor:
    """dout^T for the product `dout^T x`. The CPU's bf16 GEMM is half as fast with a transposed left factor. Writing the
    factor out saves time where dout is the narrower of the two (measured at 2832 rows, 2048 -> 512: 25 %), and costs time
    where it is the wider."""
    slow = dout.device.type == "cpu" and dout.dtype in (torch.bfloat16, torch.float16)
    return dout.t().contiguous() if slow and x.shape[1] >= 2 * dout.shape[1] else dout.t()


def bias_gradient(dout: Tensor, rows: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """Column sums `[streams, N]` of each row range; empty for dtype None. PyTorch sums bf16 and fp16 in fp32 and rounds
    once, to `dtype`."""
    if dtype is None:
        return dout.new_empty(0)
    db = torch.empty(len(rows), dout.shape[1], dtype=dtype, device=dout.device)
    for dout_s, db_s in zip(dout.split(rows), db):
        torch.sum(dout_s, 0, dtype=dtype, out=db_s)
    return db
