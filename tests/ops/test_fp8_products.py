"""Products of 8-bit numbers: how rows are quantized, and how far outputs and gradients are from the exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cavmae_fast import compat
from cavmae_fast.ops import dispatch, fp8, fp8_products
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.origin import Origin
from cavmae_fast.ops.parity import poisoned_allocations
from cavmae_fast.ops.residual import as_tensor, new_carrier, with_gradient_in
from cavmae_fast.ops.stream_layer_norm import quantized_layer_norm, stream_layer_norm
from cavmae_fast.ops.stream_linear import stream_linear
from cavmae_fast.ops.stream_mlp import stream_mlp
from cavmae_fast.reference import operators as reference
from tests.ops.rounding import exact_rounding

DTYPES = {"e4m3": fp8.VALUES, "e5m2": fp8.GRADIENTS}
LAYOUT = StreamLayout(4, (9, 16))
WIDTHS = (64, 128, 48)


def rows_of_all_sizes(width: int) -> Tensor:
    """Rows from the least numbers to the largest, one of zeros, and maxima around the steps of the scale."""
    x = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-44, 1e-38, 1e-12, 0, 1e-3, 1, 1, 1e4, 1e20, 1e30, 1e37, 1]).unsqueeze(1)
    x[5, 0], x[6, 0] = 7.0, 7.0000005  # 1.75 x 4, the largest of a scale, and just above it
    return x


def quantize(mode: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By PyTorch, or by the kernel."""
    if mode == "torch":
        return fp8.quantize_rows(x, dtype)
    with exact_rounding():
        return fp8.quantize_triton(x, dtype, "sm_90")


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 33, 128])
def test_rows_are_scaled_by_the_least_power_of_two(width, dtype, mode):
    x = rows_of_all_sizes(width)
    with poisoned_allocations():
        q, scale = quantize(mode, x, dtype)
    assert q.dtype == dtype and scale.shape == (12, 1)
    assert ((torch.frexp(scale)[0] == 0.5) & (scale > 0)).all(), "powers of two"
    largest, limit = x.abs().amax(1, keepdim=True), torch.finfo(dtype).max
    assert (largest <= limit * scale).all()
    assert (largest > limit * scale / 2)[largest > 1e-30].all()
    # Half a step of the number, or of the least one that is not zero.
    error = (q.float() * scale - x).abs()
    half_step = (
        torch.finfo(dtype).eps / 2 * x.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 * scale
    )
    assert (error <= half_step).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_kernel_gives_the_bits_of_pytorch(dtype):
    x = rows_of_all_sizes(96)[[4, 5, 6, 7, 11]].half()
    (q, scale), (q_kernel, scale_kernel) = (quantize(mode, x, dtype) for mode in ("torch", "triton"))
    assert torch.equal(scale, scale_kernel) and torch.equal(q.float(), q_kernel.float())


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(value, mode):
    x = torch.ones(3, 16)
    x[1, 4] = value
    q, scale = quantize(mode, x, fp8.VALUES)
    assert q.float().isnan().all(1).tolist() == scale.isnan().flatten().tolist() == [False, True, False]


def test_the_interpreter_is_not_asked():
    with dispatch.override("triton"):
        choice = dispatch.choose("quantize_rows", torch.device("cpu"), torch.float16, (3, 16))
    assert str(choice) == "PyTorch: Triton's interpreter rounds to fp8 wrongly"


def test_the_product_in_bfloat16_is_that_of_fp8_units():
    """Both sum up exact products in float32 and round once."""
    a, b = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (q_a, scale_a), (q_b, scale_b) = (fp8.quantize_rows(x, fp8.VALUES) for x in (a, b))
    exact = (q_a.double() * scale_a.double()) @ (q_b.double() * scale_b.double()).t()
    got = fp8.dequantized(fp8.Quantized(q_a, scale_a), a.dtype) @ fp8.dequantized(fp8.Quantized(q_b, scale_b), b.dtype).t()
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * a.double().norm() * b.double().norm()).all()


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5
    return x.to(dtype).requires_grad_()


def arguments(count: int) -> list:
    k, n, m = WIDTHS
    shapes = ((n, k), (n,), (m, n), (m,))
    groups = [[draw(*shape, seed=10 * i + j) for j in range(count)] for i, shape in enumerate(shapes)]
    return [draw(LAYOUT.rows, k, seed=99), *groups]


