"""Every operator through PyTorch's own kernels, forward and backward, at the models' shapes, for pytest-benchmark.

pytest benchmarks/bench_operators.py --benchmark-only -p benchmark
"""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import catalogue, dispatch
from cavmae_fast.ops.parity import leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64 if DEVICE.type == "cuda" else 2


@pytest.mark.parametrize("case", catalogue.pretraining(BATCH), ids=str)
def test_operator(benchmark, case):
    inputs = case.inputs(torch.bfloat16, DEVICE)

    def step() -> None:
        outputs = [o for o in catalogue.outputs_of(case.ours(*inputs)) if o.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves(inputs), [torch.ones_like(o) for o in outputs])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with dispatch.override("torch"):
        benchmark.pedantic(step, rounds=5, iterations=1, warmup_rounds=1)
