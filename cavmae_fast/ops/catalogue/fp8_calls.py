"""How a case of each operator of fp8 is made (`ops/fp8.py`). What is in fp8 is compared as values, in the others' dtype.

Products are given matrices that they quantize first: their time has that of `quantize_rows` in it, for all candidates alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.ops.catalogue.case import Case, Draw, of_first, rounded, size
from cavmae_fast.ops.fp8 import GRADIENTS, VALUES, Quantized, dequantized, fp8_gelu, new_handed, quantize_rows
from cavmae_fast.ops.fp8_products import fp8_hidden_gradient, fp8_input_gradient, fp8_linear
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.stream_layer_norm import quantized_layer_norm
from cavmae_fast.reference import operators as reference


def block(name: str, layout: StreamLayout, width: int, *, shared: bool) -> list[tuple[Case, float]]:
    """What a transformer block of `width` calls in fp8 in a training step, and how often. `shared`: one set of weights for
    all streams. A product that is not among them counts as its share, by operations, of one that is: qkv, proj and fc2 of
    fc1."""
    wide = 4 * width
    return [
        (
            quantized(name, layout.rows, width),
            6.0,
        ),  # what attention takes and gives back (3), gives, and both updates' gradients
        (norm(name, layout, width), 2.0),
        (linear(f"{name}-fc1", layout, width, wide, shared=shared), 3.0),
        (linear(f"{name}-fc1-gradient", layout, width, wide, shared=shared, gradient=True), 2.0),
        (activation(name, layout.rows, wide), 1.0),
        (hidden(name, layout, width, wide, shared=shared), 1.0),
    ]


def quantized(name: str, rows: int, width: int) -> Case:
    """What fp8 holds of an activation."""

    def moved(x):
        return size(x) + x.numel() + 4 * rows, 0

    return Case(
        "quantize_rows",
        name,
        ours=lambda x: dequantized(quantize_rows(x, VALUES), x.dtype),
        reference=reference.fp8_rows,
        baseline=rounded(reference.fp8_rows, of_first),
        draw=lambda d: [_low(d, rows, width)],
        moved=moved,
        differentiable=False,
    )


def norm(name: str, layout: StreamLayout, width: int) -> Case:
    """A LayerNorm of an updated stream for an fp8 product, which hands on the update's gradient in fp8."""

    def draw(d: Draw) -> list:
        weights, biases = ([d.full(width, shift=shift) for _ in layout.lengths] for shift in (1.0, 0.0))
        return [d.full(layout.rows, width), d.low(layout.rows, width), weights, biases, d.dtype]

    def ours(x, delta, weights, biases, dtype):
        x, y, held = quantized_layer_norm(x, delta, weights, biases, layout, 1e-5, dtype, handed=new_handed())
        return x, y, dequantized(held, dtype)

    def plain(x, delta, weights, biases, dtype):
        x, y = reference.stream_layer_norm(x, delta, weights, biases, layout.rows_per_stream)
        y = y if y.dtype == torch.float64 else y.to(dtype)
        return x, y, reference.fp8_rows(y.detach())

    def explicit(x, delta, weights, biases, dtype):
        x, y = reference.stream_layer_norm(x, delta.float(), weights, biases, layout.rows_per_stream)
        y = y.to(dtype)
        return x, y, reference.fp8_rows(y.detach().float()).to(dtype)

    def moved(x, delta, weights, biases, dtype):
        y, held = x.numel() * dtype.itemsize, x.numel() + 4 * layout.rows
        return 2 * size(x) + size(delta) + y + held, 3 * size(x) + size(delta) + y + held

    return Case("fp8_layer_norm", name, ours=ours, reference=plain, baseline=explicit, draw=draw, moved=moved)


