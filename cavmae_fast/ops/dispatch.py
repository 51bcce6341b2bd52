"""How an operator reaches PyTorch, and which of its implementations runs.

Every operator is registered with `torch.library` under the name space `cavmae_fast` with one schema, one fake and some
implementations: `torch` (PyTorch's own kernels, on any device), `triton` (kernels of this package), `cuda` (those of the
library built from csrc/), and other forms of it by names of their own. Which one runs is decided for every call by
`choose`. What it follows, in this order:

1. `override(mode)` around the call;
2. the environment variable `CAVMAE_OPS`, whose values are the modes:
   - `torch`: PyTorch everywhere;
   - `triton`: Triton wherever it can run: on CUDA devices, and on the CPU under `TRITON_INTERPRET=1`;
   - `cuda`: the CUDA library where the operator has a kernel there that takes the call, and otherwise as in `auto`;
   - `auto`, the default: what comes next;
3. the user's own file, which `cavmae-fast tune` writes, then the checked-in file of the architecture (`configuration.py`);
4. PyTorch.

An implementation that cannot take a call (the operator has none of that kind, the device is a CPU, the dtype is float64,
a size is too large for its kernels) leaves it to PyTorch, and `Choice.reason` says why. An implementation that is asked
for and is not installed is an error.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cavmae_fast import compat
from cavmae_fast.errors import CavmaeError
from cavmae_fast.ops import _triton, configuration, native

NAMESPACE = "cavmae_fast"
MODES = ("auto", "torch", "triton", "cuda")
CPU_FORMS: set[str] = set()
"Names of forms that are for CPUs alone."
LABELS = {"torch": "PyTorch", "triton": "Triton", "cuda": "CUDA library"}

_library = torch.library.Library(NAMESPACE, "DEF")
_override: str | None = None
operators: dict[str, set[str]] = {}
"Operator -> the implementations that its forward or its backward has."
Limit = Callable[[str, torch.dtype, Sequence[int]], str | None]
_limits: dict[str, Limit] = {}
_implementations: dict[str, dict[str, Callable]] = {}
"Name of a registered operator, forward or backward -> implementation -> function."


class ModeError(CavmaeError, ValueError):
    """What is asked for does not exist."""

    exit_code = 2


class MissingImplementation(CavmaeError, RuntimeError):
    """An implementation was asked for by name and is not installed."""


class Choice(NamedTuple):
    """What runs, and why."""

    implementation: str
    "'torch', 'triton', 'cuda', or the name of another one: 'triton product', 'torch side by side', 'onednn'."
    reason: str
    "Why, as `cavmae-fast doctor` prints it."
    configuration: str
    "The target whose launch configurations the kernels take."

    def __str__(self) -> str:
        return f"{label(self.implementation)}: {self.reason}"


def family(implementation: str) -> str:
    """'triton' for 'triton product': what an implementation's kernels are written in."""
    return implementation.partition(" ")[0]


def label(implementation: str) -> str:
    """An implementation's name in a sentence."""
    kind, _, rest = implementation.partition(" ")
    if kind in LABELS:
        return f"{LABELS[kind]} {rest}".rstrip()
    return f"{LABELS['torch']} ({implementation})"


# ------------------------------------------------------------------------------------------------------------- modes


def mode() -> str:
    """The mode in force: `override` first, then the environment variable `CAVMAE_OPS`, then `auto`."""
    return _mode()[0]


def _mode() -> tuple[str, str]:
    """The mode in force, and who set it."""
    if _override is not None:
        return _override, f"override({_override!r})"
    if os.environ.get("CAVMAE_NATIVE", "") not in ("", "0"):
        raise ModeError("CAVMAE_NATIVE is set, but it selects nothing any more; CAVMAE_OPS=cuda selects the CUDA library")
    value = os.environ.get("CAVMAE_OPS", "auto")
    if value not in MODES:
        raise ModeError(f"CAVMAE_OPS is {value!r}; it must be one of {', '.join(MODES)}")
    return value, f"CAVMAE_OPS={value}"


@contextlib.contextmanager
def override(value: str) -> Iterator[None]:
    """Runs a block in the mode `value`, one of `MODES`, whatever the environment says."""
    global _override
    if value not in MODES:
        raise ModeError(f"mode is {value!r}; it must be one of {', '.join(MODES)}")
    before, _override = _override, value
    try:
        yield
    finally:
        _override = before


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ------------------------------------------------------------------------------------------------------------ choice


