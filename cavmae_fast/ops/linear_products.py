"""The three products of a linear layer of packed streams by PyTorch's GEMMs, and the sums of its bias's gradient.

    y = x W[s]^T + b[s],    dx = dy W[s],    dW[s] = dy^T x,    db[s] = sum of dy        s: the stream of the row

One weight is one GEMM over all rows; with one for each stream every GEMM writes its slice of one output, so that nothing is
concatenated. 'torch side by side' launches those of two streams beside each other, and with one weight dx and dW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cavmae_fast import compat
from cavmae_fast.ops.side_by_side import Jobs, Run, in_turn, side_by_side

SIDE_BY_SIDE = "torch side by side"
"The name of the implementation whose products are launched by `side_by_side`."


def onednn_limit(implementation: str, dtype: torch.dtype) -> str | None:
    """Why oneDNN's product cannot be had."""
    return (
        f"oneDNN has no product in {dtype} here"
        if implementation == "onednn" and not compat.has_fused_linear(dtype)
        else None
    )


def linear_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[int],
    onednn: bool = False,
    run: Run = in_turn,
) -> Tensor:
    """`x W^T + b`, each of the row ranges `rows` with its own weight and bias -> `[R, N]`. `onednn`: by its product; `run`:
    how the products are launched."""
    in_bf16 = len(weights) == 1 and x.device.type == "cpu" and x.dtype == torch.bfloat16
    if onednn or (in_bf16 and compat.has_fused_linear(x.dtype)):
        # oneDNN adds the bias inside its product; addmm first copies the bias into every row of the result, which takes a
        # fifth of its time in bf16.
        parts = [compat.fused_linear(x_s, w, b.to(x.dtype)) for x_s, w, b in zip(x.split(rows), weights, biases)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    out = x.new_empty(x.shape[0], weights[0].shape[0])
    products = zip((b.to(x.dtype) for b in biases), x.split(rows), (w.t() for w in weights), out.split(rows))
    run([partial(torch.addmm, b, x_s, w, out=out_s) for b, x_s, w, out_s in products], x.device)
    return out


def backward_side_by_side(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[int],
    bias_dtype: torch.dtype | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `stream_linear.linear_backward`, all products launched by one `side_by_side`."""
    products: list[Callable[[], object]] = []

    def later(jobs: Jobs, device: torch.device) -> None:
        products.extend(jobs)

    dx = input_gradient(dout, weights, rows, run=later) if needs_dx else x.new_empty(0)
    dw = weight_products(dout, x, rows, later)
    side_by_side(products, x.device)
    return dx, dw, bias_gradient(dout, rows, bias_dtype)


def input_gradient(
    dout: Tensor, weights: Sequence[Tensor], rows: Sequence[int], onednn: bool = False, run: Run = in_turn
) -> Tensor:
    """`dout W`, each of the row ranges `rows` with its own weight -> `[R, K]`; `onednn` and `run` as in `linear_forward`."""
    if onednn:
        parts = [compat.fused_linear(dout_s, w.t(), None) for dout_s, w in zip(dout.split(rows), weights)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    dx = dout.new_empty(dout.shape[0], weights[0].shape[1])
    parts = zip(dout.split(rows), weights, dx.split(rows))
    run([partial(torch.mm, dout_s, w, out=dx_s) for dout_s, w, dx_s in parts], dout.device)
    return dx


def weight_products(dout: Tensor, x: Tensor, rows: Sequence[int], run: Run = in_turn) -> Tensor:
    """`dout^T x` of each row range -> `[streams, N, K]`; `run` as in `linear_forward`."""
    dw = x.new_empty(len(rows), dout.shape[1], x.shape[1])
    run([partial(_weight_product, *parts) for parts in zip(dout.split(rows), x.split(rows), dw)], x.device)
    return dw


def _weight_product(dout: Tensor, x: Tensor, dw: Tensor) -> None:
    """Writes `dout^T x` into dw."""
    torch.mm(_as_left_factor(dout, x), x, out=dw)


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
