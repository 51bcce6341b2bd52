"""Every operator's kernels on a CUDA device, at the models' shapes: right, repeatable, and fit for a CUDA graph.

`CAVMAE_GPU_DRY_RUN=1` runs the same code without a device, at small shapes on the CPU (kernels in Triton's interpreter,
which has no bf16), so that the tests themselves can be tested; what needs a device is left out.
"""

from __future__ import annotations

import os

import pytest
import torch

from cavmae_fast.ops import catalogue, configuration, dispatch, native
from cavmae_fast.ops.catalogue import Case, outputs_of
from cavmae_fast.ops.parity import assert_parity, flatten, repeats, run
from cavmae_fast.ops.stream_linear import SIDE_BY_SIDE

CUDA = torch.cuda.is_available()
DRY_RUN = not CUDA and os.environ.get("CAVMAE_GPU_DRY_RUN") == "1"
DEVICE = "cuda" if CUDA else "cpu"
BATCH = 8
MODEL_CASES = [] if DRY_RUN else [*catalogue.pretraining(BATCH), *catalogue.variants(BATCH)]
CASES = [*MODEL_CASES, *catalogue.small()]
PAIRS = [(case, dtype) for case in CASES for dtype in case.dtypes]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not DRY_RUN, reason="needs a CUDA device"),
]
on_device = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def settings():
    """Triton's kernels; fp32 products in fp32, the reference's too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with dispatch.override("triton"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


def skip_without_bf16(dtype: torch.dtype) -> None:
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16")


def check_parity(case: Case, dtype: torch.dtype) -> None:
    skip_without_bf16(dtype)
    inputs = case.inputs(dtype, DEVICE)
    assert_parity(case.ours, case.reference, inputs, baseline=case.baseline)


def cotangents_of(case: Case, inputs: list) -> list[torch.Tensor]:
    """Random gradients of the outputs, where backward takes them: nothing is copied while a graph is captured."""
    outputs = outputs_of(case.ours(*inputs))
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs if o.requires_grad]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_parity(case, dtype):
    check_parity(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), [pair for pair in PAIRS if pair[1] != torch.float16], ids=str)
def test_repeats_bitwise(case, dtype):
    skip_without_bf16(dtype)
    inputs = case.inputs(dtype, DEVICE)
    cotangents = cotangents_of(case, inputs)
    first, first_gradients, _ = run(case.ours, inputs, cotangents)
    for _ in range(3):
        again, again_gradients, _ = run(case.ours, inputs, cotangents)
        for a, b in zip([*first, *first_gradients], [*again, *again_gradients]):
            assert torch.equal(a, b)


@on_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_graph(case):
    check_graph(case)


def check_graph(case: Case) -> None:
    """Forward and backward, captured once and replayed on new numbers, give what they give eagerly."""
    inputs = case.inputs(torch.bfloat16, DEVICE)
    cotangents = cotangents_of(case, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and fills caches, which capture forbids
        for _ in range(2):
            run(case.ours, inputs, cotangents)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_gradients, _ = run(case.ours, inputs, cotangents)

    with torch.no_grad():
        for leaf in flatten(inputs):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.mul_(-0.75)
        for value in (*captured, *captured_gradients):
            value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    eager, eager_gradients, _ = run(case.ours, inputs, cotangents)
    for a, b in zip([*captured, *captured_gradients], [*eager, *eager_gradients]):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", catalogue.small(), ids=str)
def test_tensors_on_another_than_the_current_device(case):
    assert torch.cuda.current_device() == 0
    inputs = case.inputs(torch.float32, "cuda:1")
    assert_parity(case.ours, case.reference, inputs, baseline=case.baseline)


@on_device
@pytest.mark.parametrize(("case", "dtype"), [p for p in PAIRS if "cuda" in dispatch.operators[p[0].operator]], ids=str)
def test_native_parity(case, dtype):
    """The same with the kernels of the CUDA library, where they take the call."""
    if native.library() is None:
        pytest.skip(f"the CUDA library is {native.status()}")
    with dispatch.override("cuda"):
        check_parity(case, dtype)


FORKED = [case for case in CASES if SIDE_BY_SIDE in dispatch.operators[case.operator]]


@on_device
@pytest.mark.parametrize("case", FORKED, ids=str)
def test_side_by_side(case):
    """Products on two streams: right, the same bits again, and captured with their fork and join."""
    choice = {"implementations": {case.operator: {"bfloat16": SIDE_BY_SIDE}}, "launches": {}}
    with dispatch.override("auto"), configuration.trial(choice):
        check_parity(case, torch.bfloat16)
        assert repeats(case.ours, case.inputs(torch.bfloat16, DEVICE))
        check_graph(case)
