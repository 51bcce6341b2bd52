from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import catalogue, configuration, dispatch
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.parity import assert_parity, repeats
from cavmae_fast.ops.residual import as_tensor, with_gradient_in
from cavmae_fast.ops.stream_layer_norm import layer_norm_origin, stream_layer_norm
from cavmae_fast.reference import operators as reference

SHAPES = [(1, (1,), 8), (2, (5, 7, 12), 97), (2, (128, 49, 177), 768), (3, (3, 70), 1023), (1, (65,), 512)]


def inputs(layout: StreamLayout, width: int, dtype: torch.dtype, delta_dtype: torch.dtype | None):
    generator = torch.Generator().manual_seed(width)

    def draw(*shape, dtype=dtype, shift=0.0):
        return (torch.randn(*shape, generator=generator) + shift).to(dtype).requires_grad_()

    x = draw(layout.rows, width, shift=0.5)
    delta = None if delta_dtype is None else draw(layout.rows, width, dtype=delta_dtype)
    weights = [draw(width, dtype=torch.float32, shift=1.0) for _ in layout.lengths]
    return [x, delta, weights, [draw(width, dtype=torch.float32) for _ in layout.lengths]]


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "delta_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16), (torch.float32, None)],
)
def test_parity(mode, shape, dtype, delta_dtype):
    layout = StreamLayout(*shape[:2])

    def explicit(x, delta, weights, biases):
        """fp32 arithmetic, rounded where a tensor is handed on."""
        stream, y = reference.stream_layer_norm(
            x.float(), None if delta is None else delta.float(), weights, biases, layout.rows_per_stream
        )
        return stream.to(dtype), y.to(dtype)

    with dispatch.override(mode):
        assert_parity(
            lambda *args: stream_layer_norm(*args, layout),
            lambda *args: reference.stream_layer_norm(*args, layout.rows_per_stream),
            inputs(layout, shape[2], dtype, delta_dtype),
            baseline=explicit,
        )


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "delta_dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float16)])
def test_adding_again_gives_the_same_bits(mode, dtype, delta_dtype):
    """Whether the sum is kept or what is added: results, gradients, and the LayerNorm formed again."""
    layout = StreamLayout(2, (5, 7, 12))
    arguments = inputs(layout, 97, dtype, delta_dtype)
    tensors = [*arguments[:2], *arguments[2], *arguments[3]]
    with dispatch.override(mode):
        results = [stream_layer_norm(*arguments, layout, keep_sum=keep) for keep in (True, False)]
        gradients = [torch.autograd.grad(x.sum() + (y * y).sum(), tensors) for x, y in results]
        assert all(torch.equal(a, b) for kind in (results, gradients) for a, b in zip(*kind))
        for kept in (arguments[:2], (results[0][0], None)):
            form, formed_from = layer_norm_origin(*kept, *arguments[2:], layout, 1e-5, dtype)
            assert torch.equal(form(*formed_from), results[0][1])


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_strided_parameters(mode):
    layout = StreamLayout(2, (3, 4))
    x, _, weights, biases = inputs(layout, 24, torch.float32, None)

    def strided(x, weights, biases):
        columns = [torch.stack([p, -p], dim=1)[:, 0] for p in (*weights, *biases)]
        return stream_layer_norm(x, None, columns[:2], columns[2:], layout)[1]

    with dispatch.override(mode):
        assert_parity(
            strided,
            lambda x, *args: reference.stream_layer_norm(x, None, *args, layout.rows_per_stream)[1],
            [x, weights, biases],
        )


def test_norms_of_several_dtypes_are_refused():
    layout = StreamLayout(1, (2, 3))
    weights = [torch.ones(8), torch.ones(8, dtype=torch.float16)]
    with pytest.raises(TypeError, match="weights have dtypes"):
        stream_layer_norm(torch.zeros(5, 8), None, weights, [torch.zeros(8)] * 2, layout)


def owed_case(name: str) -> catalogue.Case:
    return next(case for case in catalogue.small() if str(case) == f"stream_layer_norm-{name}")


@pytest.mark.parametrize("case", ["delta", "streams"])
@pytest.mark.parametrize(("mode", "apart"), [("torch", False), ("triton", False), ("triton", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_biases_within_the_update(case, mode, apart, dtype):
    """One for all streams or one for each, summed in the kernel or in a pass of its own."""
    case = owed_case(case)
    launch = {"BLOCK_R": 2, "ROWS_PER_PROGRAM": 4, "num_warps": 4, "UPDATE_SUMS": not apart}
    content = {"implementations": {}, "launches": {"stream_layer_norm_backward": {configuration.name_of(dtype): launch}}}
    with dispatch.override(mode), configuration.trial(content):
        assert_parity(case.ours, case.reference, case.inputs(dtype), baseline=case.baseline)
        assert repeats(case.ours, case.inputs(dtype))


def test_owed_biases_that_do_not_fit_are_refused():
    layout = StreamLayout(1, (2, 3, 4))
    norms = [torch.ones(8)] * 3
    for delta, owed in ((torch.zeros(9, 8), [torch.zeros(7)]), (torch.zeros(9, 8), norms[:2]), (None, norms)):
        with pytest.raises(ValueError, match="owed has shapes"):
            stream_layer_norm(torch.zeros(9, 8), delta, norms, norms, layout, owed=owed)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("delta_dtype", [torch.float16, None])
def test_a_residual_stream_with_a_narrow_gradient(mode, delta_dtype):
    """The same results; the gradients of the stream and of its update are rounded, and nothing else."""
    layout = StreamLayout(2, (5, 7, 12))
    arguments = inputs(layout, 97, torch.float32, delta_dtype)
    low = delta_dtype or torch.float16
    weight, other = torch.randn(layout.rows, 97), torch.randn(layout.rows, 97)

    def losses(x, *args):
        stream, y = stream_layer_norm(x, *args, layout, out_dtype=torch.float32)
        return (as_tensor(stream) * weight).sum() + (y * other).sum(), stream, y

    tensors = [*[t for t in arguments[:2] if t is not None], *arguments[2], *arguments[3]]
    with dispatch.override(mode):
        want, stream, y = losses(*arguments)
        exact = torch.autograd.grad(want, tensors)
        got, carried, same = losses(with_gradient_in(arguments[0], low), *arguments[1:])
        found = torch.autograd.grad(got, tensors)
    assert torch.equal(carried.value, stream) and torch.equal(same, y) and carried.carrier.dtype == low
    assert carried.carrier.untyped_storage().nbytes() == low.itemsize
    rounding = torch.finfo(low).eps
    for a, b, tensor in zip(found, exact, tensors):
        assert a.dtype == tensor.dtype
        assert float((a - b).norm()) <= rounding * float(b.norm()) if tensor.dim() == 2 else torch.equal(a, b)


def test_a_gradient_that_is_not_narrower_needs_no_carrier():
    x = torch.zeros(3, 4, dtype=torch.float16)
    assert with_gradient_in(x, torch.float16) is x and as_tensor(x) is x
