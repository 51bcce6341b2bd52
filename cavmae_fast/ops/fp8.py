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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.errors import CavmaeError
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import interpreting, register
from cavmae_fast.ops.gelu import gelu

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


class Quantized(NamedTuple):
    """A matrix as fp8 holds it: `rows * scale`."""

    rows: Tensor
    "`[R, K]`, in `VALUES` or `GRADIENTS`."
    scale: Tensor
    "`[R, 1]`, float32."


@triton.jit
def scaled_rows(
    values,  # [BLOCK_R, BLOCK_K] fp32, zeros outside of the matrix
    LARGEST: tl.constexpr, LEAST: tl.constexpr = LEAST_SCALE, MOST: tl.constexpr = LARGEST_SCALE,
):  # fmt: skip
    """(values over their row's scale, the scales `[BLOCK_R]`). LARGEST: the exponent of the largest fp8 number."""
    # As integers, the bits of numbers that are not negative are in the numbers' order, and NaN comes last.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (bits >> 23) - 127 - LARGEST + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, LEAST), MOST)
    factor = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    nan = (bits | 0x7FC00000).to(tl.float32, bitcast=True)
    return values * tl.where(finite, inverse, nan)[:, None], tl.where(finite, factor, nan)


@triton.jit
def quantize_rows_kernel(
    x,  # [R, K]
    y,  # [R, K], or None
    q,  # [R, K] fp8
    scale,  # [R] fp32
    R, K,
    GELU: tl.constexpr, LARGEST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program holds BLOCK_R whole rows: they are read once. GELU: of y = gelu(x), as x's dtype holds it, which is
    written where there is a place for it."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_K)
    valid = (row < R)[:, None] & (column < K)[None, :]
    offset = row.to(tl.int64)[:, None] * K + column[None, :]
    values = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_K]
    if GELU:
        result = gelu(values).to(x.dtype.element_ty)
        if y is not None:
            tl.store(y + offset, result, mask=valid)
        values = result.to(tl.float32)
    scaled, factor = scaled_rows(values, LARGEST)
    tl.store(scale + row, factor, mask=row < R)
    tl.store(q + offset, scaled.to(q.dtype.element_ty), mask=valid)


def empty_quantized(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Room for what `dtype` holds of x `[R, K]`."""
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return Quantized(torch.empty(x.shape, dtype=dtype, device=x.device), scale)


def quantize_triton(x: Tensor, dtype: torch.dtype, architecture: str) -> Quantized:
    return _launch(x, None, False, dtype, architecture)


def _launch(x: Tensor, y: Tensor | None, gelu: bool, dtype: torch.dtype, architecture: str) -> Quantized:
    (rows, width), found = x.shape, empty_quantized(x, dtype)
    options = launch("quantize_rows", architecture, x.dtype, "gelu" if gelu else "")
    quantize_rows_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        x, y, *found, rows, width, gelu, LARGEST_EXPONENT[dtype], BLOCK_K=triton.next_power_of_2(width), **options
    )
    return found


def _quantize_torch(x: Tensor, dtype: torch.dtype) -> Quantized:
    largest = x.abs().amax(1, keepdim=True).float()
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1), so the power of two is one more than in IEEE's form
    exponent = exponent - 1 - LARGEST_EXPONENT[dtype] + (mantissa > 0.875)
    exponent = torch.where(largest == 0, LEAST_SCALE, exponent.clamp(LEAST_SCALE, LARGEST_SCALE))
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    return Quantized((x.float() / scale).to(dtype), scale)


def fp8_limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why a kernel that writes fp8 cannot be had."""
    return "Triton's interpreter rounds to fp8 wrongly" if implementation == "triton" and interpreting() else None


_quantize = register(
    "quantize_rows",
    "(Tensor x, ScalarType dtype) -> (Tensor q, Tensor scale)",
    torch=_quantize_torch,
    triton=quantize_triton,
    fake=lambda x, dtype: empty_quantized(x, dtype),
    limit=fp8_limit,
)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Quantized:
    """x `[R, K]` in `dtype`, `VALUES` or `GRADIENTS`, with a power of two for every row. One that holds NaN or an infinity
    is all NaN, and so is its scale."""
    return Quantized(*_quantize(x, dtype))


def dequantized(x: Quantized, dtype: torch.dtype) -> Tensor:
    """`x.rows * x.scale` in `dtype`."""
    return x.rows.to(dtype) * x.scale.to(dtype)


class Handed:
    """Where the backward pass that makes a gradient leaves what fp8 holds of it, for the product that takes this gradient:
    autograd hands on the gradient alone."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, int, Quantized] | None = None

    def put(self, gradient: Tensor, held: Quantized) -> None:
        self._found = gradient, gradient._version, held

    def take(self, gradient: Tensor) -> Quantized | None:
        """What was put for this very gradient; None where it is another one, as the sum of several is, or was changed."""
        found, self._found = self._found, None
        if found is None or found[0].data_ptr() != gradient.data_ptr() or found[0].shape != gradient.shape:
            return None
        return found[2] if found[1] == gradient._version else None


def new_handed() -> Handed | None:
    """None while a model is compiled, whose backward pass is one of tensors alone."""
    return None if torch.compiler.is_compiling() else Handed()


def handed_on(handed: Handed | None, gradient: Tensor) -> Quantized:
    """What fp8 holds of a gradient `[R, K]`: as it was handed on, or from its values."""
    return (handed and handed.take(gradient)) or quantize_rows(gradient, GRADIENTS)


# ---------------------------------------------------------------------------------------------- with the GELU before it


def _gelu_torch(pre: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = F.gelu(pre)
    q, scale = quantize_rows(y, VALUES)
    return y if keep else pre.new_empty(0), q, scale


def gelu_triton(pre: Tensor, keep: bool, architecture: str) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(pre) if keep else None
    q, scale = _launch(pre, y, True, VALUES, architecture)
    return y if keep else pre.new_empty(0), q, scale


fp8_gelu = register(
    "fp8_gelu",
    "(Tensor pre, bool keep) -> (Tensor y, Tensor q, Tensor scale)",
    torch=_gelu_torch,
    triton=gelu_triton,
    fake=lambda pre, keep: (torch.empty_like(pre) if keep else pre.new_empty(0), *empty_quantized(pre, VALUES)),
    limit=fp8_limit,
)
"""pre `[R, N]` -> (its GELU y in its dtype, or empty unless `keep`; what fp8 holds of y). 'torch' makes passes of its own of
the GELU and of what fp8 holds."""
