"""The Triton kernels of `stream_layer_norm.py`: forward and backward pass, each one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.fp8 import GRADIENTS, LARGEST_EXPONENT, VALUES, Quantized, scaled_rows
from cavmae_fast.ops.linear_products import bias_gradient
from cavmae_fast.ops.stream_tiles import pick, stream_of_tile, sum_of_streams, three

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def stream_layer_norm_forward_kernel(
    x, delta, x_new, y,  # [R, D]
    q,  # [R, D] fp8, or None
    scale,  # [R] fp32, or None
    mean, rstd,  # [R] fp32
    w0, w1, w2, b0, b1, b2,  # [D] each
    rows0, rows1, rows2, tiles0, tiles1, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, HAS_DELTA: tl.constexpr,
    STORE_SUM: tl.constexpr, STORE_Y: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """A program normalizes BLOCK_R rows at once: 4 rows of 768 keep 32 fp32 values per thread in flight with 4 warps. With q
    what fp8 holds of y is written, too. LARGEST: as in `scaled_rows`."""
    stream, local = stream_of_tile(tl.program_id(0), tiles0, tiles1)
    first = pick(stream, 0, rows0, rows0 + rows1)
    count = pick(stream, rows0, rows1, rows2)
    row = local * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    valid = (row < count)[:, None] & inside[None, :]
    offset = (first + row).to(tl.int64)[:, None] * D + column[None, :]

    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + offset, mask=valid, other=0.0).to(tl.float32)
        # The sum is normalized as it is stored, so that backward sees the same x' as forward did.
        stored = value.to(x.dtype.element_ty)
        if STORE_SUM:
            tl.store(x_new + offset, stored, mask=valid)
        value = stored.to(tl.float32)
    mu = tl.sum(value, axis=1) / D
    centered = tl.where(inside[None, :], value - mu[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)
    tl.store(mean + first + row, mu, mask=row < count)
    tl.store(rstd + first + row, r, mask=row < count)
    w = tl.load(pick(stream, w0, w1, w2) + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pick(stream, b0, b1, b2) + column, mask=inside, other=0.0).to(tl.float32)
    result = (centered * r[:, None] * w[None, :] + b[None, :]).to(y.dtype.element_ty)
    if STORE_Y:
        tl.store(y + offset, result, mask=valid)
    if q is not None:
        scaled, factor = scaled_rows(result.to(tl.float32), LARGEST)
        tl.store(q + offset, scaled.to(q.dtype.element_ty), mask=valid)
        tl.store(scale + first + row, factor, mask=row < count)


@triton.jit
def stream_layer_norm_backward_kernel(
    dy, dx_new, x, delta, dx, ddelta,  # [R, D]
    q,  # [R, D] fp8, or None
    scale,  # [R] fp32, or None
    mean, rstd,  # [R] fp32
    w0, w1, w2,  # [D] each
    sums,  # [programs, 2 or 3, D] fp32
    rows0, rows1, rows2, tiles0, tiles1,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
    HAS_DX_NEW: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_DDELTA: tl.constexpr, UPDATE_SUMS: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """A program sums the gradients of weight and bias over ROWS_PER_PROGRAM rows, BLOCK_R at a time, before it writes them;
    with UPDATE_SUMS that of delta, too. What was normalized is x, or x + delta. With q what fp8 holds of delta's gradient is
    written, too. LARGEST: as in `scaled_rows`."""
    program = tl.program_id(0)
    stream, local = stream_of_tile(program, tiles0, tiles1)
    first = pick(stream, 0, rows0, rows0 + rows1)
    count = pick(stream, rows0, rows1, rows2)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    w = tl.load(pick(stream, w0, w1, w2) + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = tl.zeros([BLOCK_D], dtype=tl.float32)
    update = tl.zeros([BLOCK_D], dtype=tl.float32)
    for step in range(0, ROWS_PER_PROGRAM, BLOCK_R):
        row = local * ROWS_PER_PROGRAM + step + tl.arange(0, BLOCK_R)
        valid = (row < count)[:, None] & inside[None, :]
        offset = (first + row).to(tl.int64)[:, None] * D + column[None, :]
        mu = tl.load(mean + first + row, mask=row < count, other=0.0)
        r = tl.load(rstd + first + row, mask=row < count, other=0.0)
        g = tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        if HAS_DELTA:
            value += tl.load(delta + offset, mask=valid, other=0.0).to(tl.float32)
            value = value.to(x.dtype.element_ty).to(tl.float32)
        h = (value - mu[:, None]) * r[:, None]
        h = tl.where(valid, h, 0.0)
        dw += tl.sum(g * h, axis=0)
        db += tl.sum(g, axis=0)
        g *= w[None, :]
        mean_g = tl.sum(g, axis=1) / D
        mean_gh = tl.sum(g * h, axis=1) / D
        result = r[:, None] * (g - mean_g[:, None] - h * mean_gh[:, None])
        if HAS_DX_NEW:
            result += tl.load(dx_new + offset, mask=valid, other=0.0).to(tl.float32)
        if UPDATE_SUMS:
            update += tl.sum(result, axis=0)
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=valid)
        handed = result.to(ddelta.dtype.element_ty)
        if HAS_DDELTA:
            tl.store(ddelta + offset, handed, mask=valid)
        if q is not None:
            scaled, factor = scaled_rows(tl.where(valid, handed.to(tl.float32), 0.0), LARGEST)
            tl.store(q + offset, scaled.to(q.dtype.element_ty), mask=valid)
            tl.store(scale + first + row, factor, mask=row < count)
    own = sums + program.to(tl.int64) * (3 if UPDATE_SUMS else 2) * D + column
    tl.store(own, dw, mask=inside)
    tl.store(own + D, db, mask=inside)
    if UPDATE_SUMS:
        tl.store(own + 2 * D, update, mask=inside)


# ------------------------------------------------------------------------------------------------------- launchers


def forward_triton(
    x: Tensor,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[int],
    eps: float,
    out_dtype: torch.dtype,
    store_sum: bool,
    architecture: str,
    quantized: Quantized | None = None,
    store_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the sum; its LayerNorm; mean; rstd). `quantized`: where to write what fp8 holds of the LayerNorm; without `store_y`
    in its place."""
    width = x.shape[1]
    x_new = torch.empty_like(x) if store_sum else x.new_empty(0)
    y = torch.empty_like(x, dtype=out_dtype) if store_y else x.new_empty(0, dtype=out_dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    options = launch("stream_layer_norm_forward", architecture, out_dtype, "" if quantized is None else "fp8")
    tiles = three([triton.cdiv(n, options["BLOCK_R"]) for n in rows])
    stream_layer_norm_forward_kernel[(sum(tiles),)](
        x, delta, x_new, y, *(quantized or (None, None)), mean, rstd, *three(weights), *three(biases), *three(rows),
        tiles[0], tiles[1], eps, D=width, BLOCK_D=triton.next_power_of_2(width), HAS_DELTA=delta is not None,
        STORE_SUM=store_sum, STORE_Y=store_y, LARGEST=LARGEST_EXPONENT[VALUES], **options,
    )  # fmt: skip
    return x_new, y, mean, rstd


def backward_triton(
    dy, dx_new, x, delta, mean, rstd, weights, rows, dx_dtype, delta_dtype, updates, update_dtype, architecture,
    quantized=None,
):  # fmt: skip
    """`quantized`: where to write what fp8 holds of delta's gradient."""
    width = x.shape[1]
    dx = torch.empty_like(x, dtype=dx_dtype)
    ddelta = torch.empty_like(x, dtype=delta_dtype) if delta_dtype is not None else dx.new_empty(0)
    options = dict(launch("stream_layer_norm_backward", architecture, dy.dtype))
    apart = not options.pop("UPDATE_SUMS")
    kinds = 2 if apart or not updates else 3
    programs = three([triton.cdiv(n, options["ROWS_PER_PROGRAM"]) for n in rows])
    sums = torch.empty(sum(programs), kinds, width, dtype=torch.float32, device=dx.device)
    stream_layer_norm_backward_kernel[(sum(programs),)](
        dy, dx_new, x, delta, dx, ddelta, *(quantized or (None, None)), mean, rstd, *three(weights), sums, *three(rows),
        programs[0], programs[1], D=width, BLOCK_D=triton.next_power_of_2(width), HAS_DX_NEW=dx_new is not None,
        HAS_DELTA=delta is not None, HAS_DDELTA=delta_dtype is not None, UPDATE_SUMS=kinds == 3,
        LARGEST=LARGEST_EXPONENT[GRADIENTS], **options,
    )  # fmt: skip
    totals = sum_of_streams(sums, programs, len(rows), architecture)
    if kinds == 3:
        dupdate = torch.empty(updates, width, dtype=update_dtype, device=dx.device)
        dupdate.copy_(totals[2] if updates == len(rows) else totals[2].sum(0, keepdim=True))
    else:
        dupdate = update_sums(dx if delta_dtype is None else ddelta, rows, updates, update_dtype)
    return dx, ddelta, totals[:2], dupdate


def update_sums(ddelta: Tensor, rows: Sequence[int], updates: int, dtype: torch.dtype | None) -> Tensor:
    """The column sums of ddelta, `[updates, D]`: of each stream's rows, or of all rows; empty for 0."""
    if not updates:
        return ddelta.new_empty(0)
    return bias_gradient(ddelta, rows if updates == len(rows) else [sum(rows)], dtype)