def flat(groups: list) -> list[Tensor]:
    return [groups[0], *(tensor for group in groups[1:] for tensor in group)]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("count", [1, 2])
def test_errors_of_the_mlp(count):
    """A number of e4m3 is wrong by 2^-4 at most and by 0.026 in the mean square, one of e5m2 by twice as much; products of
    random numbers keep the relative error of their factors, so every product adds some 3.7 % (values), 5.9 % (gradients)."""
    inputs = arguments(count)
    exact = [x.detach().double().requires_grad_() for x in flat(inputs)]
    groups = [exact[0], *(exact[1 + i * count : 1 + (i + 1) * count] for i in range(4))]
    rows = LAYOUT.rows_per_stream if count > 1 else [LAYOUT.rows]
    want = reference.stream_linear(reference.linear_gelu(*groups[:3], rows), *groups[3:], rows)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    want_gradients = torch.autograd.grad(want, exact, weights)
    errors = {}
    for is_fp8 in (False, True):
        got = stream_mlp(*inputs, LAYOUT, fp8=is_fp8)
        gradients = torch.autograd.grad(got, flat(inputs), weights.bfloat16())
        errors[is_fp8] = [relative(a, b) for a, b in zip([got, *gradients], [want, *want_gradients], strict=True)]
    output, of_x, *of_parameters = errors[True]
    assert 0.02 < output < 0.08 and 0.03 < of_x < 0.12, errors[True]
    # fc2's own gradients see fp8 in their input alone, or (the bias's) not at all: those products are of bfloat16.
    of_w1, of_b1, of_w2, of_b2 = (of_parameters[i * count] for i in range(4))
    assert max(of_w1, of_b1) < 0.1 and of_w2 < 0.05 and of_b2 == errors[False][2 + 3 * count], errors[True]
    assert max(errors[False]) < 0.01


@pytest.mark.parametrize("recompute", ["none", "elementwise", "mlp"])
def test_recomputation_gives_the_same_bits(recompute):
    inputs = arguments(2)
    results = []
    for choice in ("none", recompute):
        out = stream_mlp(*inputs, LAYOUT, recompute=choice, fp8=True)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), flat(inputs))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gradient_of_a_linear_layers_weight_is_that_of_bfloat16():
    x, weights, biases, *_ = arguments(1)
    gradients = []
    for is_fp8 in (False, True):
        out = stream_linear(x, weights, biases, LAYOUT, fp8=is_fp8)
        gradients.append(torch.autograd.grad(out, [x, *weights, *biases], torch.ones_like(out)))
    (dx, dw, db), (dx_fp8, dw_fp8, db_fp8) = gradients
    assert torch.equal(dw, dw_fp8) and torch.equal(db, db_fp8)
    assert not torch.equal(dx, dx_fp8)


