"""The catalogue's calls, by the rule of `ops.parity`: what PyTorch computes must be right by the baseline that a call names.
A baseline that is more exact than PyTorch can be would let the tuner find every implementation wrong."""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import catalogue, dispatch
from cavmae_fast.ops.catalogue import Case
from cavmae_fast.ops.parity import assert_parity, repeats
from cavmae_fast.tuning.plan import MODELS, sizes_of

TINY = sizes_of(MODELS["tiny"].system)
CASES = [*catalogue.small(), *catalogue.pretraining(2, TINY), *catalogue.variants(2, TINY)]


@pytest.mark.parametrize("dtype", catalogue.case.LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorch_is_right(case: Case, dtype: torch.dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"the call is not made in {dtype}")
    inputs = case.inputs(dtype)
    with dispatch.override("torch"):
        assert_parity(case.ours, case.reference, inputs, baseline=case.baseline)
        assert repeats(case.ours, inputs)
