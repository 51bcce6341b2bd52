"""The update of Adam: both implementations against the reference, and what a step may be given besides."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import catalogue, dispatch
from cavmae_fast.ops.adam_update import adam_update
from cavmae_fast.ops.parity import assert_parity, flatten, repeats

CASES = [case for case in catalogue.small() if case.operator == "adam_update"]
MODES = ("torch", "triton")
FILE = importlib.import_module("cavmae_fast.ops.adam_update")
"The file, not the operator of the same name."


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity(mode, case, dtype):
    with dispatch.override(mode):
        inputs = case.inputs(dtype)
        assert_parity(case.ours, case.reference, inputs, baseline=case.baseline)
        assert repeats(case.ours, inputs)


def tensors(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (5, 130)) -> list[list[Tensor]]:
    """Gradients, weights, moments, steps."""
    generator = torch.Generator().manual_seed(0)
    groups = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(4)]
    return [
        [g.to(dtype) for g in groups[0]],
        *groups[1:3],
        [v.square() for v in groups[3]],
        [torch.zeros(()) for _ in sizes],
    ]


def update(mode: str, groups: list[list[Tensor]], **changes) -> None:
    options = {"rate": None, "lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    options |= {"decoupled": True, "maximize": False, "grad_scale": None, "found_inf": None}
    rounded = changes.pop("rounded", [])
    with dispatch.override(mode):
        adam_update(*groups, rounded, *(options | changes).values())


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("step", [0, 1, 30, 10_000, 3_000_000])
def test_bias_correction(step, beta2):
    """From the first step to the last, for fast and slow averages, to the last digits of float32."""
    groups = tensors()
    for t in groups[4]:
        t.fill_(step)
    want = [x.double() for x in groups[1]]
    wide = [[x.double() for x in group] for group in (groups[0], want, *groups[2:4])] + [[t.clone() for t in groups[4]]]
    update("torch", wide, beta2=beta2)
    update("triton", groups, beta2=beta2)
    for got, exact in zip(groups[1], wide[1]):
        assert torch.allclose(got.double(), exact, rtol=2e-6, atol=1e-7)
    assert all(float(t) == step + 1 for t in groups[4])


@pytest.mark.parametrize(
    "changes", [{"maximize": True}, {"decoupled": False}, {"weight_decay": 0.0}, {"beta1": 0.0}], ids=str
)
def test_options_are_those_of_pytorch(changes):
    one, other = tensors(), tensors()
    update("torch", one, **changes)
    update("triton", other, **changes)
    for a, b in zip(flatten(one), flatten(other), strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_rate_may_lie_on_the_device(mode):
    one, other = tensors(), tensors()
    update(mode, one, lr=2**-6)
    update(mode, other, lr=0.0, rate=torch.tensor(2**-6))
    assert all(torch.equal(a, b) for a, b in zip(flatten(one), flatten(other)))


@pytest.mark.parametrize("mode", MODES)
def test_found_inf_changes_nothing(mode):
    groups, before = tensors(), tensors()
    rounded = [torch.zeros_like(p, dtype=torch.float16) for p in groups[1]]
    groups[0][0].fill_(float("inf"))
    before[0][0].fill_(float("inf"))
    update(mode, groups, found_inf=torch.ones(()), rounded=rounded)
    assert all(torch.equal(a, b) for a, b in zip(flatten(groups), flatten(before)))
    update(mode, groups, found_inf=torch.zeros(()), rounded=rounded)
    assert all(float(t) == 1 for t in groups[4]) and not torch.equal(groups[1][1], before[1][1])
    assert torch.equal(rounded[1], groups[1][1].half())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scale_divides_and_leaves_divided(mode, dtype):
    plain, scaled = tensors(dtype), tensors(dtype)
    for g in scaled[0]:
        g.mul_(8)
    update(mode, plain)
    update(mode, scaled, grad_scale=torch.tensor(8.0))
    assert all(torch.equal(a, b) for a, b in zip(flatten(plain), flatten(scaled), strict=True))


def test_tensors_at_odd_addresses():
    """Views into a buffer, of which some begin between two multiples of 16 bytes."""
    plain = tensors(sizes=(40, 40, 40))
    buffers = [torch.zeros(200) for _ in range(4)]
    views = [[buffer[start : start + 40] for start in (0, 41, 83)] for buffer in buffers]
    for group, copies in zip(plain, views):
        for x, copy in zip(group, copies):
            copy.copy_(x)
    update("triton", [*views, [torch.zeros(()) for _ in range(3)]])
    update("triton", plain)
    assert all(torch.equal(a, b) for a, b in zip(flatten(plain[:4]), flatten(views)))
    assert all(not buffer[40] and not buffer[81:83].any() and not buffer[123:].any() for buffer in buffers)


class FakeDevice:
    type = "cuda"


def test_every_table_of_a_captured_step_has_memory(monkeypatch):
    """A step has one for each dtype and alignment; each takes pinned memory that the step before left."""
    capturing, device = [False], FakeDevice()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: self.clone())
    tables = FILE._Tables()
    step = [[(1,) * 7] * 3, [(2,) * 7] * 5, [(3,) * 7] * 3]
    capturing[0] = True
    with pytest.raises(RuntimeError, match="captured in a CUDA graph before one ran"):
        tables.get(step[0], device)
    capturing[0] = False
    for rows in step:
        tables.get(rows, device)
    for _ in range(2):  # it may be captured again after another step
        capturing[0] = True
        moved = [[(row[0] + 10, *row[1:]) for row in rows] for rows in step]
        assert [tables.get(rows, device).tolist() for rows in moved] == [[list(r) for r in rows] for rows in moved]
        with pytest.raises(RuntimeError, match="captured in a CUDA graph before one ran"):
            tables.get([(9,) * 7] * 5, device)
        assert [tables.get(rows, device).tolist() for rows in step] == [[list(r) for r in rows] for rows in step]  # known
        capturing[0] = False
        for rows in step:
            tables.get(rows, device)