def choose(operator: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] = (), key: str = "") -> Choice:
    """The implementation of `operator` for tensors of `dtype` on `device`, the reason, and whose launches it takes.

    `shape` is what the operator's `limit` looks at (see `register`); empty: any that the kernels take. `key` is what
    the choice depends on besides (`configuration.implementation`). Raises ModeError for a mode that does not exist,
    MissingImplementation when one was asked for by name and is not installed.
    """
    asked, source = _mode()
    if asked in operators[operator] and (missing := _missing(asked)):
        raise MissingImplementation(f"{source} asks for {LABELS[asked]}, but {missing}")
    launches = _launches_on(device)
    candidates = [] if asked == "auto" else [(asked, source)]
    if asked in ("auto", "cuda"):
        candidates.append(_configured(operator, device, dtype, key))
    refusals = []
    for implementation, reason in candidates:
        refusal = _refusal(operator, implementation, device, dtype, shape)
        if refusal is None:
            return Choice(implementation, reason, launches)
        refusals.append(refusal)
    return Choice("torch", refusals[0], launches)


def _configured(operator: str, device: torch.device, dtype: torch.dtype, key: str) -> tuple[str, str]:
    """What the configuration files say: an implementation, and why it is the default."""
    others = operators[operator] - {"torch"}
    if device.type == "cuda":
        others = others - CPU_FORMS
    elif not interpreting():
        others = {name for name in others if family(name) not in LABELS}
    if not others:
        return "torch", "it has no kernel of this package" if device.type == "cuda" else "it has no other form on a CPU"
    target, name = configuration.target_of(device), configuration.name_of(dtype)
    if device.type == "cuda":
        _advise(target)
    origin = configuration.origin(target, operator, dtype, key)
    if origin is None:
        where = f"on {target}" if device.type == "cuda" else "on this CPU"
        return "torch", f"nothing is tuned for {name} {where}; `cavmae-fast tune` does it"
    return configuration.implementation(target, operator, dtype, key), f"{origin} ({name})"


@functools.cache
def _advise(target: str) -> None:
    """Says, once in a process, what to run where nothing is known of a GPU."""
    if any(content["implementations"] for _, content in configuration.layers(target)):
        return
    stale = configuration.stale_files(target)
    why = f" ({stale[-1]} was measured with other releases, so it is not used)" if stale else ""
    warnings.warn(
        f"cavmae_fast runs PyTorch's operators: its kernels are not tuned for {target}{why}; run `cavmae-fast tune` once",
        stacklevel=2,
    )


def _refusal(
    operator: str, implementation: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int]
) -> str | None:
    """Why `implementation` cannot take such a call; None when it can."""
    if implementation == "torch":
        return None
    if implementation not in operators[operator]:
        return f"it has no kernel for {label(implementation)}"
    if implementation in CPU_FORMS and device.type != "cpu":
        return "it is a form for CPUs"
    kind = family(implementation)
    if kind in LABELS:  # for GPUs
        if dtype == torch.float64:
            return "kernels count in float32, and the call is in float64"
        if device.type != "cuda" and not (kind == "triton" and interpreting()):
            return "the device is a CPU"
    limit = _limits.get(operator)
    return _missing(kind) or (limit(implementation, dtype, shape) if limit and shape else None)


def _launches_on(device: torch.device) -> str:
    """The target whose launch configurations kernels take on `device`."""
    return configuration.target_of(device) if device.type == "cuda" else configuration.INTERPRETED


def _missing(implementation: str) -> str | None:
    """What is not installed that `implementation` needs, with how to get it; None when all is there."""
    if implementation == "triton" and not _triton.AVAILABLE:
        return "Triton is not installed: pip install triton (Linux)"
    if implementation == "cuda" and native.library() is None:
        return f"{native.LIBRARY} does not exist; build it: {native.HOW_TO_BUILD}"
    return None


# ---------------------------------------------------------------------------------------------------- registration


