"""What `torch.library` asks of every operator, and `torch.compile` of every public function."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae_fast import ops
from cavmae_fast.ops import catalogue, dispatch
from cavmae_fast.ops.catalogue import Case
from cavmae_fast.ops.fp8 import GRADIENTS, VALUES
from cavmae_fast.ops.parity import flatten, run

for _module in pkgutil.iter_modules(ops.__path__):
    importlib.import_module(f"{ops.__name__}.{_module.name}")

SMALL = catalogue.small()
#: `test_autograd_registration` is not among them: it demands an autograd formula inside the operator, and ours stands
#: outside, in an autograd.Function around it. The tests of torch.compile below cover it.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


class RecordCalls(TorchDispatchMode):
    """Collects the calls of this project's operators that run beneath it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == dispatch.NAMESPACE:
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(case: Case) -> list[tuple[torch._ops.OpOverload, tuple]]:
    with RecordCalls() as record:
        run(case.ours, case.inputs(torch.float32))
    return record.calls


def detached(item):
    if isinstance(item, torch.Tensor):
        return item.detach()
    return [detached(i) for i in item] if isinstance(item, list | tuple) else item


@pytest.mark.parametrize("cases", [SMALL, catalogue.pretraining(2)], ids=["small", "pretraining"])
def test_every_operator_has_a_case(cases):
    assert {case.operator for case in cases} == set(dispatch.operators)


def test_no_two_cases_have_one_name():
    names = list(map(str, [*SMALL, *catalogue.pretraining(2), *catalogue.variants(2)]))
    assert len(set(names)) == len(names)


def test_cases_reach_every_operator():
    """Each operator's forward, and its backward where there is one."""
    namespace = getattr(torch.ops, dispatch.NAMESPACE)
    names = [name + suffix for name in dispatch.operators for suffix in ("", "_backward")]
    wanted = {getattr(namespace, name).default for name in names if hasattr(namespace, name)}
    assert len(wanted) > len(dispatch.operators)
    for case in SMALL:
        called = {operator for operator, _ in calls_of(case)}
        assert getattr(namespace, case.operator).default in called, f"{case} does not call its operator"
        wanted -= called
    assert not wanted


def test_operators_run_on_their_tensors_device(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    entered = []

    class Guard(torch.cuda.device_of):
        def __enter__(self):
            entered.append(self)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for case in SMALL:
        before = len(entered)
        run(case.ours, case.inputs(torch.float32))
        assert len(entered) - before >= 1 + case.differentiable, f"{case}: forward and backward"


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in SMALL for mode in ("torch", "triton") if mode in dispatch.operators[case.operator]],
    ids=str,
)
def test_opcheck(case, mode):
    with dispatch.override(mode):
        for operator, arguments in calls_of(case):
            # PyTorch's check of the schema compares tensors in a way that it does not have for fp8.
            in_fp8 = any(isinstance(x, torch.Tensor) and x.dtype in (VALUES, GRADIENTS) for x in flatten(arguments))
            checks = [check for check in CHECKS if not (in_fp8 and check == "test_schema")]
            torch.library.opcheck(operator, tuple(detached(arguments)), test_utils=checks)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_whole(case):
    torch.compiler.reset()
    inputs = case.inputs(torch.float32)
    want, want_gradients, cotangents = run(case.ours, inputs)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    got, got_gradients, _ = run(compiled, inputs, cotangents)
    assert len(got) == len(want) and len(got_gradients) == len(want_gradients)
    assert bool(got_gradients) == case.differentiable
    for a, b in zip([*got, *got_gradients], [*want, *want_gradients]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_autocast_changes_nothing(case):
    """Modules alone read autocast: an operator computes in the dtypes it is given."""
    inputs = case.inputs(torch.float32)
    want, want_gradients, cotangents = run(case.ours, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_gradients, _ = run(case.ours, inputs, cotangents)
    for a, b in zip([*got, *got_gradients], [*want, *want_gradients]):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.slow
def test_inductor(monkeypatch, tmp_path):
    """A chain of operators compiled for good: it runs, and gives what eager execution gives."""
    torch.compiler.reset()
    # The cache on disk is not keyed by the instructions that ATEN_CPU_CAPABILITY allows: code compiled under one setting
    # gives wrong numbers, or does not compile, under another.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    chosen = [case for case in SMALL if str(case) in ("stream_layer_norm-delta", "linear_gelu-shared")]
    norm, mlp = chosen
    inputs = [norm.inputs(torch.float32), mlp.inputs(torch.float32)[1:]]

    def block(norm_inputs, mlp_inputs):
        x, y = norm.ours(*norm_inputs)
        return x.mean() + mlp.ours(y * 2, *mlp_inputs).square().mean()

    want, want_gradients, cotangents = run(block, inputs)
    got, got_gradients, _ = run(torch.compile(block, fullgraph=True), inputs, cotangents)
    assert len(got_gradients) == sum(isinstance(t, torch.Tensor) for t in flatten(inputs))
    torch.testing.assert_close([*got, *got_gradients], [*want, *want_gradients])
