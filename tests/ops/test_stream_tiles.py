"""Sums over each stream's programs: in one level and in two, of one kind and of several."""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import configuration
from cavmae_fast.ops.parity import poisoned_allocations
from cavmae_fast.ops.stream_tiles import sum_of_streams


@pytest.mark.parametrize("programs", [[3, 0, 0], [64, 1, 0], [65, 2, 7], [200, 97, 1], [33, 129, 0]], ids=str)
@pytest.mark.parametrize("kinds", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("splits", [1, 4, 32])
def test_sums(programs, kinds, splits):
    streams = sum(count > 0 for count in programs)
    partial = torch.randn(sum(programs), *kinds, 70)
    launch = {"BLOCK_D": 64, "BLOCK_P": 32, "SPLITS": splits, "num_warps": 4}
    with configuration.trial({"implementations": {}, "launches": {"stream_sum": {"float32": launch}}}):
        with poisoned_allocations():
            got = sum_of_streams(partial, programs, streams, configuration.INTERPRETED)
        again = sum_of_streams(partial, programs, streams, configuration.INTERPRETED)
    want = torch.stack([part.double().sum(0) for part in partial.split(programs)[:streams]], dim=-2)
    assert got.shape == want.shape and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, again)
