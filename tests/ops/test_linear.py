from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import dgelu_bias, dispatch
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.ops.stream_linear import stream_linear
from cavmae_fast.reference import operators as reference

FUNCTIONS = {
    "stream_linear": (stream_linear, reference.stream_linear),
    "linear_gelu": (linear_gelu, reference.linear_gelu),
}
MODES = [("stream_linear", "torch"), ("linear_gelu", "torch"), ("linear_gelu", "triton")]
#: batch, lengths, K, N, one weight for all streams
SHAPES = [
    (1, (1,), 8, 33, True),
    (2, (5, 7, 12), 97, 33, False),
    (2, (5, 7, 12), 16, 1023, True),
    (3, (3, 70), 40, 257, False),
    (1, (128, 49), 768, 300, False),
    (1, (177,), 512, 96, True),
]


def inputs(shape, dtype: torch.dtype, bias_dtype: torch.dtype):
    batch, lengths, k, n, shared = shape
    layout = StreamLayout(batch, lengths)
    generator = torch.Generator().manual_seed(k)

    def draw(*size, dtype=dtype, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(dtype).requires_grad_()

    count = 1 if shared else len(lengths)
    weights = [draw(n, k, scale=k**-0.5) for _ in range(count)]
    return layout, [draw(layout.rows, k), weights, [draw(n, dtype=bias_dtype) for _ in range(count)]]


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)],
    ids=["fp32", "fp16", "fp16-fp32"],
)
def test_parity(name, mode, shape, dtype, bias_dtype):
    check(name, mode, shape, dtype, bias_dtype)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_one_element(name, mode):
    """In fp32 alone: the fp16 rounding errors of a single number are no measure of one another."""
    check(name, mode, (1, (1,), 1, 1, True), torch.float32, torch.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, (708,), 512, 2048, True), (1, (708,), 2048, 512, True)], ids=str)
def test_parity_bf16(name, shape):
    check(name, "torch", shape, torch.bfloat16, torch.bfloat16)


def check(name, mode, shape, dtype, bias_dtype):
    function, oracle = FUNCTIONS[name]
    layout, arguments = inputs(shape, dtype, bias_dtype)
    rows = layout.rows_per_stream

    def explicit(x, weights, biases):
        """fp32 arithmetic, rounded where a tensor is handed on; the bias enters in x's dtype."""
        biases = [b.float() + (b.to(dtype).float() - b.float()).detach() for b in biases]
        pre = Rounded.apply(reference.stream_linear(x.float(), [w.float() for w in weights], biases, rows), dtype)
        return (torch.nn.functional.gelu(pre) if name == "linear_gelu" else pre).to(dtype)

    with dispatch.override(mode):
        assert_parity(lambda *args: function(*args, layout), lambda *args: oracle(*args, rows), arguments, baseline=explicit)


class Rounded(torch.autograd.Function):
    """fp32 values as `dtype` holds them, gradients too: what storing the tensor between two kernels does to it."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).float(), None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_gradient_of_x(name):
    """The gradient of x is neither computed nor returned where it is not asked for."""
    layout, (x, weights, biases) = inputs(SHAPES[1], torch.float32, torch.float32)
    function, _ = FUNCTIONS[name]
    want = torch.autograd.grad(function(x, weights, biases, layout).sum(), [*weights, *biases])
    backward = getattr(torch.ops.cavmae_fast, f"{name}_backward").default
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is backward:
                seen.append(result[0].numel())
            return result

    with Record():
        got = torch.autograd.grad(function(x.detach(), weights, biases, layout).sum(), [*weights, *biases])
    assert seen == [0]
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_expanded_and_strided_tensors(name):
    layout, (x, weights, biases) = inputs(SHAPES[1], torch.float32, torch.float32)
    function, _ = FUNCTIONS[name]
    out = function(x, weights, biases, layout)
    expanded = torch.ones(()).expand_as(out)
    want = torch.autograd.grad(out, x, expanded.contiguous())[0]
    strided = x.detach().t().contiguous().t().requires_grad_()
    out = function(strided, weights, biases, layout)
    assert torch.equal(torch.autograd.grad(out, strided, expanded)[0], want)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_gelu_backward_at_the_edges(mode):
    """Far from 0 the derivative is 0 or 1; a NaN in either input reaches dz and its column's sum, and no other."""
    pre = torch.tensor([[-40.0, -6.0, 0.0, 6.0, 40.0, 1.0, float("nan")]]).repeat(3, 1)
    dy = torch.ones_like(pre)
    dy[1, 5] = float("nan")
    if mode == "triton":
        dpre, db = dgelu_bias.dgelu_bias_triton(dy, pre, [3], torch.float32, "sm_90")
    else:
        dpre = torch.ops.aten.gelu_backward(dy, pre)
        db = dgelu_bias.bias_gradient(dpre, [3], torch.float32)
    # The derivative is a sum of terms up to 1, so it is as exact as float32's numbers next to 1 are apart.
    want = torch.tensor([0.0, -3.6e-8, 0.5, 1.0, 1.0])
    torch.testing.assert_close(dpre[0, :5], want, atol=torch.finfo(torch.float32).eps, rtol=0)
    assert dpre.isnan().nonzero().tolist() == [[0, 6], [1, 5], [1, 6], [2, 6]]
    assert db[0].isnan().nonzero().flatten().tolist() == [5, 6]


def test_inference_keeps_nothing_for_backward():
    layout, (x, weights, biases) = inputs(SHAPES[1], torch.float32, torch.float32)
    with_gradient = linear_gelu(x, weights, biases, layout)
    with torch.no_grad():
        y, pre = torch.ops.cavmae_fast.linear_gelu(x, weights, biases, layout.rows_per_stream, False)
        assert torch.equal(y, with_gradient) and pre.numel() == 0
        assert torch.equal(linear_gelu(x, weights, biases, layout), with_gradient)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda x, w, b: (x[1:], w, b), ValueError, "x has shape"),
        (lambda x, w, b: (x, w[:2], b), ValueError, "weights has 2 entries"),
        (lambda x, w, b: (x, [], b), ValueError, "weights has 0 entries"),
        (lambda x, w, b: (x[:, 1:], w, b), ValueError, "weights have shapes"),
        (lambda x, w, b: (x, w, b[:2]), ValueError, "biases have shapes"),
        (lambda x, w, b: (x, w, [b[0], b[1][1:], b[2]]), ValueError, "biases have shapes"),
        (lambda x, w, b: (x.half(), w, b), TypeError, "weights have dtypes"),
    ],
)
def test_errors(name, change, kind, words):
    layout, arguments = inputs(SHAPES[1], torch.float32, torch.float32)
    with pytest.raises(kind, match=words):
        FUNCTIONS[name][0](*change(*arguments), layout)
