from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops.join_streams import join_streams
from cavmae_fast.ops.layout import StreamLayout

LAYOUT = StreamLayout(2, (3, 5))


def plain(x, delta, layout, single):
    x = x if delta is None else x + delta
    joint = torch.cat(layout.streams(x), dim=1).flatten(0, 1)
    return torch.cat([x, joint]) if single else joint


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("layout", [LAYOUT, StreamLayout(3, (4,)), StreamLayout(1, (1, 2, 3))], ids=str)
@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16])
def test_the_same_bits_as_concatenated(single, layout, delta_dtype):
    if single and len(layout.lengths) == 3:
        return  # a layout has three streams at most
    x = torch.randn(layout.rows, 6, requires_grad=True)
    delta = None if delta_dtype is None else torch.randn(layout.rows, 6).to(delta_dtype).requires_grad_()
    leaves = [t for t in (x, delta) if t is not None]
    got, joined = join_streams(x, delta, layout, single=single)
    want = plain(x, delta, layout, single)
    assert torch.equal(got, want) and joined.rows == len(got)
    assert joined.lengths == (*(layout.lengths if single else ()), sum(layout.lengths))
    weight = torch.randn_like(want)
    found, exact = (torch.autograd.grad((result * weight).sum(), leaves) for result in (got, want))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_gradients():
    x, delta = (torch.randn(LAYOUT.rows, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for single in (True, False):
        assert torch.autograd.gradcheck(lambda *args, s=single: join_streams(*args, LAYOUT, single=s)[0], (x, delta))