def linear(name: str, layout: StreamLayout, k: int, n: int, *, shared: bool, gradient: bool = False) -> Case:
    """A layer k -> n, or with `gradient` its input's gradient n -> k. `shared`: one weight for all streams."""
    rows = [layout.rows] if shared else layout.rows_per_stream

    def draw(d: Draw) -> list:
        weights = [(d.fixed(n, k) * k**-0.5).to(d.dtype) for _ in rows]
        return [_low(d, layout.rows, n if gradient else k), weights, [] if gradient else [_low(d, n) for _ in rows]]

    def ours(x, weights, biases):
        if gradient:
            return fp8_input_gradient(quantize_rows(x, GRADIENTS), weights, rows, x.dtype)
        return fp8_linear(quantize_rows(x, VALUES), weights, biases, rows, x.dtype)

    def plain(x, weights, biases):
        held = reference.fp8_rows(x, gradients=gradient).split(rows)
        if gradient:
            return torch.cat([part @ reference.fp8_rows(w.t()).t() for part, w in zip(held, weights)])
        return torch.cat([F.linear(part, reference.fp8_rows(w), b) for part, w, b in zip(held, weights, biases)])

    def moved(x, weights, biases):
        held = x.numel() + 4 * layout.rows + sum(w.numel() + 4 * len(w) for w in weights)
        return size(x, *weights) + 2 * held + layout.rows * (k if gradient else n) * x.element_size(), 0

    return Case(
        "fp8_product",
        name,
        ours=ours,
        reference=plain,
        baseline=rounded(plain, of_first),
        draw=draw,
        moved=moved,
        forward_flops=2.0 * layout.rows * k * n,
        differentiable=False,
    )


def activation(name: str, rows: int, width: int) -> Case:
    """A GELU for an fp8 product."""

    def ours(pre):
        y, *held = fp8_gelu(pre, True)
        return y, dequantized(Quantized(*held), pre.dtype)

    def plain(pre):
        y = F.gelu(pre)
        return y, reference.fp8_rows(y)

    def explicit(pre):
        y = F.gelu(pre.float()).to(pre.dtype)
        return y, reference.fp8_rows(y.float()).to(pre.dtype)

    return Case(
        "fp8_gelu",
        name,
        ours=ours,
        reference=plain,
        baseline=explicit,
        draw=lambda d: [_low(d, rows, width)],
        moved=lambda pre: (2 * size(pre) + pre.numel() + 4 * rows, 0),
        differentiable=False,
    )


def hidden(name: str, layout: StreamLayout, k: int, n: int, *, shared: bool) -> Case:
    """The backward pass of a GELU of width n and the fp8 layer n -> k behind it, for the fp8 layer before it."""
    rows = [layout.rows] if shared else layout.rows_per_stream

    def draw(d: Draw) -> list:
        weights = [(d.fixed(k, n) * k**-0.5).to(d.dtype) for _ in rows]
        return [_low(d, layout.rows, k), _low(d, layout.rows, n), weights]

    def ours(dout, pre, weights):
        held = quantize_rows(dout, GRADIENTS)
        dpre, db, held, y = fp8_hidden_gradient(held, pre, weights, rows, torch.float32, again=True)
        return dpre, db, dequantized(held, pre.dtype), y

    def of_held(dout, weights):
        return reference.fp8_rows(dout, gradients=True), [reference.fp8_rows(w.t()).t() for w in weights]

    def plain(dout, pre, weights):
        held, matrices = of_held(dout, weights)
        dpre, db = reference.hidden_gradient(held, pre, matrices, rows)
        return dpre, db, reference.fp8_rows(dpre, gradients=True), F.gelu(pre)

    def in_passes(dout, pre, weights):
        # The product hands its result on, rounded, to the GELU's derivative, and that to the sums and to fp8.
        held, matrices = of_held(dout.float(), [w.float() for w in weights])
        dy = torch.cat([part @ w for part, w in zip(held.split(rows), matrices)]).to(pre.dtype)
        dpre = torch.ops.aten.gelu_backward(dy.float(), pre.float()).to(pre.dtype).float()
        db = torch.stack([part.sum(0) for part in dpre.split(rows)])
        held = reference.fp8_rows(dpre, gradients=True).to(pre.dtype)
        return dpre.to(pre.dtype), db, held, F.gelu(pre.float()).to(pre.dtype)

    def moved(dout, pre, weights):
        held = dout.numel() + 4 * layout.rows + sum(w.numel() for w in weights)
        return size(dout, *weights) + 2 * held + 3 * size(pre) + pre.numel() + 4 * len(rows) * n, 0

    return Case(
        "fp8_hidden_gradient",
        name,
        ours=ours,
        reference=plain,
        baseline=in_passes,
        draw=draw,
        moved=moved,
        forward_flops=2.0 * layout.rows * k * n,
        differentiable=False,
    )


def _low(d: Draw, *shape: int) -> Tensor:
    return d.fixed(*shape).to(d.dtype)
