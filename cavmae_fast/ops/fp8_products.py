"""Products of what fp8 holds (`fp8.py`), for packed token streams: those of linear layers and of their inputs' gradients.

    y = (q_x s_x) (q_w s_w)^T + b               [R, K], [N, K] -> [R, N]

A layer multiplies its input by its weight, both in e4m3, and its gradient in e5m2 by the transposed weight, whose rows have
scales of their own. Gradients of weights are products of bfloat16 (`linear_products.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast import compat
from cavmae_fast.ops.dgelu_bias import dgelu_bias_quantized, dgelu_bias_torch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.fp8 import GRADIENTS, VALUES, Quantized, dequantized, empty_quantized, fp8_limit, quantize_rows
from cavmae_fast.ops.linear_products import input_gradient, linear_forward
from cavmae_fast.ops.product_kernels import fp8_hidden_gradient_product, fp8_product_triton


def has_units(device: torch.device) -> bool:
    """Whether products are made on fp8 units; `check_fp8` lets pass no GPU without them."""
    return device.type == "cuda"


def on_units(a: Quantized, b: Quantized, bias: Tensor | None, out: Tensor) -> None:
    """`a b^T + bias` of a `[M, K]` and b `[N, K]`, on fp8 units, into out `[M, N]`, whose dtype is bias's.

    Hopper's units add up with 14 bits, which suits values with 4; sums of gradients go to float32 every few products.
    """
    compat.scaled_mm(a.rows, b.rows, a.scale, b.scale, bias, out, fast=a.rows.dtype == VALUES)


def _product_torch(x, scale, weights, scales, biases, rows, dtype):
    if not has_units(x.device):  # the same arithmetic in `dtype`, which holds all numbers exactly
        values = dequantized(Quantized(x, scale), dtype)
        weights = [dequantized(Quantized(*w), dtype) for w in zip(weights, scales)]
        if biases:
            return linear_forward(values, weights, biases, rows)
        return input_gradient(values, [w.t() for w in weights], rows)
    parts = [Quantized(*part) for part in zip(x.split(rows), scale.split(rows))]
    matrices = [Quantized(*w) for w in zip(weights, scales)]
    biases = [b.to(dtype) for b in biases] or [None] * len(weights)
    out = torch.empty(len(x), len(weights[0]), dtype=dtype, device=x.device)
    for each in zip(parts, matrices, biases, out.split(rows)):
        on_units(*each)
    return out


_product = register(
    "fp8_product",
    "(Tensor x, Tensor scale, Tensor[] weights, Tensor[] scales, Tensor[] biases, SymInt[] rows, ScalarType dtype)"
    " -> Tensor",
    torch=_product_torch,
    kernels={"triton product": fp8_product_triton},
    dtype=lambda *args: args[-1],
    fake=lambda x, scale, weights, scales, biases, rows, dtype: x.new_empty(len(x), len(weights[0]), dtype=dtype),
)


def _split(weights: Sequence[Quantized]) -> tuple[list[Tensor], list[Tensor]]:
    return [w.rows for w in weights], [w.scale for w in weights]


def _values(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return _split([quantize_rows(w, VALUES) for w in weights])


def _transposed(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return _split([quantize_rows(w.t().contiguous(), VALUES) for w in weights])


def fp8_linear(
    x: Quantized, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`x W^T + b`, each of the row ranges `rows` with its own weight `[N, K]` and bias -> `[R, N]` in `dtype`."""
    return _product(*x, *_values(weights), list(biases), rows, dtype)


def fp8_input_gradient(dout: Quantized, weights: Sequence[Tensor], rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`dout W`, by row range -> `[R, K]` in `dtype`."""
    return _product(*dout, *_transposed(weights), [], rows, dtype)


# ------------------------------------------------------------------------------------- the gradient of an MLP's hidden layer


def _hidden_torch(dout, scale, pre, weights, scales, rows, bias_dtype, again):
    dy = _product(dout, scale, weights, scales, [], rows, pre.dtype)
    dpre, db = dgelu_bias_torch(dy, pre, rows, bias_dtype)
    return dpre, db, *quantize_rows(dpre, GRADIENTS), F.gelu(pre) if again else pre.new_empty(0)


def _hidden_triton(dout, scale, pre, weights, scales, rows, bias_dtype, again, architecture):
    dy = _product(dout, scale, weights, scales, [], rows, pre.dtype)
    y = torch.empty_like(pre) if again else None
    dpre, db, quantized = dgelu_bias_quantized(dy, pre, rows, bias_dtype, y, architecture)
    return dpre, db, *quantized, y if again else pre.new_empty(0)


def _hidden_product(dout, scale, pre, weights, scales, rows, bias_dtype, again, architecture):
    dpre, db = fp8_hidden_gradient_product(dout, scale, pre, weights, scales, rows, bias_dtype, architecture)
    return dpre, db, *quantize_rows(dpre, GRADIENTS), F.gelu(pre) if again else pre.new_empty(0)


def _hidden_fake(dout, scale, pre, weights, scales, rows, bias_dtype, again):
    db = pre.new_empty(len(weights), pre.shape[1], dtype=bias_dtype)
    y = torch.empty_like(pre) if again else pre.new_empty(0)
    return torch.empty_like(pre), db, *empty_quantized(pre, GRADIENTS), y


_hidden = register(
    "fp8_hidden_gradient",
    "(Tensor dout, Tensor scale, Tensor pre, Tensor[] weights, Tensor[] scales, SymInt[] rows, ScalarType bias_dtype,"
    " bool again) -> (Tensor dpre, Tensor db, Tensor q, Tensor q_scale, Tensor y)",
    torch=_hidden_torch,
    triton=_hidden_triton,
    kernels={"triton product": _hidden_product},
    dtype=lambda dout, scale, pre, *_: pre.dtype,
    limit=fp8_limit,
    fake=_hidden_fake,
)


def fp8_hidden_gradient(
    dout: Quantized,
    pre: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[int],
    bias_dtype: torch.dtype,
    *,
    again: bool = False,
) -> tuple[Tensor, Tensor, Quantized, Tensor]:
    """`hidden_gradient` of what fp8 holds of dout `[R, M]` and of the weights `[M, N]` -> (dpre `[R, N]`, db, what fp8 holds
    of dpre, the GELU of pre, or empty unless it is to be formed `again`). 'triton' quantizes in the
    pass of the GELU's derivative; 'triton product' takes the derivative in the product, which leaves a pass to quantize."""
    dpre, db, q, scale, y = _hidden(*dout, pre, *_transposed(weights), rows, bias_dtype, again)
    return dpre, db, Quantized(q, scale), y