class FakeGpu:
    """What `check_fp8` asks of PyTorch."""

    def __init__(self, monkeypatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")


def test_gpus_without_fp8_units_are_refused(monkeypatch):
    FakeGpu(monkeypatch, (8, 0))
    with pytest.raises(fp8.Fp8Error, match=r"capability 8\.9 or later \(Ada, Hopper, Blackwell\); NVIDIA A100 has 8\.0"):
        fp8.check_fp8(torch.device("cuda"))
    FakeGpu(monkeypatch, (8, 9))
    fp8.check_fp8(torch.device("cuda"))


def test_odd_widths_are_refused():
    x, weight = draw(LAYOUT.rows, 24, seed=0), draw(16, 24, seed=1)
    with pytest.raises(fp8.Fp8Error, match="widths that are multiples of 16; a layer has 24"):
        stream_linear(x, [weight], [draw(16, seed=2)], LAYOUT, fp8=True)


@pytest.mark.parametrize("has_operator", [True, False])
def test_what_a_gpu_is_given(monkeypatch, has_operator):
    """The calls for fp8 units, which PyTorch has for CPUs as well, give what the CPU's form gives."""
    x, weights, biases, *_ = arguments(2)
    rows, low, seen = LAYOUT.rows_per_stream, torch.bfloat16, []

    def scaled_mm(*args, fast):
        seen.append((args[0].dtype, fast))
        return real(*args, fast=fast)

    real = compat.scaled_mm
    monkeypatch.setattr(compat, "scaled_mm", scaled_mm)
    if not has_operator:
        monkeypatch.setattr(torch.ops.aten, "_scaled_mm_v2", None)
    with torch.no_grad():
        results = []
        for has_units in (False, True):
            monkeypatch.setattr(fp8_products, "has_units", lambda device, answer=has_units: answer)
            out = fp8_products.fp8_linear(fp8.quantize_rows(x, fp8.VALUES), weights, biases, rows, low)
            dx = fp8_products.fp8_input_gradient(fp8.quantize_rows(out, fp8.GRADIENTS), weights, rows, low)
            results.append((out, dx))
    torch.testing.assert_close(*results, rtol=2**-7, atol=2**-8)
    assert seen == 2 * [(fp8.VALUES, True)] + 2 * [(fp8.GRADIENTS, False)]


def test_only_the_very_gradient_is_handed_on():
    handed, gradient = fp8.Handed(), torch.randn(4, 16)
    held = fp8.quantize_rows(gradient, fp8.GRADIENTS)
    for change, same in (
        (lambda g: g, True),
        (lambda g: g.view_as(g), True),
        (torch.clone, False),
        (lambda g: g.add_(1), False),
    ):
        handed.put(gradient, held)
        assert (handed.take(change(gradient)) is held) == same
        assert handed.take(gradient) is None, "it is handed on once"


@pytest.mark.parametrize("recompute", ["none", "elementwise", "mlp"])
def test_what_is_known_of_the_input_changes_no_bit(recompute):
    """An input without values: what fp8 holds of it is given, and its origin."""
    inputs = arguments(2)
    x, *parameters = inputs
    origin, known = Origin(torch.clone, (x.detach(),)), fp8.quantize_rows(x.detach(), fp8.VALUES)
    nothing = new_carrier(x, x.dtype).requires_grad_()
    for function in (
        lambda x, **known: stream_mlp(x, *parameters, LAYOUT, recompute=recompute, fp8=True, **known),
        lambda x, **known: stream_linear(x, *parameters[:2], LAYOUT, fp8=True, **known),
    ):
        want, got = function(x), function(nothing, origin=origin, quantized=known)
        assert torch.equal(got, want)
        gradients = [
            torch.autograd.grad(out.float().square().sum(), flat([first, *parameters])[:5])
            for out, first in ((want, x), (got, nothing))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("narrow", [False, True])
def test_the_layer_norm_of_a_stream(narrow):
    """Gradients are those of `stream_layer_norm`, whether its result is written or not."""
    x, delta = draw(LAYOUT.rows, 32, seed=0, dtype=torch.float32), draw(LAYOUT.rows, 32, seed=1)
    weights, biases = ([draw(32, seed=2 + i + j, dtype=torch.float32) for i in range(2)] for j in (0, 2))
    leaves, results = [x, delta, *weights, *biases], []
    for function, options in ((stream_layer_norm, {}), *((quantized_layer_norm, {"values": v}) for v in (True, False))):
        stream = with_gradient_in(x, torch.bfloat16) if narrow else x
        total, y, *held = function(stream, delta, weights, biases, LAYOUT, 1e-5, torch.bfloat16, **options)
        gradients = torch.autograd.grad([as_tensor(total), y], leaves, [x.detach(), delta.detach()])
        results.append([as_tensor(total), *gradients])
        if held:
            assert not held[0].rows.requires_grad and torch.equal(held[0].scale, results[0][-1].scale)
            assert torch.equal(held[0].rows.float(), results[0][-1].rows.float())
            assert y.untyped_storage().nbytes() == (2 if options == {"values": False} else 2 * y.numel())
        else:
            results[-1].append(fp8.quantize_rows(y.detach(), fp8.VALUES))
    plain, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(plain[:-1], other, strict=True))


def test_a_place_without_an_update_is_refused():
    x, weight = draw(LAYOUT.rows, 32, seed=0), draw(32, seed=1)
    with pytest.raises(ValueError, match="handed is given without a delta"):
        quantized_layer_norm(x, None, [weight] * 2, [weight] * 2, LAYOUT, handed=fp8.Handed())
