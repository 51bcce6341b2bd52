"""Whether an operator is right: its outputs and gradients beside a float64 reference, on any device.

    assert_parity(ours, reference, inputs)                      # in a test
    results = compare(ours, reference, inputs, baseline=...)    # in a benchmark: what, error, allowed

**The rule.** The error of a result is its relative distance from the reference in the 2-norm. It may be twice the error
that an explicit low-precision baseline makes on the same machine, plus the rounding of the result itself. So no tolerance
is a constant that somebody chose: where the arithmetic is hard, the baseline errs more too.

**Room for luck.** An error in the 2-norm is often made by a few elements (the logarithm of a nearly empty mel bin, a
probability near 1), so a baseline can happen to round them almost exactly, and then twice its error says nothing about
what float32 can do. In one such case (a single frame of log-mel energies) the baseline's error lies between 4.2e-7 and
11.8e-7, depending on the last bits of the samples. Therefore the baseline's error is the largest one of the inputs given
and of `NEARBY` inputs beside them: every number is moved by up to `ULPS` units in its last place, which leaves the problem
and its condition as they are and rounds everything anew. The reference is computed anew for each of them. If roundings
are independent, an operator that is as exact as the baseline passes unless all nine errors of the baseline are below half
of its own. An operator that is systematically worse than twice the baseline still fails: it is not given a second draw.
The nearby inputs are only computed when the inputs given do not suffice, which changes no verdict, because the largest
error can only grow.

**Memory.** The operator runs on copies of its inputs that lie between guards of NaN, and what it allocates is filled with
NaN and guarded too: reading past an input, leaving an element unwritten and writing past an output all show.

This module is for tests, benchmarks and the tuner; `import cavmae_fast` does not load it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GUARD = 64
"Elements before and after every allocation that must stay as they are."
NEARBY = 8
"Inputs beside those given, on which the baseline's error is measured when it may have been lucky."
ULPS = 4
"Units in the last place by which a number of the nearby inputs differs from the one given, at most (samples: 1)."


# ---------------------------------------------------------------------------------------------- inputs and their leaves


def flatten(items: Sequence) -> list:
    """The items, with those of lists and tuples among them in their place."""
    return [leaf for item in items for leaf in (flatten(item) if isinstance(item, list | tuple) else [item])]


def leaves(inputs: Sequence) -> list[Tensor]:
    """The tensors among `inputs` (and in lists among them) that require a gradient, in order."""
    return [t for t in flatten(inputs) if isinstance(t, Tensor) and t.requires_grad]


def convert(inputs: Sequence, change: Callable[[Tensor], Tensor]) -> list:
    """Inputs with every tensor replaced by a fresh leaf `change(tensor)` that requires a gradient where it did."""

    def one(item: Any) -> Any:
        if isinstance(item, Tensor):
            return change(item.detach()).requires_grad_(item.requires_grad)
        return [one(i) for i in item] if isinstance(item, list | tuple) else item

    return [one(item) for item in inputs]


def in_float64(inputs: Sequence) -> list:
    """Fresh leaves with every floating-point tensor in float64."""
    return convert(inputs, lambda t: t.double() if t.is_floating_point() else t)


def nearby(inputs: Sequence, seed: int) -> list:
    """Fresh leaves, every number moved by up to `ULPS` units in the last place; bytes and int16 (pixels and samples of
    sound) by up to 1. Wider integers and booleans are indices, counts and masks: they stay."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(x: Tensor) -> Tensor:
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        generator = generators[x.device]
        if x.is_floating_point():
            steps = torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generator) * 2 - 1
            return (x.double() * (1 + ULPS * torch.finfo(x.dtype).eps * steps)).to(x.dtype)
        if x.dtype in (torch.uint8, torch.int16):
            limits = torch.iinfo(x.dtype)
            steps = torch.randint(-1, 2, x.shape, device=x.device, generator=generator)
            return (x.long() + steps).clamp(limits.min, limits.max).to(x.dtype)
        return x

    return convert(inputs, move)


