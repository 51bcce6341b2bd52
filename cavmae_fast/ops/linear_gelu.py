"""Linear layer of packed token streams with the exact (erf) GELU on top: the first half of a transformer's MLP.

    z = x W[s]^T + b[s],    y = gelu(z) = z Phi(z)            [R, K] -> [R, N];  s: the stream of the row

Backward, with z kept in x's dtype:

    dz = dy * (Phi(z) + z phi(z)),    dx = dz W[s],    dW[s] = dz^T x,    db[s] = sum of dz over the stream's rows

The products are `stream_linear`'s. `dgelu_bias` computes dz and the partial sums of db in one pass over dy and z; a
second small kernel adds them up in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.ops import native
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.stream_linear import (
    backward_fake,
    bias_gradient,
    check_linear,
    linear_backward,
    linear_forward,
    onednn_limit,
)
from cavmae_fast.ops.stream_tiles import pick, stream_of_tile, sum_of_streams, three

CPU_FORMS = ("onednn", "pieces")
CPU_ROWS = 256
"Rows that the form `pieces` takes at once: 3 MB in float32 at width 3072."

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _gelu_derivative(z):
    """Phi(z) + z phi(z) with one exponential for both. erfc(x) = exp(-x^2) t (a1 + t (a2 + ...)), t = 1 / (1 + p x),
    x = |z| / sqrt 2 is formula 7.1.26 of Abramowitz & Stegun: |error| <= 1.5e-7, about the spacing of fp32 at 1.

    Counted in the machine code for sm_90: the loop takes about 33 instructions per element this way and 50 with erf and
    exp. Estimated: about 40 can be hidden behind the memory traffic, so this way memory alone sets the speed."""
    gauss = tl.exp2(z * z * (-0.5 * 1.4426950408889634))
    t = 1.0 / (0.3275911 * 0.7071067811865476 * tl.abs(z) + 1.0)
    half_erfc = t * (0.5 * 1.061405429) - 0.5 * 1.453152027
    half_erfc = t * half_erfc + 0.5 * 1.421413741
    half_erfc = t * half_erfc - 0.5 * 0.284496736
    half_erfc = (t * half_erfc + 0.5 * 0.254829592) * t * gauss
    return z * 0.3989422804014327 * gauss + tl.where(z < 0, half_erfc, 1.0 - half_erfc)


@triton.jit
def dgelu_bias_kernel(
    dy, pre, dpre,  # [R, N]
    partial,  # [programs, N] fp32
    rows0, rows1, rows2, tiles0, tiles1, N,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """dpre, and the column sums of dpre over each program's ROWS_PER_PROGRAM rows, taken BLOCK_R at a time. With 128 rows
    per program the partial sums are 1/64 of a bf16 input's bytes."""
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
        g *= _gelu_derivative(z)
        tl.store(dpre + offset, g.to(dpre.dtype.element_ty), mask=valid)
        total += g
    tl.store(partial + program.to(tl.int64) * N + column, tl.sum(total, axis=0), mask=inside)


# ------------------------------------------------------------------------------------------------------- launchers


def _dgelu_bias_triton(
    dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype, architecture: str
) -> tuple[Tensor, Tensor]:
    width = pre.shape[1]
    options = launch("dgelu_bias", architecture, pre.dtype)
    programs = three([triton.cdiv(n, options["ROWS_PER_PROGRAM"]) for n in rows])
    dpre = torch.empty_like(pre)
    partial = torch.empty(sum(programs), width, dtype=torch.float32, device=pre.device)
    dgelu_bias_kernel[(sum(programs), triton.cdiv(width, options["BLOCK_N"]))](
        dy, pre, dpre, partial, *three(rows), programs[0], programs[1], width, **options
    )
    return dpre, sum_of_streams(partial, programs, len(rows), architecture).to(bias_dtype)


