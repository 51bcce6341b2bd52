"""The MLP is `linear_gelu` with `stream_linear` on top of it, whatever is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.gather_tokens import gather_origin, gather_tokens
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.origin import Origin
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.ops.stream_linear import stream_linear
from cavmae_fast.ops.stream_mlp import RECOMPUTE, stream_mlp
from cavmae_fast.reference import operators as reference

LAYOUT = StreamLayout(2, (5, 12))
WIDTHS = (16, 64, 24)


def inputs(streams: int, dtype: torch.dtype) -> list:
    generator = torch.Generator().manual_seed(0)
    k, n, m = WIDTHS

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype).requires_grad_()

    shapes = ((n, k), (n,), (m, n), (m,))
    return [draw(LAYOUT.rows, k), *([draw(*shape) for _ in range(streams)] for shape in shapes)]


def of_operators(x, w1, b1, w2, b2):
    return stream_linear(linear_gelu(x, w1, b1, LAYOUT), w2, b2, LAYOUT)


def flat(arguments: list) -> list[Tensor]:
    return [arguments[0], *(tensor for group in arguments[1:] for tensor in group)]


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_same_bits_as_the_two_operators(recompute, dtype, streams, mode):
    arguments = inputs(streams, dtype)
    origin = Origin(lambda half: half + half, (arguments[0].detach() / 2,))
    with dispatch.override(mode):
        wanted = of_operators(*arguments)
        gradients = torch.autograd.grad(wanted.square().sum(), flat(arguments))
        for source in (None, origin):
            got = stream_mlp(*arguments, LAYOUT, recompute=recompute, origin=source)
            assert torch.equal(got, wanted)
            for a, b in zip(torch.autograd.grad(got.square().sum(), flat(arguments)), gradients, strict=True):
                assert torch.equal(a, b)


def test_parity_with_the_reference():
    rows = LAYOUT.rows_per_stream

    def plain(x, w1, b1, w2, b2):
        return reference.stream_linear(reference.linear_gelu(x, w1, b1, rows), w2, b2, rows)

    assert_parity(lambda *args: stream_mlp(*args, LAYOUT, recompute="mlp"), plain, inputs(2, torch.float32))


def test_what_is_formed_again_is_used():
    """Not a copy that was kept after all: an origin that is wrong gives wrong gradients of the weights."""
    x, *weights = inputs(1, torch.float32)
    wrong = Origin(torch.zeros_like, (x,))
    for function in (
        lambda origin: stream_mlp(x, *weights, LAYOUT, origin=origin),
        lambda origin: stream_linear(x, *weights[:2], LAYOUT, origin=origin),
    ):
        assert torch.autograd.grad(function(wrong).sum(), weights[0])[0].count_nonzero() == 0
        assert torch.autograd.grad(function(None).sum(), weights[0])[0].count_nonzero() > 0


def test_gathered_tokens_are_formed_again():
    x = torch.randn(2 * 7, 5)
    ids = torch.tensor([[3, 0], [6, 1]])
    form, tensors = gather_origin(Origin(torch.neg, (-x,)), ids)
    assert torch.equal(form(*tensors), gather_tokens(x, ids))


def test_no_gradient_of_x():
    x, *weights = inputs(1, torch.float32)
    out = stream_mlp(x.detach(), *weights, LAYOUT, recompute="elementwise")
    wanted = of_operators(x, *weights)
    for a, b in zip(*(torch.autograd.grad(y.sum(), flat([x, *weights])[1:]) for y in (out, wanted))):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda x, w1, b1, w2, b2: (x[1:], w1, b1, w2, b2), ValueError, "x has shape"),
        (lambda x, w1, b1, w2, b2: (x, [w[:, 1:] for w in w1], b1, w2, b2), ValueError, "weights1 have shapes"),
        (lambda x, w1, b1, w2, b2: (x, w1, b1[:1], w2, b2), ValueError, "biases1 have shapes"),
        (lambda x, w1, b1, w2, b2: (x, w1, b1, w2[:1], b2), ValueError, "weights2 has 1 entries, and weights1 2"),
        (lambda x, w1, b1, w2, b2: (x, w1, b1, [w[:, 1:] for w in w2], b2), ValueError, "weights2 have shapes"),
        (lambda x, w1, b1, w2, b2: (x, w1, b1, w2, [b2[0], b2[1][1:]]), ValueError, "biases2 have shapes"),
        (lambda x, w1, b1, w2, b2: (x, w1, b1, [w.half() for w in w2], b2), TypeError, "weights2 have dtypes"),
    ],
)
def test_errors(change, kind, words):
    with pytest.raises(kind, match=words):
        stream_mlp(*change(*inputs(2, torch.float32)), LAYOUT)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="recompute is 'block'; it must be one of none, elementwise, mlp"):
        stream_mlp(*inputs(1, torch.float32), LAYOUT, recompute="block")
