"""Kernels that write fp8 as they go: the same bits as the pass alone with a pass to quantize behind it.

So the CPU, which makes the two passes, computes what a GPU computes in one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import dgelu_bias, fp8, layer_norm_kernels
from cavmae_fast.ops.parity import poisoned_allocations
from tests.ops.rounding import exact_rounding

TARGET = "sm_90"
#: rows of each stream, width
SHAPES = [([1], 1), ([5, 7, 12], 33), ([70, 3], 96), ([9], 128)]
DTYPES = [torch.bfloat16, torch.float16]
BROKEN = [float("nan"), float("inf"), -float("inf")]


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


@pytest.mark.parametrize("broken", [None, *BROKEN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape, dtype, broken):
    alone, _ = norm(*shape, dtype, broken, quantized=False)
    beside, quantized = norm(*shape, dtype, broken, quantized=True)
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_quantized(quantized, alone[1], fp8.VALUES)
    without, quantized = norm(*shape, dtype, broken, quantized=True, store_y=False)
    assert without[1].numel() == 0 and without[1].dtype == dtype
    assert_quantized(quantized, alone[1], fp8.VALUES)


@pytest.mark.parametrize("broken", [None, *BROKEN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
    torch.testing.assert_close(y, torch.nn.functional.gelu(pre), rtol=torch.finfo(dtype).eps, atol=tail, equal_nan=True)
    assert nothing.numel() == 0
    for found in (quantized, without):
        assert_quantized(fp8.Quantized(*found), y, fp8.VALUES)


@pytest.mark.parametrize("broken", [None, *BROKEN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_backward(shape, dtype, broken):
    rows, width = shape
    dy, pre = draw(sum(rows), width, 4, dtype), draw(sum(rows), width, 5, dtype)
    if broken is not None:
        dy[-1, 0] = broken
    with poisoned_allocations():
        alone, db = dgelu_bias.dgelu_bias_triton(dy, pre, rows, torch.float32, TARGET)
        beside, db_beside, quantized = dgelu_bias.dgelu_bias_quantized(dy, pre, rows, torch.float32, TARGET)
    torch.testing.assert_close(alone, beside, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(db, db_beside, equal_nan=True)
    assert_quantized(quantized, alone, fp8.GRADIENTS)
