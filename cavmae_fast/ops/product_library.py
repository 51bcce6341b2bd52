"""The products of csrc/: `product_kernels` in CUDA C++, in bfloat16, for Ampere, Hopper and their relatives."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops import native
from cavmae_fast.ops._triton import triton
from cavmae_fast.ops.native import aligned, current_stream, device_limit

COLUMNS = 256
"Partial sums of columns are written for whole tiles of so many columns."


def product_limit(dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why the library's products do not take a call of this shape: rows, and the widths of all matrices."""
    return _dtype_limit(dtype, shape) or device_limit((8, 9, 12))


def weight_gradient_limit(dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """The same of the weight gradient, which is for Hopper alone."""
    return _dtype_limit(dtype, shape) or device_limit((9,))


def _dtype_limit(dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    if dtype != torch.bfloat16 or any(width % 8 for width in shape[1:]):
        widths = " and ".join(map(str, shape[1:]))
        return f"the CUDA library's products take bfloat16 and widths that are multiples of 8, not {dtype} and {widths}"
    return None


def linear_gelu_library(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int], keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """As `product_kernels.linear_gelu_product`."""
    x, *weights = aligned(x, *weights)
    biases = aligned(*(bias.to(x.dtype).float() for bias in biases))
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    pre = torch.empty_like(y) if keep_pre else x.new_empty(0)
    addresses = [y.data_ptr(), pre.data_ptr() if keep_pre else None, x.data_ptr()]
    per_stream = [native.pointers(weights), native.pointers(biases), native.sizes(rows), len(rows)]
    native.call(
        "cavmae_linear_gelu", *addresses, *per_stream, *weights[0].shape, native.DTYPES[x.dtype], current_stream(x.device)
    )
    return y, pre


def hidden_gradient_library(
    dout: Tensor, pre: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `product_kernels.hidden_gradient_product`."""
    dout, pre, *weights = aligned(dout, pre, *weights)
    depth, width = weights[0].shape
    dpre = torch.empty_like(pre)
    tiles = [triton.cdiv(count, native.library().cavmae_product_tile_rows()) for count in rows]
    partial = torch.empty(sum(tiles), triton.cdiv(width, COLUMNS) * COLUMNS, dtype=torch.float32, device=pre.device)
    addresses = [tensor.data_ptr() for tensor in (dpre, partial, dout, pre)]
    sizes = (native.sizes(rows), len(rows), width, depth, native.DTYPES[pre.dtype], current_stream(pre.device))
    native.call("cavmae_hidden_gradient", *addresses, native.pointers(weights), *sizes)
    return dpre, torch.stack([part.sum(0)[:width] for part in partial.split(tiles)]).to(bias_dtype)


def weight_gradient_library(
    dout: Tensor, x: Tensor, rows: Sequence[int], bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """As the operator `weight_gradient`."""
    dout, x = aligned(dout, x)
    width, depth = dout.shape[1], x.shape[1]
    dw = x.new_empty(len(rows), width, depth)
    db = torch.empty(len(rows), width, dtype=torch.float32, device=x.device) if bias_dtype else None
    sizes = (native.sizes(rows), len(rows), width, depth)
    needed = ctypes.c_int64()
    native.call("cavmae_weight_gradient_workspace", ctypes.byref(needed), *sizes)
    workspace = torch.empty(needed.value, dtype=torch.uint8, device=x.device)
    results = (dw.data_ptr(), db.data_ptr() if db is not None else None, workspace.data_ptr(), needed.value)
    options = (native.DTYPES[x.dtype], current_stream(x.device))
    native.call("cavmae_weight_gradient", *results, dout.data_ptr(), x.data_ptr(), *sizes, *options)
    return dw, x.new_empty(0) if db is None else db.to(bias_dtype)
