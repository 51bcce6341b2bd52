"""The matrix products of this package, whose last step does what else follows in passes over memory."""

from __future__ import annotations

import ctypes
from unittest import mock

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import configuration, dispatch, native, product_kernels, product_library
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
    known = configuration.read(configuration.shipped_file("sm_90"))["launches"]["stream_product"]
    return PRODUCTS | {"launches": {"stream_product": {case: options | changes for case, options in known.items()}}}


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


def tensor_at(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """The memory at an address, as the library sees it."""
    count = torch.Size(shape).numel()
    kind = ctypes.c_uint16 if dtype == torch.bfloat16 else ctypes.c_float
    return torch.frombuffer((kind * count).from_address(address), dtype=dtype).view(shape)


def test_the_library_gets_each_stream(monkeypatch):
    """What the launchers of the CUDA products hand over, with the kernels played by PyTorch: no device needed."""
    low, full = torch.bfloat16, torch.float32

    def kernel(name, *args):
        if name == "cavmae_linear_gelu":
            y, pre, x, weights, biases, rows, *rest = args
        else:
            assert name == "cavmae_hidden_gradient"
            dpre, partial, dout, pre, weights, rows, *rest = args
            biases = weights
        streams, width, depth, dtype, stream = rest
        assert (streams, dtype, stream) == (len(rows), 2, 5)
        assert all(address is None or address % 16 == 0 for address in (*args[: len(args) - 8], *weights, *biases))
        first = tile = 0
        for count, weight, bias in zip(rows, weights, biases, strict=True):
            hidden, outer = 2 * first * width, 2 * first * depth  # bytes before the stream
            if name == "cavmae_linear_gelu":
                x_s, weight = tensor_at(x + outer, low, count, depth), tensor_at(weight, low, width, depth)
                values = (x_s.float() @ weight.float().t() + tensor_at(bias, full, width)).bfloat16()
                if pre is not None:
                    tensor_at(pre + hidden, low, count, width).copy_(values)
                tensor_at(y + hidden, low, count, width).copy_(torch.nn.functional.gelu(values))
            else:
                dout_s, weight = tensor_at(dout + outer, low, count, depth), tensor_at(weight, low, depth, width)
                pre_s = tensor_at(pre + hidden, low, count, width)
                result = torch.ops.aten.gelu_backward(dout_s.float() @ weight.float(), pre_s.float())
                tensor_at(dpre + hidden, low, count, width).copy_(result)
                padded = -(-width // 256) * 256
                sums = tensor_at(partial + 4 * tile * padded, full, -(-count // 4), padded)
                for i, part in enumerate(result.split(4)):
                    sums[i, :width], sums[i, width:] = part.sum(0), float("nan")
                tile += len(sums)
            first += count

    monkeypatch.setattr(native, "library", lambda: mock.Mock(cavmae_product_tile_rows=lambda: 4))
    monkeypatch.setattr(native, "call", kernel)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=5))
    rows, k, n = [3, 9, 7], 16, 40
    x, pre = draw(19, k, dtype=low, seed=0), draw(19, n, dtype=low, seed=1)
    x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(19, k)  # begins between two multiples of 16 bytes
    weights = [draw(n, k, dtype=low, seed=2 + i, scale=0.2) for i in range(3)]
    biases = [draw(n, dtype=full, seed=5 + i).bfloat16().float() for i in range(3)]
    y, kept = product_library.linear_gelu_library(x, weights, biases, rows, True)
    want = torch.cat([torch.nn.functional.linear(*each) for each in zip(x.split(rows), weights, map(low_of, biases))])
    torch.testing.assert_close(kept, want)
    torch.testing.assert_close(y, torch.nn.functional.gelu(want))
    assert product_library.linear_gelu_library(x, weights, biases, rows, False)[1].numel() == 0
    back = [w.t().contiguous() for w in weights]
    dpre, db = product_library.hidden_gradient_library(x, pre, back, rows, full)
    want, want_db = reference.hidden_gradient(x.float(), pre.float(), [w.float() for w in back], rows)
    torch.testing.assert_close(dpre.float(), want, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(db, want_db)


def test_the_library_gets_the_weight_gradient(monkeypatch):
    """What its launcher hands over, with the kernel played by PyTorch."""

    def kernel(name, *args):
        if name == "cavmae_weight_gradient_workspace":
            needed, rows, *sizes = args
            assert (list(rows), sizes) == ([3, 9, 7], [3, n, k])
            needed._obj.value = 1000
            return
        dw, db, workspace, size, dout, x, rows, streams, width, depth, dtype, stream = args
        assert (name, size, list(rows), streams, dtype, stream) == ("cavmae_weight_gradient", 1000, [3, 9, 7], 3, 2, 5)
        assert all(address % 16 == 0 for address in (dw, workspace, dout, x))
        tensor_at(workspace, full, 250).fill_(1)
        parts = zip(
            tensor_at(dout, low, 19, width).float().split([*rows]), tensor_at(x, low, 19, depth).float().split([*rows])
        )
        for i, (d, part) in enumerate(parts):
            tensor_at(dw, low, streams, width, depth)[i] = d.t() @ part
            if db is not None:
                tensor_at(db, full, streams, width)[i] = d.sum(0)

    low, full, k, n = torch.bfloat16, torch.float32, 16, 40
    monkeypatch.setattr(native, "call", kernel)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=5))
    dout, x = draw(19, n, dtype=low, seed=0), draw(19, k, dtype=low, seed=1)
    x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(19, k)  # begins between two multiples of 16 bytes
    parts = list(zip(dout.float().split([3, 9, 7]), x.float().split([3, 9, 7])))
    want, want_db = torch.stack([d.t() @ part for d, part in parts]), torch.stack([d.sum(0) for d, _ in parts])
    dw, db = product_library.weight_gradient_library(dout, x, [3, 9, 7], full)
    torch.testing.assert_close(dw, want.bfloat16())
    torch.testing.assert_close(db, want_db)
    dw, db = product_library.weight_gradient_library(dout, x, [3, 9, 7], None)
    torch.testing.assert_close(dw, want.bfloat16())
    assert db.numel() == 0 and db.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "mlp", "gradient"), [((8, 6), True, False), ((9, 0), True, True), ((10, 0), False, False)]
)
def test_which_gpus_the_library_is_for(monkeypatch, capability, mlp, gradient):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    limits = (product_library.product_limit, product_library.weight_gradient_limit)
    for limit, runs in zip(limits, (mlp, gradient)):
        reason = limit(torch.bfloat16, (8, 64, 32))
        assert reason is None if runs else f"compute capability {capability[0]}.{capability[1]}" in reason


def low_of(x: Tensor) -> Tensor:
    return x.bfloat16()


def test_what_the_library_does_not_take():
    assert product_library.product_limit(torch.bfloat16, (7, 64, 256)) is None
    for dtype, shape in ((torch.float16, (8, 64)), (torch.bfloat16, (8, 64, 33))):
        assert "take bfloat16 and widths that are multiples of 8" in product_library.product_limit(dtype, shape)
