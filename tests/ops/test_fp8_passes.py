"""Kernels that write fp8 as they go: the same bits as the pass alone with a pass to quantize behind it.

So the CPU, which makes the two passes, computes what a GPU computes in one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import configuration, dgelu_bias, fp8, layer_norm_kernels, product_kernels
from cavmae_fast.ops.parity import poisoned_allocations
from tests.ops.rounding import exact_rounding

TARGET = "sm_90"
#: rows of each stream, width
SHAPES = [([1], 1), ([5, 7, 12], 33), ([70, 3], 96), ([9], 128)]
DTYPES = [torch.bfloat16, torch.float16]
BROKEN = [float("nan"), float("inf"), -float("inf")]
CASES = [(shape, dtype, None) for shape in SHAPES for dtype in DTYPES] + [(SHAPES[1], DTYPES[0], value) for value in BROKEN]


def draw(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of several sizes; one of zeros where there are some."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x *= torch.tensor([1.0, 1e-3, 30.0]).repeat(rows)[:rows].unsqueeze(1)
    x[3:4] = 0
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def assert_quantized(got: fp8.Quantized, values: Tensor, dtype: torch.dtype) -> None:
    """`got` is what PyTorch quantizes `values` to."""
    want = fp8.quantize_rows(values, dtype)
    assert got.rows.dtype == dtype
    assert torch.equal(got.scale.isnan(), want.scale.isnan()) and torch.equal(got.rows.isnan(), want.rows.isnan())
    finite = ~want.scale.isnan().flatten()
    assert torch.equal(bits(got.scale)[finite], bits(want.scale)[finite])
    assert torch.equal(bits(got.rows)[finite], bits(want.rows)[finite])


@pytest.fixture(autouse=True)
def rounding():
    with exact_rounding():
        yield


def norm(rows: list[int], width: int, dtype: torch.dtype, broken: float | None, quantized: bool, store_y: bool = True):
    x = draw(sum(rows), width, 1)
    if broken is not None:
        x[-1, width // 2] = broken
    weights = [draw(1, width, 10 + i)[0] for i in range(len(rows))]
    biases = [draw(1, width, 20 + i)[0] for i in range(len(rows))]
    weights[0], biases[0] = weights[0] * 0, biases[0] * 0  # its rows are zeros
    room = fp8.empty_quantized(x, fp8.VALUES) if quantized else None
    delta = draw(sum(rows), width, 2, dtype)
    with poisoned_allocations():
        results = layer_norm_kernels.forward_triton(
            x, delta, weights, biases, rows, 1e-5, dtype, True, TARGET, room, store_y
        )
    return results, room


@pytest.mark.parametrize(("shape", "dtype", "broken"), CASES, ids=str)
def test_layer_norm(shape, dtype, broken):
    alone, _ = norm(*shape, dtype, broken, quantized=False)
    beside, quantized = norm(*shape, dtype, broken, quantized=True)
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_quantized(quantized, alone[1], fp8.VALUES)
    without, quantized = norm(*shape, dtype, broken, quantized=True, store_y=False)
    assert without[1].numel() == 0 and without[1].dtype == dtype
    assert_quantized(quantized, alone[1], fp8.VALUES)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("shape", "dtype", "broken"), CASES, ids=str)
def test_layer_norm_backward(shape, dtype, broken, narrow):
    """Of the update's gradient, which is a tensor of its own, or with a narrow residual gradient the stream's."""
    (rows, width), results = shape, []
    x, dy = draw(sum(rows), width, 1), draw(sum(rows), width, 2, dtype)
    dx_new = draw(sum(rows), width, 3, dtype if narrow else torch.float32)
    if broken is not None:
        dx_new[-1, 0] = broken
    mean, rstd = x.mean(1), 1 / (x.std(1, correction=0) + 1)
    weights, quantized = [draw(1, width, 4 + i)[0] for i in range(len(rows))], fp8.empty_quantized(x, fp8.GRADIENTS)
    kinds = (dtype, None) if narrow else (torch.float32, dtype)
    for room in (None, quantized):
        arguments = (dy, dx_new, x, None, mean, rstd, weights, rows, *kinds, 1, torch.float32, TARGET)
        with poisoned_allocations():
            results.append(layer_norm_kernels.backward_triton(*arguments, room))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_quantized(quantized, results[0][0 if narrow else 1], fp8.GRADIENTS)


@pytest.mark.parametrize(("shape", "dtype", "broken"), CASES, ids=str)
def test_gelu(shape, dtype, broken):
    rows, width = shape
    pre = draw(sum(rows), width, 3, dtype)
    if broken is not None:
        pre[-1, 0] = broken
    with poisoned_allocations():
        y, *quantized = fp8.gelu_triton(pre, True, TARGET)
        nothing, *without = fp8.gelu_triton(pre, False, TARGET)
    # The two error functions differ in the last bits of float32: a value between two is rounded either way, and in the tail,
    # where 1 + erf is the difference of two numbers near 1, half of |z| <= 6 times these bits is left.
    tail = 3 * 2 * torch.finfo(torch.float32).eps
    finite, want = pre.isfinite(), torch.nn.functional.gelu(pre)  # of infinity, PyTorch's is NaN in some places
    torch.testing.assert_close(y[finite], want[finite], rtol=torch.finfo(dtype).eps, atol=tail)
    assert nothing.numel() == 0
    for found in (quantized, without):
        assert_quantized(fp8.Quantized(*found), y, fp8.VALUES)


@pytest.mark.parametrize(("shape", "dtype", "broken"), CASES, ids=str)
def test_gelu_backward(shape, dtype, broken):
    rows, width = shape
    dy, pre = draw(sum(rows), width, 4, dtype), draw(sum(rows), width, 5, dtype)
    if broken is not None:
        dy[-1, 0] = broken
    with poisoned_allocations():
        alone, db = dgelu_bias.dgelu_bias_triton(dy, pre, rows, torch.float32, TARGET)
        y = torch.empty_like(pre)
        beside, db_beside, quantized = dgelu_bias.dgelu_bias_quantized(dy, pre, rows, torch.float32, y, TARGET)
        again, _, _ = fp8.gelu_triton(pre, True, TARGET)
    assert torch.equal(bits(y), bits(again))
    torch.testing.assert_close(alone, beside, rtol=0, atol=0, equal_nan=True)
    # Sums in another order.
    room = sum(rows) * torch.finfo(torch.float32).eps * alone.float().abs().nan_to_num(0, 0, 0).sum(0)
    assert ((db - db_beside).abs() <= room)[db.isfinite()].all() and torch.equal(db.isfinite(), db_beside.isfinite())
    assert_quantized(quantized, alone, fp8.GRADIENTS)


# ------------------------------------------------------------------------------------------------------------ products

#: rows of each stream, widths of what is multiplied and of the result
PRODUCTS = [([1], 16, 16), ([5, 7, 12], 48, 80), ([70, 3], 96, 144)]
LAUNCHES = {
    "as it is": {},
    "small": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 2},
    "halves": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "HALVES": True, "FLATTEN": True},
}


def launched(changes: dict) -> dict:
    known = configuration.read(configuration.shipped_file(TARGET))["launches"]["stream_product"]
    changed = {case: options | changes for case, options in known.items() if case.startswith("8-bit")}
    return {"implementations": {}, "launches": {"stream_product": changed}}


def factors(shape: tuple, dtype: torch.dtype, broken: bool) -> tuple[fp8.Quantized, list[Tensor], list[Tensor], Tensor]:
    """x in fp8, weights with their scales, and the product of x and the weights in float64."""
    rows, k, n = shape
    x = draw(sum(rows), k, 6)
    if broken:
        x[-1, 0] = float("nan")
    x, weights = fp8.quantize_rows(x, dtype), [fp8.quantize_rows(draw(n, k, 7 + i), fp8.VALUES) for i in range(len(rows))]
    exact = fp8.dequantized(x, torch.float64).split(rows)
    product = torch.cat([part @ fp8.dequantized(w, torch.float64).t() for part, w in zip(exact, weights)])
    return x, [w.rows for w in weights], [w.scale for w in weights], product


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("dtype", [fp8.VALUES, fp8.GRADIENTS], ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_product(shape, dtype, launch):
    """Exact sums but for float32's rounding, then one rounding to the result's dtype; a row of NaN stays one."""
    rows, _, n = shape
    x, weights, scales, exact = factors(shape, dtype, broken=True)
    biases = [draw(1, n, 8 + i)[0] for i in range(len(rows))] if dtype == fp8.VALUES else []
    for bias, part in zip(biases, exact.split(rows)):
        part += bias.bfloat16().double()
    with poisoned_allocations(), configuration.trial(launched(launch)):
        out = product_kernels.fp8_product_triton(*x, weights, scales, biases, rows, torch.bfloat16, TARGET)
    assert out.dtype == torch.bfloat16 and out[-1].isnan().all()
    size = exact[:-1].abs().amax(1, keepdim=True)
    assert ((out[:-1] - exact[:-1]).abs() <= 2**-8 * exact[:-1].abs() + 2**-18 * size).all()


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_hidden_gradient(shape, launch):
    rows, _, n = shape
    dout, weights, scales, exact = factors(shape, fp8.GRADIENTS, broken=False)
    pre = draw(sum(rows), n, 9, torch.bfloat16)
    exact = torch.ops.aten.gelu_backward(exact, pre.double())
    with poisoned_allocations(), configuration.trial(launched(launch)):
        dpre, db = product_kernels.fp8_hidden_gradient_product(*dout, pre, weights, scales, rows, torch.float32, TARGET)
    size = exact.abs().amax(1, keepdim=True)
    assert ((dpre - exact).abs() <= 2**-8 * exact.abs() + 2**-16 * size).all()
    sums = torch.stack([part.sum(0) for part in exact.split(rows)])
    room = torch.stack([part.abs().sum(0) for part in exact.split(rows)])
    assert ((db - sums).abs() <= 2**-16 * room + 2**-16 * size.max()).all()