# ------------------------------------------------------------------------------------------ poisoned and guarded memory


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

    def only_known(function: str, options: dict) -> None:
        if options:
            raise NotImplementedError(f"poisoned memory does not know {function}({', '.join(options)}=...)")

    def poisoned_empty(*size, dtype=None, device=None, **options):
        only_known("torch.empty", options)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return allocate(shape, dtype or torch.get_default_dtype(), device or torch.device("cpu"))

    def poisoned_empty_like(x, *, dtype=None, device=None, **options):
        only_known("torch.empty_like", options)
        return allocate(x.shape, dtype or x.dtype, device or x.device)

    def poisoned_new_empty(self, *size, dtype=None, device=None, **options):
        return poisoned_empty(*size, dtype=dtype or self.dtype, device=device or self.device, **options)

    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(torch, "empty_like", poisoned_empty_like),
        mock.patch.object(Tensor, "new_empty", poisoned_new_empty),
    ):
        yield
    for buffer in buffers:
        for edge in (buffer[:GUARD], buffer[-GUARD:]):
            whole = edge.isnan() if edge.dtype.is_floating_point else edge == _poison(edge.dtype)
            if not bool(whole.all()):
                count = buffer.numel() - 2 * GUARD
                raise AssertionError(f"a kernel wrote outside an output of {count} elements of {buffer.dtype}")


# ------------------------------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True)
class Result:
    """One output or gradient beside the reference."""

    what: str
    "'output 0', 'gradient of input 2' (counted among the inputs that require one)."
    error: float
    "Relative, in the 2-norm."
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is allowed; NaN never is."""
        return self.error <= self.allowed


def run(function: Callable, inputs: Sequence, cotangents: Sequence[Tensor] | None = None) -> tuple[list, list, list]:
    """`function(*inputs)` -> (outputs, gradients of the inputs that require one, cotangents used).

    Inputs may hold lists of tensors. Cotangents are drawn once, in float64, so that several implementations can share
    them.
    """
    outputs = function(*inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    differentiable = [o for o in outputs if o.requires_grad]
    if cotangents is None:
        cotangents = [
            torch.randn(o.shape, dtype=torch.float64, device=o.device, generator=generator)
            for o, generator in zip(differentiable, _generators(differentiable))
        ]
    gradients: Sequence[Tensor] = []
    if differentiable:
        weights = [c.to(o.device, o.dtype) for c, o in zip(cotangents, differentiable, strict=True)]
        gradients = torch.autograd.grad(differentiable, leaves(inputs), weights)
    return [o.detach() for o in outputs], list(gradients), list(cotangents)


def _generators(tensors: Sequence[Tensor]) -> list[torch.Generator]:
    """For each tensor the generator of its device, of one seed."""
    found = {device: torch.Generator(device).manual_seed(7) for device in {t.device for t in tensors}}
    return [found[t.device] for t in tensors]


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm; NaN anywhere gives NaN, which passes no comparison."""
    want = want.to(torch.float64)
    return float((got.to(want.device, torch.float64) - want).norm() / want.norm().clamp(min=1e-30))


def baseline_errors(baseline: Callable, reference: Callable, inputs: Sequence, cotangents: Sequence[Tensor]) -> list[float]:
    """The baseline's error of every output and gradient on `inputs`; 0 where both have none."""
    want, want_gradients, _ = run(reference, in_float64(inputs), cotangents)
    base, base_gradients, _ = run(baseline, convert(inputs, torch.clone), cotangents)
    return [error(b, w) for b, w in zip([*base, *base_gradients], [*want, *want_gradients], strict=True)]


