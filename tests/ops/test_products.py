"""The matrix products of this package, whose last step does what else follows in passes over memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import configuration, dispatch, product_kernels
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.parity import assert_parity, poisoned_allocations, repeats
from cavmae_fast.ops.stream_mlp import stream_mlp
from cavmae_fast.reference import operators as reference

OPERATORS = ("linear_gelu", "hidden_gradient")
PRODUCTS = {
    "implementations": {name: dict.fromkeys(("float32", "float16"), "triton product") for name in OPERATORS},
    "launches": {},
}
#: batch, lengths, width of the inputs, hidden width, one weight for all streams
SHAPES = [
    (1, (1,), 1, 1, True),
    (1, (1,), 8, 40, True),
    (2, (5, 7, 12), 97, 33, False),
    (2, (35, 3, 70), 24, 136, False),
]
LAUNCHES = {
    "as it is": {},
    "small": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 2},
    "halves": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "FLATTEN": True, "HALVES": True},
}
CPU = torch.device("cpu")


def draw(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def rows_of(shape: tuple) -> tuple[StreamLayout, list[int]]:
    """The layout, and the rows of each weight."""
    batch, lengths, *_, shared = shape
    layout = StreamLayout(batch, lengths)
    return layout, [layout.rows] if shared else layout.rows_per_stream


def arguments(shape: tuple, dtype: torch.dtype) -> list:
    """x, weights and biases of the first layer."""
    (layout, rows), (k, n) = rows_of(shape), shape[2:4]
    weights = [draw(n, k, dtype=dtype, seed=i, scale=k**-0.5).requires_grad_() for i in range(len(rows))]
    biases = [draw(n, dtype=torch.float32, seed=9 + i).requires_grad_() for i in range(len(rows))]
    return [draw(layout.rows, k, dtype=dtype, seed=20).requires_grad_(), weights, biases]


def with_launches(changes: dict) -> dict:
    """`PRODUCTS`, each kernel launched otherwise than it is."""
    known = configuration.read(configuration.shipped_file("sm_90"))["launches"]
    names = [f"{name}_product" for name in OPERATORS]
    launches = {name: {case: options | changes for case, options in known[name].items()} for name in names}
    return PRODUCTS | {"launches": launches}


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_gelu(dtype, shape, launch):
    layout, rows = rows_of(shape)
    if dtype == torch.float16 and shape[2:4] == (1, 1):
        pytest.skip("the rounding errors of single numbers are no measure of one another")

    def explicit(x, weights, biases):
        """float32, rounded where two passes would hand a tensor on."""
        biases = [b.float() + (b.to(dtype).float() - b.float()).detach() for b in biases]
        pre = reference.stream_linear(x.float(), [w.float() for w in weights], biases, rows)
        return torch.nn.functional.gelu(Rounded.apply(pre, dtype)).to(dtype)

    def ours(*args):
        assert dispatch.choose("linear_gelu", CPU, dtype).implementation == "triton product"
        return linear_gelu(*args, layout)

    with configuration.trial(with_launches(launch)):
        assert_parity(ours, lambda *args: reference.linear_gelu(*args, rows), arguments(shape, dtype), baseline=explicit)


class Rounded(torch.autograd.Function):
    """float32 as `dtype` holds it, gradients too."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).float(), None


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_gradient(dtype, shape, launch):
    (layout, rows), (m, n) = rows_of(shape), shape[2:4]
    weights = [draw(m, n, dtype=dtype, seed=i, scale=m**-0.5) for i in range(len(rows))]
    dout, pre = draw(layout.rows, m, dtype=dtype, seed=20), draw(layout.rows, n, dtype=dtype, seed=30)

    def ours(dout, pre, weights):
        return torch.ops.cavmae_fast.hidden_gradient(dout, pre, weights, rows, torch.float32)

    def plain(dout, pre, weights):
        return reference.hidden_gradient(dout, pre, weights, rows)

    def explicit(dout, pre, weights):
        dpre, db = plain(dout.float(), pre.float(), [w.float() for w in weights])
        return dpre.to(dtype), db

    with configuration.trial(with_launches(launch)):
        assert_parity(ours, plain, [dout, pre, weights], baseline=explicit)
        assert repeats(ours, [dout, pre, weights])


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_the_mlp_of_them(recompute):
    layout, rows = rows_of(SHAPES[3])
    x, w1, b1 = arguments(SHAPES[3], torch.float32)
    w2 = [draw(40, w.shape[0], dtype=torch.float32, seed=50, scale=0.1).requires_grad_() for w in w1]
    b2 = [draw(40, dtype=torch.float32, seed=60).requires_grad_() for _ in w1]

    def plain(x, w1, b1, w2, b2):
        return reference.stream_linear(reference.linear_gelu(x, w1, b1, rows), w2, b2, rows)

    with configuration.trial(PRODUCTS):
        assert_parity(lambda *args: stream_mlp(*args, layout, recompute=recompute), plain, [x, w1, b1, w2, b2])


def test_fp8_products_are_made_elsewhere():
    shape = (2, (5, 9), 32, 48, False)
    x, weights, biases = arguments(shape, torch.float32)
    _, rows = rows_of(shape)
    results = []
    for content in (PRODUCTS, {"implementations": {}, "launches": {}}):
        with torch.no_grad(), configuration.trial(content):
            y, pre = torch.ops.cavmae_fast.linear_gelu(x, weights, biases, rows, True, True)
            back = [w.t().contiguous() for w in weights]
            gradient = torch.ops.cavmae_fast.hidden_gradient(x, pre, back, rows, torch.float32, True)
            results.append((y, pre, *gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_keeps_nothing():
    x, weights, biases = arguments(SHAPES[3], torch.float32)
    _, rows = rows_of(SHAPES[3])
    with torch.no_grad(), poisoned_allocations():
        y, pre = product_kernels.linear_gelu_product(x, weights, biases, rows, False, "sm_90")
    assert pre.numel() == 0
    torch.testing.assert_close(y, reference.linear_gelu(x, weights, biases, rows).detach())


@pytest.mark.parametrize(
    ("architecture", "width", "offset", "travel"),
    [
        ("sm_90 nvidia-h200", 8, 0, "tma"),
        ("sm_120", 8, 0, "tma"),
        ("sm_86", 8, 0, "pointers"),
        ("sm_90", 7, 0, "odd"),
        ("sm_80", 7, 0, "odd"),
        ("sm_90", 8, 4, "odd"),
    ],
)
def test_how_tiles_travel(architecture, width, offset, travel):
    memory = torch.empty(64 + offset, dtype=torch.float16)[offset:]
    assert product_kernels._travel(architecture, memory[: 4 * width].view(4, width)) == travel


def test_no_mode_asks_for_them():
    for mode, implementation in (("auto", "torch"), ("triton", "triton")):
        with dispatch.override(mode):
            assert dispatch.choose("hidden_gradient", CPU, torch.float32).implementation == implementation
    with configuration.trial(PRODUCTS):
        assert str(dispatch.choose("hidden_gradient", CPU, torch.float32)) == "Triton product: on trial (float32)"
