"""The rule by which operators are judged: what it lets pass, what it does not, and what it does with memory."""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import parity
from cavmae_fast.ops.parity import NEARBY, assert_parity, compare, in_float64, nearby

X = torch.linspace(0.5, 2.0, 5)


def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


def off_by(errors: list[float]):
    """`cube` in float64, wrong by the relative `errors`, one a call, in turn."""
    calls = iter(errors)
    return lambda x: cube(x.double()) * (1 + next(calls))


@pytest.mark.parametrize(("lucky", "passes"), [(0, True), (1, True), (NEARBY, True), (NEARBY + 1, False)])
def test_a_baseline_that_was_lucky_is_asked_again(lucky, passes):
    """It errs by 1e-4 but for its first `lucky` calls, on which it is exact; the operator errs by 1.5e-4."""
    baseline = off_by([0.0] * lucky + [1e-4] * (NEARBY + 1 - lucky))
    (result,) = compare(off_by([1.5e-4]), cube, [X], baseline=baseline, floor=0.0)
    assert result.right == passes
    assert result.error == pytest.approx(1.5e-4) and result.allowed == pytest.approx(2e-4 if passes else 0.0)


def test_an_operator_worse_than_twice_its_baseline_fails():
    with pytest.raises(AssertionError, match=r"output 0: relative error 2\.10e-04, allowed 2\.00e-04"):
        assert_parity(off_by([2.1e-4]), cube, [X], baseline=off_by([1e-4] * (NEARBY + 1)), floor=0.0)


def test_no_further_inputs_are_drawn_when_the_first_suffice():
    compare(off_by([1e-4]), cube, [X], baseline=off_by([1e-4]), floor=0.0)  # a second call would raise StopIteration


@pytest.mark.parametrize("wrong", [lambda x: x * torch.nan, lambda x: torch.empty(5)], ids=["nan", "unwritten"])
def test_nan_is_never_right(wrong):
    (result,) = compare(wrong, cube, [X], floor=1e9)
    assert not result.right


def test_gradients_are_compared():
    x = X.clone().requires_grad_()
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_parity(lambda x: x.detach() ** 3 + (x - x.detach()), cube, [x])


@pytest.mark.parametrize("place", [-1, 5])
def test_a_store_outside_an_output_is_found(place):
    def store(x):
        out = torch.empty(5)
        out.copy_(cube(x))
        out.as_strided((1,), (1,), out.storage_offset() + place).fill_(0.0)
        return out

    with pytest.raises(AssertionError, match="wrote outside an output of 5 elements"):
        assert_parity(store, cube, [X])


def test_a_load_outside_an_input_is_found():
    def load(x):
        return cube(x) + x.as_strided((1,), (1,), x.storage_offset() + 5)

    with pytest.raises(AssertionError, match="output 0: relative error nan"):
        assert_parity(load, cube, [X])


def test_nearby_inputs():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    ids, pixels = torch.arange(1000), torch.tensor([0, 128, 255], dtype=torch.uint8).repeat(100)
    moved, (again,), same_ids, near, none = nearby([x, [x], ids, pixels, None], seed=1)
    assert moved.requires_grad and moved.is_leaf and moved.dtype == x.dtype and not torch.equal(moved, again)
    distance = (moved.detach().double() / x.detach().double() - 1).abs() / torch.finfo(x.dtype).eps
    assert 2 < distance.max() <= parity.ULPS + 0.5 and (distance > 0).double().mean() > 0.8
    assert torch.equal(same_ids, ids) and none is None
    steps = near.long() - pixels.long()
    assert set(steps.tolist()) == {-1, 0, 1} and near[pixels == 0].max() == 1 and near[pixels == 255].min() == 254
    assert torch.equal(nearby([x], 1)[0], moved) and not torch.equal(nearby([x], 2)[0], moved)


def test_float64_inputs_keep_what_is_no_float():
    x, ids = in_float64([X.half(), torch.arange(3)])
    assert x.dtype == torch.float64 and ids.dtype == torch.int64
