"""The gradient through bias and erf GELU in one pass over memory, in the forms of PyTorch and Triton.

    dz = dy * (Phi(z) + z phi(z)),    db[s] = sum of dz over the stream's rows              [R, N], [R, N] -> [R, N]

Each function takes (dy, pre, rows, bias dtype) and returns (dz in pre's dtype, db `[streams, N]`). The kernels make partial
sums of db while they go through dy and z, and a second small kernel adds these up in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import Launch, launch
from cavmae_fast.ops.fp8 import GRADIENTS, LARGEST_EXPONENT, Quantized, empty_quantized, scaled_rows
from cavmae_fast.ops.gelu import gelu_derivative
from cavmae_fast.ops.linear_products import bias_gradient
from cavmae_fast.ops.stream_tiles import pick, stream_of_tile, sum_of_streams, three

CPU_ROWS = 256
"Rows that `dgelu_bias_pieces` takes at once: 3 MB in float32 at width 3072."


@triton.jit
def dgelu_bias_kernel(
    dy, pre, dpre,  # [R, N]
    q,  # [R, N] fp8, or None
    scale,  # [R] fp32, or None
    partial,  # [programs, N] fp32
    rows0, rows1, rows2, tiles0, tiles1, N,
    LARGEST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """dpre, and the column sums of dpre over each program's ROWS_PER_PROGRAM rows, taken BLOCK_R at a time. With 128 rows
    per program the partial sums are 1/64 of a bf16 input's bytes. With q what fp8 holds of dpre is written, too; a program
    then has whole rows. LARGEST: as in `scaled_rows`."""
    program = tl.program_id(0)
    stream, local = stream_of_tile(program, tiles0, tiles1)
    first = pick(stream, 0, rows0, rows0 + rows1)
    count = pick(stream, rows0, rows1, rows2)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    total = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for step in range(0, ROWS_PER_PROGRAM, BLOCK_R):
        row = local * ROWS_PER_PROGRAM + step + tl.arange(0, BLOCK_R)
        valid = (row < count)[:, None] & inside[None, :]
        offset = (first + row).to(tl.int64)[:, None] * N + column[None, :]
        z = tl.load(pre + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_N]
        g = tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32)
        g *= gelu_derivative(z)
        rounded = g.to(dpre.dtype.element_ty)
        tl.store(dpre + offset, rounded, mask=valid)
        if q is not None:
            scaled, factor = scaled_rows(rounded.to(tl.float32), LARGEST)
            tl.store(q + offset, scaled.to(q.dtype.element_ty), mask=valid)
            tl.store(scale + first + row, factor, mask=row < count)
        total += g
    tl.store(partial + program.to(tl.int64) * N + column, tl.sum(total, axis=0), mask=inside)


# ------------------------------------------------------------------------------------------------------- launchers


def dgelu_bias_triton(
    dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype, architecture: str
) -> tuple[Tensor, Tensor]:
    options = launch("dgelu_bias", architecture, pre.dtype, "part")
    return _launch(dy, pre, rows, bias_dtype, None, options, architecture)


def dgelu_bias_quantized(
    dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype, architecture: str
) -> tuple[Tensor, Tensor, Quantized]:
    """dz and db, and what fp8 holds of dz."""
    quantized = empty_quantized(pre, GRADIENTS)
    width = triton.next_power_of_2(pre.shape[1])
    options = {"BLOCK_N": width, **launch("dgelu_bias", architecture, pre.dtype, "whole")}
    return *_launch(dy, pre, rows, bias_dtype, quantized, options, architecture), quantized


def _launch(
    dy: Tensor,
    pre: Tensor,
    rows: Sequence[int],
    bias_dtype: torch.dtype,
    quantized: Quantized | None,
    options: Launch,
    architecture: str,
) -> tuple[Tensor, Tensor]:
    width, dpre = pre.shape[1], torch.empty_like(pre)
    programs = three([triton.cdiv(n, options["ROWS_PER_PROGRAM"]) for n in rows])
    partial = torch.empty(sum(programs), width, dtype=torch.float32, device=pre.device)
    dgelu_bias_kernel[(sum(programs), triton.cdiv(width, options["BLOCK_N"]))](
        dy, pre, dpre, *(quantized or (None, None)), partial, *three(rows), programs[0], programs[1], width,
        LARGEST=LARGEST_EXPONENT[GRADIENTS], **options,
    )  # fmt: skip
    return dpre, sum_of_streams(partial, programs, len(rows), architecture).to(bias_dtype)


def dgelu_bias_torch(dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dpre = torch.ops.aten.gelu_backward(dy, pre)
    return dpre, bias_gradient(dpre, rows, bias_dtype)


def dgelu_bias_pieces(dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, `CPU_ROWS` rows at a time: the sum over them finds them in the cache."""
    dpre = torch.empty_like(pre)
    db = torch.zeros(len(rows), pre.shape[1], dtype=torch.promote_types(pre.dtype, torch.float32), device=pre.device)
    for dy_s, pre_s, dpre_s, db_s in zip(dy.split(rows), pre.split(rows), dpre.split(rows), db):
        for piece, pre_piece, to in zip(dy_s.split(CPU_ROWS), pre_s.split(CPU_ROWS), dpre_s.split(CPU_ROWS)):
            torch.ops.aten.gelu_backward.grad_input(piece, pre_piece, grad_input=to)
            db_s.add_(to.sum(0, dtype=db.dtype))
    return dpre, db.to(bias_dtype)