def register(
    name: str,
    schema: str,
    *,
    torch: Callable,
    triton: Callable | None = None,
    cuda: Callable | None = None,
    kernels: Mapping[str, Callable] | None = None,
    forms: Mapping[str, Callable] | None = None,
    elsewhere: Sequence[str] = (),
    fake: Callable,
    limit: Limit | None = None,
    shape: Callable[..., Sequence[int]] | None = None,
    dtype: Callable[..., torch.dtype] | None = None,
    caller_chooses: bool = False,
) -> Callable:
    """Registers `cavmae_fast::name` and returns its callable.

    `name_backward` belongs to the operator `name`: the choice is made for both by the operator's name, and a part without
    the chosen implementation runs `torch`. The first tensor among the arguments decides the device, the narrowest
    floating-point dtype among them the dtype (but float64, where there is one). Where the first argument is a list of
    tensors, these alone decide.

    Args:
        schema: the part after the name, `(Tensor x, float eps) -> Tensor`.
        torch, triton, cuda: take the schema's arguments and return new tensors that alias no input. `triton` is also
            given `architecture`, the target whose launch configurations its kernels take (`configuration.launch`).
        kernels: other implementations for GPUs by name, whose first word is 'triton', 'cuda' or 'torch'; they take what
            those of that name take. No mode asks for them: they run where they were tuned.
        forms: other implementations for CPUs by name, from PyTorch's operators, which `cavmae-fast tune` tries too.
        elsewhere: names of implementations that the caller runs itself when `choose` gives them.
        fake: returns empty tensors of the same shapes and strides.
        limit: (implementation, dtype, shape) -> why the kernels of that implementation cannot take a call, or None.
        shape: arguments -> the shape that `limit` is given. Default: the first tensor's.
        dtype: arguments -> the dtype that the choice is made for, where it is not that of the rule above.
        caller_chooses: the schema's last argument is the implementation's name, which the caller had from `choose`:
            one choice for forward and backward. The implementations are not given it.
    """
    given = {"torch": torch, "triton": triton, "cuda": cuda, **(kernels or {}), **(forms or {})}
    implementations = {kind: function for kind, function in given.items() if function is not None}
    operator = name.removesuffix("_backward")
    _implementations[name] = implementations
    operators.setdefault(operator, set()).update(implementations, elsewhere)
    CPU_FORMS.update(forms or ())
    if limit is not None:
        _limits[operator] = limit
    run = _runner(operator, implementations, shape or _first_shape, dtype, caller_chooses)
    return _bind(name, schema, run, fake)


def add_form(operator: str, form: str, *, forward: Callable | None = None, backward: Callable | None = None) -> None:
    """Adds another implementation to an operator that is registered: for experiments, and for the tuner to try.

    `form`: its name. The functions take what the operator's other implementations take; a missing one is PyTorch's.
    """
    operators[operator].add(form)
    for name, function in ((operator, forward), (f"{operator}_backward", backward)):
        if function is not None:
            _implementations[name][form] = function


def _runner(
    operator: str,
    implementations: dict[str, Callable],
    shape: Callable[..., Sequence[int]],
    dtype: Callable[..., torch.dtype] | None,
    caller_chooses: bool,
) -> Callable:
    """What PyTorch calls for the operator: it chooses, and runs what was chosen."""

    def run(*args):
        tensors = list(args[0]) if isinstance(args[0], list) else [arg for arg in args if isinstance(arg, Tensor)]
        device = tensors[0].device
        # Operators compute in the dtypes they are given: autocast, which modules alone read, must not change them.
        # Triton launches on the current device, which need not be that of the tensors.
        with compat.without_autocast(), torch.cuda.device_of(tensors[0]):
            if caller_chooses:
                *args, implementation = args
                if implementation not in implementations:
                    raise ModeError(f"{operator} got {implementation!r}; it has {', '.join(implementations)}")
                launches = _launches_on(device)
            else:
                choice = choose(operator, device, dtype(*args) if dtype else _dtype_of(tensors), shape(*args))
                implementation, launches = choice.implementation, choice.configuration
            function = implementations.get(implementation)
            if function is None:
                return implementations["torch"](*args)
            if family(implementation) == "triton":
                return function(*args, architecture=launches)
            return function(*args)

    return run


def _bind(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _first_shape(*args: object) -> Sequence[int]:
    first = args[0] if isinstance(args[0], list) else args
    return next(arg.shape for arg in first if isinstance(arg, Tensor))


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    if torch.float64 in dtypes:
        return torch.float64
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
