"""A whole model by the kernels, in Triton's interpreter, against the reference: operators alone do not show the chain."""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.models import CAVMAE
from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.reference import cavmae as reference
from tests.tiny import TINY, gradients, inputs, one_thread, pair, relative  # noqa: F401

CONFIG = TINY | {"audio_length": 32, "depth": 2, "modality_specific_depth": 1, "norm_pix_loss": True}
ONE_PASS = {"ONE_PASS": True, "OUTER": 32, "INNER": 32, "PER_SM": 1, "PEEL": False, "SUMS": True}


@pytest.mark.parametrize("changes", [{}, ONE_PASS], ids=["as-shipped", "one-pass-with-sums"])
def test_kernels_give_the_reference(changes):
    cases = configuration.read(configuration.shipped_file(configuration.INTERPRETED))["launches"]["attention_backward"]
    launches = {"attention_backward": {case: options | changes for case, options in cases.items()}}
    rows = []
    with configuration.trial({"implementations": {}, "launches": launches}), dispatch.override("triton"):
        for model in pair(CAVMAE, reference.CAVMAE, dtype=torch.float32, **CONFIG):
            torch.manual_seed(3)
            output = model(*inputs(CONFIG, 2, torch.float32), contrast_loss_weight=0.5)
            output.loss.backward()
            rows.append((output, gradients(model)))
    (got, ours), (want, theirs) = rows
    largest = max(float(g.norm()) for g in theirs.values())
    assert ours.keys() == theirs.keys()
    # float32 through some twenty layers: 1e-5 and less per layer, as for the other kernels against float32 references.
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want))
    steps = {n: float((g - theirs[n]).norm()) / max(float(theirs[n].norm()), 1e-3 * largest) for n, g in ours.items()}
    assert max(steps.values()) < 1e-3, steps
