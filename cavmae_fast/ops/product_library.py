"""The products of csrc/products.cu: `product_kernels` for Hopper in CUDA C++, one launch for each stream, in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops import native
from cavmae_fast.ops._triton import triton

COLUMNS = 256
"Partial sums of columns are written for whole tiles of so many columns."


def product_limit(dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why the library's products do not take a call of this shape: rows, and the widths of all matrices."""
    if not native.has_products():
        return f"the CUDA library has no products; build it with CUTLASS: {native.HOW_TO_BUILD}"
    if dtype != torch.bfloat16 or any(width % 8 for width in shape[1:]):
        widths = " and ".join(map(str, shape[1:]))
        return f"the CUDA library's products take bfloat16 and widths that are multiples of 8, not {dtype} and {widths}"
    return None


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, from multiples of 16 bytes on, as TMA needs them."""
    return [t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone().contiguous() for t in tensors]


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def linear_gelu_library(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int], keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """As `product_kernels.linear_gelu_product`."""
    x, *weights = _aligned(x, *weights)
    biases = _aligned(*(bias.to(x.dtype).float() for bias in biases))
    width, depth = weights[0].shape
    y = x.new_empty(x.shape[0], width)
    pre = torch.empty_like(y) if keep_pre else x.new_empty(0)
    first = 0
    for count, weight, bias in zip(rows, weights, biases):
        part = slice(first, first + count)
        pointers = [y[part].data_ptr(), pre[part].data_ptr() if keep_pre else None, x[part].data_ptr()]
        sizes = (count, width, depth, native.DTYPES[x.dtype], _stream(x.device))
        native.call("cavmae_linear_gelu", *pointers, weight.data_ptr(), bias.data_ptr(), *sizes)
        first += count
    return y, pre


def hidden_gradient_library(
    dout: Tensor, pre: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `product_kernels.hidden_gradient_product`."""
    dout, pre, *weights = _aligned(dout, pre, *weights)
    depth, width = weights[0].shape
    dpre = torch.empty_like(pre)
    db = torch.empty(len(rows), width, dtype=bias_dtype, device=pre.device)
    tile_rows, padded = native.library().cavmae_product_tile_rows(), triton.cdiv(width, COLUMNS) * COLUMNS
    parts = (tensor.split(rows) for tensor in (dpre, dout, pre))
    for dpre_s, dout_s, pre_s, weight, db_s in zip(*parts, weights, db):
        count = len(dout_s)
        partial = torch.empty(triton.cdiv(count, tile_rows), padded, dtype=torch.float32, device=pre.device)
        pointers = [t.data_ptr() for t in (dpre_s, partial, dout_s, pre_s, weight)]
        sizes = (count, width, depth, native.DTYPES[pre.dtype], _stream(pre.device))
        native.call("cavmae_hidden_gradient", *pointers, *sizes)
        db_s.copy_(partial.sum(0)[:width])
    return dpre, db
