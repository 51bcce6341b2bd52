"""Matrix products of 8-bit floating-point numbers: rows with a scale each, and the product of two such matrices.

    q = fp8(x / s),   s[row] = the least power of two with max |x[row]| / s <= the largest fp8 number
    a b^T ~= (q_a q_b^T) * s_a s_b^T                                      [M, K], [N, K] -> [M, N]

Values and weights take e4m3 (3 bits of mantissa), gradients e5m2 (2 bits, a wider range). Every row is scaled by itself, by
what it holds now: nothing is kept from step to step. The scales are powers of two, so scaling rounds nothing, and the
product of the scaled values in bfloat16, which holds them exactly, is the product in fp8: sums in float32, rounded once.
That is how a CPU computes it, and so what it learns can be judged there.

fp8 units: NVIDIA GPUs of compute capability 8.9 and later (Ada, Hopper, Blackwell). An older GPU is an error and no
fall-back, since it would only be slower than bfloat16. On a CPU it is slower too, and allowed: for judging.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.errors import CavmaeError
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import interpreting, register

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST_EXPONENT = {VALUES: 8, GRADIENTS: 15}
"The largest number is 1.75 times two to this power."
LEAST_SCALE, LARGEST_SCALE = -120, 120
"Bounds of a scale's exponent: it and its inverse are normal numbers of float32."
CAPABILITY = (8, 9)
MULTIPLE = 16
"fp8 units take widths that are multiples of this."


class Fp8Error(CavmaeError, ValueError):
    """fp8 is asked for where it cannot be had."""

    exit_code = 2


def check_fp8(device: torch.device, *widths: int) -> None:
    """Fp8Error unless `device` has fp8 units, or is a CPU, and all `widths` of a layer are multiples of 16."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise Fp8Error(
            f"fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); {name} has {major}.{minor}"
        )
    if odd := [width for width in widths if width % MULTIPLE]:
        raise Fp8Error(f"fp8 products take widths that are multiples of {MULTIPLE}; a layer has {odd[0]}")


# ---------------------------------------------------------------------------------------------------------- quantizing


@triton.jit
def quantize_rows_kernel(
    x,  # [R, K]
    q,  # [R, K] fp8
    scale,  # [R] fp32
    R, K,
    LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr, LARGEST_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program holds BLOCK_R whole rows: they are read once. LARGEST: the exponent of the largest fp8 number."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_K)
    valid = (row < R)[:, None] & (column < K)[None, :]
    offset = row.to(tl.int64)[:, None] * K + column[None, :]
    values = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_K]
    # As integers, the bits of numbers that are not negative are in the numbers' order, and NaN comes last.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (bits >> 23) - 127 - LARGEST + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, LEAST_SCALE), LARGEST_SCALE)
    factor = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    nan = (bits | 0x7FC00000).to(tl.float32, bitcast=True)
    tl.store(scale + row, tl.where(finite, factor, nan), mask=row < R)
    scaled = values * tl.where(finite, inverse, nan)[:, None]
    tl.store(q + offset, scaled.to(q.dtype.element_ty), mask=valid)


def _quantize_triton(
    x: Tensor, dtype: torch.dtype, architecture: str, stored: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`stored`: what the scaled values are stored in, where it is not `dtype` itself."""
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=stored or dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    options = launch("quantize_rows", architecture, x.dtype)
    quantize_rows_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        x, q, scale, rows, width, LARGEST_EXPONENT[dtype], LEAST_SCALE, LARGEST_SCALE,
        BLOCK_K=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    return q, scale


def _quantize_torch(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(1, keepdim=True).float()
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1), so the power of two is one more than in IEEE's form
    exponent = exponent - 1 - LARGEST_EXPONENT[dtype] + (mantissa > 0.875)
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(LEAST_SCALE, LARGEST_SCALE))
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    return (x.float() / scale).to(dtype), scale


def _quantize_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    return "Triton's interpreter rounds to fp8 wrongly" if implementation == "triton" and interpreting() else None


quantize_rows = register(
    "quantize_rows",
    "(Tensor x, ScalarType dtype) -> (Tensor q, Tensor scale)",
    torch=_quantize_torch,
    triton=_quantize_triton,
    fake=_quantize_fake,
    limit=_limit,
)
"""x `[R, K]` -> (q `[R, K]` in `dtype`, `VALUES` or `GRADIENTS`; scales `[R, 1]` in float32, powers of two). A row that
holds NaN or an infinity is all NaN, and so is its scale."""


# ------------------------------------------------------------------------------------------------------------ products


def rounded_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What fp8 holds of x `[R, K]`, in x's dtype: the rows quantized and scaled back."""
    q, scale = quantize_rows(x, dtype)
    return q.to(x.dtype) * scale.to(x.dtype)


def product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool, bias: Tensor | None = None
) -> Tensor:
    """`a b^T + bias` of quantized a `[M, K]` and b `[N, K]`, on fp8 units -> `[M, N]` in `dtype`, which is bias's.

    `fast`: Hopper's units add up with 14 bits, which suits values with 4; else sums go to float32 every few products.
    """
    (q_a, scale_a), (q_b, scale_b) = a, b
    return F.scaled_mm(
        q_a,
        q_b.t(),
        scale_a,
        F.ScalingType.RowWise,
        scale_b.t(),
        F.ScalingType.RowWise,
        bias=bias,
        output_dtype=dtype,
        use_fast_accum=fast,
    )


def forward_products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """`x W^T + b` on fp8 units, each of the row ranges `rows` with its own weight and bias -> `[R, N]` in x's dtype."""
    ranges = zip(*(part.split(rows) for part in quantize_rows(x, VALUES)))
    parts = [
        product(of_rows, quantize_rows(w, VALUES), x.dtype, True, b.to(x.dtype))
        for of_rows, w, b in zip(ranges, weights, biases)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def backward_products(dout: Tensor, weights: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """`dout W` on fp8 units, by row range -> `[R, K]` in dout's dtype."""
    ranges = zip(*(part.split(rows) for part in quantize_rows(dout, GRADIENTS)))
    parts = [
        product(of_rows, quantize_rows(w.t().contiguous(), VALUES), dout.dtype, False) for of_rows, w in zip(ranges, weights)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
