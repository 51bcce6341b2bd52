"""Products on two CUDA streams: which runs where, what waits for what, and that a missing wait would be seen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae_fast.ops import dispatch, side_by_side
from cavmae_fast.ops.configuration import trial
from cavmae_fast.ops.linear_products import SIDE_BY_SIDE
from cavmae_fast.tuning import plan, search

CPU = torch.device("cpu")
ROWS = [10, 14]


class Device:
    """A stand-in for CUDA's streams. Every product is computed at once, and noted on the stream that it was launched on;
    a stream sees what is on it, and what was on another when it waited for that one."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        self.main = self.current = Stream(self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: Stream(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        side_by_side._side_stream.cache_clear()

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, device: Device) -> None:
        self.device, self.seen, self.launched = device, set(), []

    def launch(self, name: str) -> None:
        self.device.count += 1
        self.launched.append(name)
        self.seen.add(self.device.count)

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen


class Launches(TorchDispatchMode):
    """Products, by the stream that is current; each must see the inputs, which were launched before (`inputs`)."""

    def __init__(self, device: Device, inputs: set[int]) -> None:
        super().__init__()
        self.device, self.inputs = device, inputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            assert self.inputs <= self.device.current.seen
            self.device.current.launch(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    yield Device(monkeypatch)
    side_by_side._side_stream.cache_clear()


def implementation(name: str):
    return dispatch._implementations[name][SIDE_BY_SIDE], dispatch._implementations[name]["torch"]


def check(device: Device, name: str, arguments: list, here: list[str], beside: list[str]) -> None:
    """The same bits as PyTorch's; `here` on the caller's stream, `beside` on the other, and the caller sees all of it."""
    function, plain = implementation(name)
    device.main.launch("inputs")
    with Launches(device, set(device.main.seen)):
        results = function(*arguments)
    assert device.current is device.main and len(device.main.seen) == device.count
    assert device.main.launched[1:] == here
    assert side_by_side._side_stream(CPU).launched == beside
    results, wanted = (r if isinstance(r, tuple) else (r,) for r in (results, plain(*arguments)))
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def layers(count: int, n: int, k: int) -> tuple[list, list]:
    return tensors(*[(n, k)] * count), tensors(*[(n,)] * count)


@pytest.mark.parametrize("name", ["stream_linear", "linear_gelu"])
def test_forward(device, name):
    (x,), (weights, biases) = tensors((24, 6)), layers(2, 5, 6)
    more = [True] if name == "linear_gelu" else []
    check(device, name, [x, weights, biases, ROWS, *more], ["addmm"], ["addmm"])


@pytest.mark.parametrize("needs_dx", [True, False])
def test_backward(device, needs_dx):
    (dout, x), (weights, _) = tensors((24, 5), (24, 6)), layers(2, 5, 6)
    each = ["mm", "mm"] if needs_dx else ["mm"]
    check(device, "stream_linear_backward", [dout, x, weights, ROWS, torch.float32, needs_dx], each, each)


def test_backward_of_the_gelu(device):
    (dy, pre, x), (weights, _) = tensors((24, 5), (24, 5), (24, 6)), layers(2, 5, 6)
    check(device, "linear_gelu_backward", [dy, pre, x, weights, ROWS, torch.float32, True], ["mm", "mm"], ["mm", "mm"])


def test_hidden_gradient(device):
    dout, pre, *weights = tensors((24, 6), (24, 5), (6, 5), (6, 5))
    check(device, "hidden_gradient", [dout, pre, weights, ROWS, torch.float32], ["mm"], ["mm"])


def test_one_weight_has_both_gradients_beside_each_other(device):
    (dout, x), (weights, _) = tensors((24, 5), (24, 6)), layers(1, 5, 6)
    check(device, "stream_linear_backward", [dout, x, weights, [24], None, True], ["mm"], ["mm"])


def test_one_product_stays_where_it_is(device):
    (x,), (weights, biases) = tensors((24, 6)), layers(1, 5, 6)
    check(device, "stream_linear", [x, weights, biases, [24]], ["addmm"], [])


def test_what_failed_is_waited_for_too(device):
    def fail() -> None:
        raise RuntimeError("in a launch")

    def launch() -> None:
        device.current.launch("a product")

    with pytest.raises(RuntimeError, match="in a launch"):
        side_by_side.side_by_side([fail, launch], CPU)
    assert device.current is device.main and len(device.main.seen) == device.count == 1


@pytest.mark.parametrize("forgotten", ["fork", "join"])
def test_a_missing_wait_is_seen(device, monkeypatch, forgotten):
    """These tests can fail."""
    wait = Stream.wait_stream

    def forget(self, other):
        if (self is device.main) != (forgotten == "join"):
            wait(self, other)

    monkeypatch.setattr(Stream, "wait_stream", forget)
    with pytest.raises(AssertionError):
        test_hidden_gradient(device)


@pytest.mark.parametrize("operator", ["stream_linear", "linear_gelu", "hidden_gradient"])
def test_only_a_gpu_takes_it(monkeypatch, operator):
    (unit,) = plan.units(plan.Settings("tiny", 2, "float32", "cpu", (operator,)))
    with trial({"implementations": {operator: {"float32": SIDE_BY_SIDE}}, "launches": {}}):
        assert dispatch.choose(operator, CPU, torch.float32).implementation == "torch"
        assert "PyTorch side by side" not in [c.name for c in search.plain(unit, CPU)]
    monkeypatch.setattr(dispatch, "_refusal", lambda *args: None)  # as on a GPU
    assert "PyTorch side by side" in [c.name for c in search.plain(unit, CPU)]
