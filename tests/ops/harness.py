"""How operators are tested: poisoned and guarded memory, an fp64 reference, tolerances relative to a baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

GUARD = 64
"Elements before and after every allocation that must stay as they are."


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 3


def guarded(x: Tensor) -> Tensor:
    """A copy of `x` inside a larger poisoned buffer: a load outside it that is used turns the result into NaN."""
    buffer = torch.full((x.numel() + 2 * GUARD,), _poison(x.dtype), dtype=x.dtype, device=x.device)
    inner = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    inner.copy_(x.detach())
    return inner.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within, `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return poisoned memory between guards, which must
    be whole at the end: an element that is not written shows as NaN, a store outside raises AssertionError."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(torch.Size(shape).numel())
        buffer = empty((count + 2 * GUARD,), dtype=dtype, device=device).fill_(_poison(dtype))
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(*shape) if len(shape) else buffer[GUARD : GUARD + 1].view(())

    def poisoned_empty(*size, dtype=None, device=None, **kwargs):
        assert not kwargs, f"the harness does not know torch.empty({kwargs})"
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return allocate(shape, dtype or torch.get_default_dtype(), device or torch.device("cpu"))

    def poisoned_empty_like(x, *, dtype=None, device=None, **kwargs):
        assert not kwargs, f"the harness does not know torch.empty_like({kwargs})"
        return allocate(x.shape, dtype or x.dtype, device or x.device)

    def poisoned_new_empty(self, *size, dtype=None, device=None, **kwargs):
        return poisoned_empty(*size, dtype=dtype or self.dtype, device=device or self.device, **kwargs)

    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(torch, "empty_like", poisoned_empty_like),
        mock.patch.object(Tensor, "new_empty", poisoned_new_empty),
    ):
        yield
    for buffer in buffers:
        for edge in (buffer[:GUARD], buffer[-GUARD:]):
            whole = edge.isnan() if edge.dtype.is_floating_point else edge == _poison(edge.dtype)
            assert bool(whole.all()), f"a kernel wrote outside an output of {buffer.numel() - 2 * GUARD} elements"


def run(function: Callable, inputs: Sequence, cotangents: Sequence[Tensor] | None = None) -> tuple[list, list, list]:
    """`function(*inputs)` -> (outputs, gradients of the inputs that require one, cotangents used).

    Inputs may hold lists of tensors. Cotangents are drawn once, in fp64, so that several implementations can share them.
    """
    outputs = function(*inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    differentiable = [o for o in outputs if o.requires_grad]
    if cotangents is None:
        generator = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in differentiable]
    leaves = [t for t in flatten(inputs) if isinstance(t, Tensor) and t.requires_grad]
    gradients: Sequence = []
    if differentiable:
        weights = [c.to(o.device, o.dtype) for c, o in zip(cotangents, differentiable)]
        gradients = torch.autograd.grad(differentiable, leaves, weights)
    return [o.detach() for o in outputs], list(gradients), list(cotangents)


def flatten(inputs: Sequence) -> list:
    return [leaf for item in inputs for leaf in (flatten(item) if isinstance(item, list | tuple) else [item])]


def convert(inputs: Sequence, change: Callable[[Tensor], Tensor]) -> list:
    """Inputs with every tensor replaced by a fresh leaf `change(tensor)` that requires a gradient where it did."""
    def one(item):
        if isinstance(item, Tensor):
            return change(item.detach()).requires_grad_(item.requires_grad)
        return [one(i) for i in item] if isinstance(item, list | tuple) else item

    return [one(item) for item in inputs]


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm; NaN anywhere gives NaN, which passes no comparison."""
    want = want.to(torch.float64).cpu()
    return float((got.to(torch.float64).cpu() - want).norm() / want.norm().clamp(min=1e-30))


def assert_parity(
    function: Callable,
    reference: Callable,
    inputs: Sequence,
    *,
    baseline: Callable | None = None,
    floor: float | None = None,
) -> None:
    """Outputs and gradients of `function(*inputs)` against `reference` in fp64.

    Allowed: twice the error that `baseline` (default: `reference` in the inputs' own dtypes) makes, plus `floor`
    (default: 2 units in the last place of the coarsest floating dtype among the results, which is its rounding alone).
    """
    tensors = [t for t in flatten(inputs) if isinstance(t, Tensor)]
    exact = convert(inputs, lambda t: t.double() if t.is_floating_point() else t)
    want, want_gradients, cotangents = run(reference, exact)
    base, base_gradients, _ = run(baseline or reference, convert(inputs, torch.clone), cotangents)
    with poisoned_allocations():
        got, got_gradients, _ = run(function, convert(inputs, guarded), cotangents)
    leaves = [t for t in tensors if t.requires_grad]
    assert [g.dtype for g in got_gradients] == [t.dtype for t in leaves]
    names = [f"output {i}" for i in range(len(want))] + [f"gradient of input {i}" for i in range(len(leaves))]
    rows = zip(names, got + got_gradients, want + want_gradients, base + base_gradients)
    for name, value, exact_value, base_value in rows:
        assert value.shape == exact_value.shape, f"{name}: shape {list(value.shape)}, not {list(exact_value.shape)}"
        eps = torch.finfo(value.dtype if value.is_floating_point() else torch.float32).eps
        allowed = 2 * error(base_value, exact_value) + (2 * eps if floor is None else floor)
        measured = error(value, exact_value)
        assert measured <= allowed, f"{name}: relative error {measured:.2e}, allowed {allowed:.2e}"
