"""Every operator, forward and backward, at the models' shapes, for pytest-benchmark: by PyTorch's kernels, and on a GPU by
Triton's.

pytest benchmarks/bench_operators.py --benchmark-only -p benchmark
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cavmae_fast.ops import catalogue, dispatch
from cavmae_fast.ops.catalogue import BASE
from cavmae_fast.ops.join_streams import join_streams
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.parity import leaves
from cavmae_fast.ops.stream_mlp import stream_mlp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64 if DEVICE.type == "cuda" else 2
MODES = ("torch", "triton") if DEVICE.type == "cuda" else ("torch",)
CALLS = catalogue.pretraining(BATCH)
CASES = [(case, mode) for case in CALLS for mode in MODES if mode in dispatch.operators[case.operator]]


def forward_and_backward(benchmark, function: Callable, inputs: list) -> None:
    def step() -> None:
        outputs = [o for o in catalogue.outputs_of(function(*inputs)) if isinstance(o, Tensor) and o.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves(inputs), [torch.ones_like(o) for o in outputs])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize(("case", "mode"), CASES, ids=str)
def test_operator(benchmark, case, mode):
    with dispatch.override(mode):
        forward_and_backward(benchmark, case.ours, case.inputs(torch.bfloat16, DEVICE))


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def test_join_streams(benchmark):
    layout = StreamLayout(BATCH, (BASE.kept_a, BASE.kept_v))
    inputs = [draw(layout.rows, BASE.width, dtype=torch.float32), draw(layout.rows, BASE.width)]
    forward_and_backward(benchmark, lambda x, delta: join_streams(x, delta, layout, single=True), inputs)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_mlp(benchmark, fp8):
    """Of the decoder; in fp8 with the rounding of what is multiplied."""
    if fp8 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no fp8 units")
    layout, width = StreamLayout(BATCH, (BASE.total,)), BASE.decoder_width
    shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    inputs = [draw(layout.rows, width), *([draw(*shape)] for shape in shapes)]
    forward_and_backward(benchmark, lambda *args: stream_mlp(*args, layout, fp8=fp8), inputs)