class Standard:
    """What results must be on given inputs: computed once, for any number of functions to be held against it.

    Args:
        reference: plain, differentiable PyTorch, in any dtype.
        inputs: tensors, lists of tensors and other arguments; gradients are taken of the tensors that require one.
        baseline: an explicit low-precision implementation (None: `reference` in the inputs' own dtypes).
        floor: what is allowed beside twice the baseline's error (None: 2 units in the last place of the result's dtype,
            which is its rounding alone).
    """

    def __init__(
        self, reference: Callable, inputs: Sequence, *, baseline: Callable | None = None, floor: float | None = None
    ) -> None:
        self.reference, self.inputs, self.baseline, self.floor = reference, inputs, baseline or reference, floor
        want, want_gradients, self.cotangents = run(reference, in_float64(inputs))
        self.want, self.outputs = [*want, *want_gradients], len(want)
        base, base_gradients, _ = run(self.baseline, convert(inputs, torch.clone), self.cotangents)
        self.allowance = [error(b, w) for b, w in zip([*base, *base_gradients], self.want, strict=True)]
        self.nearby = 0

    def compare(self, function: Callable) -> list[Result]:
        """Outputs and gradients of `function(*inputs)`, by the rule above; it gets guarded copies of the inputs, and its
        allocations are poisoned. Raises AssertionError when a shape or a gradient's dtype is wrong, or when memory
        outside an output was written."""
        with poisoned_allocations():
            got, got_gradients, _ = run(function, convert(self.inputs, guarded), self.cotangents)
        dtypes, wanted_dtypes = [g.dtype for g in got_gradients], [t.dtype for t in leaves(self.inputs)]
        if dtypes != wanted_dtypes:
            raise AssertionError(f"the gradients have dtypes {dtypes}, their inputs {wanted_dtypes}")
        names = [f"output {i}" for i in range(self.outputs)]
        names += [f"gradient of input {i}" for i in range(len(self.want) - self.outputs)]
        errors, floors = [], []
        for name, value, exact in zip(names, [*got, *got_gradients], self.want, strict=True):
            if value.shape != exact.shape:
                raise AssertionError(f"{name}: shape {list(value.shape)}, not {list(exact.shape)}")
            eps = torch.finfo(value.dtype if value.is_floating_point() else torch.float32).eps
            errors.append(error(value, exact))
            floors.append(2 * eps if self.floor is None else self.floor)

        def results() -> list[Result]:
            allowed = [2 * near + rounding for near, rounding in zip(self.allowance, floors)]
            return [Result(*row) for row in zip(names, errors, allowed)]

        while self.nearby < NEARBY:
            if all(result.right or result.error != result.error for result in results()):
                break  # all are right, or the others NaN, which no allowance lets pass
            near = nearby(self.inputs, self.nearby)
            more = baseline_errors(self.baseline, self.reference, near, self.cotangents)
            self.allowance = [max(pair) for pair in zip(self.allowance, more)]
            self.nearby += 1
        return results()


def compare(
    function: Callable,
    reference: Callable,
    inputs: Sequence,
    *,
    baseline: Callable | None = None,
    floor: float | None = None,
) -> list[Result]:
    """Outputs and gradients of `function(*inputs)` beside those of `reference` in float64: `Standard`, for one function."""
    return Standard(reference, inputs, baseline=baseline, floor=floor).compare(function)


def assert_parity(
    function: Callable,
    reference: Callable,
    inputs: Sequence,
    *,
    baseline: Callable | None = None,
    floor: float | None = None,
) -> None:
    """AssertionError, naming the first, unless every result of `compare` is right."""
    for result in compare(function, reference, inputs, baseline=baseline, floor=floor):
        if not result.right:
            raise AssertionError(f"{result.what}: relative error {result.error:.2e}, allowed {result.allowed:.2e}")


def repeats(function: Callable, inputs: Sequence) -> bool:
    """Whether two runs of `function`, forward and backward, give the same bits; memory is poisoned as in `compare`."""
    with poisoned_allocations():
        outputs, gradients, cotangents = run(function, convert(inputs, guarded))
        again, gradients_again, _ = run(function, convert(inputs, guarded), cotangents)
    return all(torch.equal(a, b) for a, b in zip([*outputs, *gradients], [*again, *gradients_again], strict=True))