def _dgelu_bias_cuda(dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The kernel of csrc/dgelu_bias.cu, one launch for each stream."""
    # It reads 16 bytes at once, so it refuses a view that begins between two multiples of 16; memory of its own does not.
    dy, pre = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (dy, pre))
    dpre = torch.empty_like(pre)
    db = torch.empty(len(rows), pre.shape[1], dtype=bias_dtype, device=pre.device)
    rows_per_block = native.library().cavmae_dgelu_bias_rows_per_block()
    stream = torch.cuda.current_stream(pre.device).cuda_stream
    for dy_s, pre_s, dpre_s, db_s in zip(dy.split(rows), pre.split(rows), dpre.split(rows), db):
        count, width = pre_s.shape
        partial = torch.empty(triton.cdiv(count, rows_per_block), width, dtype=torch.float32, device=pre.device)
        pointers = [t.data_ptr() for t in (dpre_s, partial, dy_s, pre_s)]
        native.call("cavmae_dgelu_bias", *pointers, count, width, native.DTYPES[pre.dtype], stream)
        db_s.copy_(partial.sum(0))
    return dpre, db


def _limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """The CUDA library takes rows that are whole multiples of 16 bytes, in its own dtypes."""
    if implementation in CPU_FORMS:
        return onednn_limit(implementation, dtype)
    if implementation == "cuda" and (dtype not in native.DTYPES or shape[1] * dtype.itemsize % 16):
        return f"the CUDA library takes no rows of {shape[1]} values in {dtype}: they must be multiples of 16 bytes"
    return None


def _forward_torch(x, weights, biases, rows, keep_pre, fp8=False, onednn=False):
    pre = linear_forward(x, weights, biases, rows, fp8, onednn)
    if keep_pre:
        return F.gelu(pre), pre
    return torch.ops.aten.gelu_(pre), x.new_empty(0)


def _dgelu_bias_torch(dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dpre = torch.ops.aten.gelu_backward(dy, pre)
    return dpre, bias_gradient(dpre, rows, bias_dtype)


def _dgelu_bias_pieces(dy: Tensor, pre: Tensor, rows: Sequence[int], bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, `CPU_ROWS` rows at a time: the sum over them finds them in the cache."""
    dpre = torch.empty_like(pre)
    db = torch.zeros(len(rows), pre.shape[1], dtype=torch.promote_types(pre.dtype, torch.float32), device=pre.device)
    for dy_s, pre_s, dpre_s, db_s in zip(dy.split(rows), pre.split(rows), dpre.split(rows), db):
        for piece, pre_piece, to in zip(dy_s.split(CPU_ROWS), pre_s.split(CPU_ROWS), dpre_s.split(CPU_ROWS)):
            torch.ops.aten.gelu_backward.grad_input(piece, pre_piece, grad_input=to)
            db_s.add_(to.sum(0, dtype=db.dtype))
    return dpre, db.to(bias_dtype)


def _backward(dgelu_bias, dy, pre, x, weights, rows, bias_dtype, needs_dx, fp8=False, onednn=False, **options):
    dpre, db = dgelu_bias(dy, pre, rows, bias_dtype, **options)
    return *linear_backward(dpre, x, weights, rows, needs_dx, fp8, onednn), db


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(x, weights, biases, rows, keep_pre, fp8=False):
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    return y, torch.empty_like(y) if keep_pre else x.new_empty(0)


forward_operator = register(
    "linear_gelu",
    "(Tensor x, Tensor[] weights, Tensor[] biases, SymInt[] rows, bool keep_pre, bool fp8=False) -> (Tensor y, Tensor pre)",
    torch=_forward_torch,
    forms={"onednn": partial(_forward_torch, onednn=True), "pieces": _forward_torch},
    fake=_forward_fake,
)
backward_operator = register(
    "linear_gelu_backward",
    "(Tensor dy, Tensor pre, Tensor x, Tensor[] weights, SymInt[] rows, ScalarType bias_dtype, bool needs_dx,"
    " bool fp8=False) -> (Tensor dx, Tensor dw, Tensor db)",
    torch=partial(_backward, _dgelu_bias_torch),
    triton=partial(_backward, _dgelu_bias_triton),
    cuda=partial(_backward, _dgelu_bias_cuda),
    forms={
        "onednn": partial(_backward, _dgelu_bias_torch, onednn=True),
        "pieces": partial(_backward, _dgelu_bias_pieces),
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
