"""The candidates of a unit: what may take its place in the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cavmae_fast.ops import dispatch, native
from cavmae_fast.ops.attention import available_backends
from cavmae_fast.ops.attention_backends import BACKENDS
from cavmae_fast.ops.configuration import INTERPRETED, Content, alternatives, merge, name_of, target_of, trial
from cavmae_fast.ops.parity import flatten
from cavmae_fast.tuning.plan import Unit

PYTORCH = "PyTorch"
"The candidate that is there already: what runs without a choice."


@dataclass(frozen=True)
class Candidate:
    """A name for people and for the journal, and the entries of the configuration that make it run."""

    name: str
    implementation: str
    content: Content
    kernel: str | None = None
    "The kernel whose launch it changes; None for an implementation with the launches that it has."


def plain(unit: Unit, device: torch.device) -> list[Candidate]:
    """One for each implementation of the unit's operator that can run on `device`, PyTorch first."""
    known = dispatch.operators[unit.operator]
    names = ["torch", *sorted(known - {"torch", *BACKENDS})]
    if unit.operator == "attention":
        states = available_backends(device)
        names += [name for name in BACKENDS if states[name] == "available" and name != "sdpa"]
    if native.library() is None:
        names = [name for name in names if dispatch.family(name) != "cuda"]
    found = [Candidate(label(name), name, {"implementations": {unit.operator: {unit.case: name}}}) for name in names]
    return [candidate for candidate in found if _runs(candidate, unit, device)]


def label(implementation: str) -> str:
    """'PyTorch', 'Triton', or the name of another form as it is."""
    return dispatch.label(implementation) if dispatch.family(implementation) in dispatch.LABELS else implementation


def _runs(candidate: Candidate, unit: Unit, device: torch.device) -> bool:
    """Whether the dispatcher lets the implementation take such calls on `device`."""
    if dispatch.family(candidate.implementation) == "triton" and dispatch.interpreting() and unit.dtype == torch.bfloat16:
        return False  # the interpreter computes it wrongly
    case = unit.calls[0].case
    if unit.operator == "attention":
        layouts = [layout for call in unit.calls for layout in call.case.attention_of[:2]]
        shape = (case.head_width, max(length for layout in layouts for length in layout.lengths))
    else:
        shape = next(x.shape for x in flatten(case.inputs(unit.dtype, "meta")) if isinstance(x, Tensor))
    with dispatch.override("auto"), trial(candidate.content):
        return dispatch.choose(unit.operator, device, unit.dtype, shape, unit.key).implementation == candidate.implementation


def in_triton(candidates: list[Candidate]) -> list[Candidate]:
    """Those whose kernels have launches to choose from."""
    return [candidate for candidate in candidates if dispatch.family(candidate.implementation) == "triton"]


def launches(unit: Unit, triton: Candidate, recorded: Iterable[tuple[str, torch.dtype, str]], device: torch.device) -> list:
    """`triton` with another launch of one kernel, for every entry of the search space. `recorded`: the launches that the
    unit's calls asked for."""
    target = target_of(device) if device.type == "cuda" else INTERPRETED
    found = []
    for kernel, dtype, key in dict.fromkeys(recorded):
        case = f"{name_of(dtype)} {key}".rstrip()
        for options in alternatives(kernel, target, dtype, key):
            content = {**triton.content, "launches": {kernel: {case: options}}}
            name = f"{triton.name}, {kernel} {key}".rstrip() + f": {short(options)}"
            found.append(Candidate(name, triton.implementation, content, f"{kernel} {case}"))
    return found


def short(options: dict[str, Any]) -> str:
    """A launch in one line: 'BLOCK_R=4, num_warps=8'."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def combined(candidates: list[Candidate], seconds: dict[str, float], implementation: str = "triton") -> Candidate | None:
    """The best launch of each kernel of an implementation together; None where fewer than two have a better one than now."""
    candidates = [c for c in candidates if c.implementation == implementation]
    base = next((c for c in candidates if c.kernel is None), None)
    if base is None or base.name not in seconds:
        return None
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.kernel is None or seconds.get(candidate.name, float("inf")) >= seconds[base.name]:
            continue
        now = best.get(candidate.kernel)
        if now is None or seconds[candidate.name] < seconds[now.name]:
            best[candidate.kernel] = candidate
    if len(best) < 2:
        return None
    content: dict[str, Any] = {}
    for candidate in best.values():
        merge(content, candidate.content)
    return Candidate(f"{base.name}, best of {len(best)} kernels", base.implementation, content, "all")
