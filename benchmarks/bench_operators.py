"""Every operator through PyTorch's own kernels, forward and backward, at the models' shapes, for pytest-benchmark.

pytest benchmarks/bench_operators.py --benchmark-only -p benchmark
"""

from __future__ import annotations

import cases
import pytest
import torch

from cavmae_fast.ops import registry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64 if DEVICE.type == "cuda" else 2


@pytest.mark.parametrize("name", cases.builders(BATCH))
def test_operator(benchmark, name):
    case = cases.draw(name, BATCH, torch.bfloat16, DEVICE)

    def step() -> None:
        outputs = [o for o in cases.outputs_of(case.ours(*case.inputs)) if o.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, case.leaves, [torch.ones_like(o) for o in outputs])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with registry.override("torch"):
        benchmark.pedantic(step, rounds=5, iterations=1, warmup_rounds=1)
