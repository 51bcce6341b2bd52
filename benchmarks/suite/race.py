"""Several functions of the same result on the same inputs: compared, then timed in turn, beside the shortest time there is.

Inputs rotate past the cache, so that no call finds its own there. The larger of bytes over copy bandwidth and operations
over the rate of products is the shortest time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import DTYPES, BenchmarkError, first_line
from benchmarks.throughput import release
from benchmarks.timing import captured, interleave, rotations
from cavmae_fast.ops import dispatch
from cavmae_fast.ops.catalogue import Case, outputs_of
from cavmae_fast.ops.parity import leaves

AGREE = 3e-2
"Relative difference from PyTorch eager in bf16 above which a contender is not timed; in float32 a thousandth of it."


class Contender(NamedTuple):
    """A function, and the mode of the operators in which it and its backward run."""

    function: Callable
    mode: str = "auto"


class Race:
    """Several functions of the same result on the same rotating inputs, forward and forward with backward."""

    def __init__(self, case: Case, batches: list[list], device: torch.device, dtype: str, rounds: int) -> None:
        self.case, self.batches, self.device, self.rounds = case, batches, device, rounds
        self.agree = AGREE if dtype != "fp32" else AGREE / 1000
        self.cotangents: list[list[Tensor]] = []
        self.want: list[Tensor] | None = None

    def call(self, contender: Contender, index: int, backward: bool) -> list[Tensor]:
        """Outputs and, with `backward`, the gradients of all leaves."""
        with dispatch.override(contender.mode):
            return self._call(contender.function, self.batches[index], index, backward)

    def _call(self, function: Callable, inputs: list, index: int, backward: bool) -> list[Tensor]:
        outputs = outputs_of(function(*inputs))
        if not backward:
            return outputs
        differentiable = [o for o in outputs if o.requires_grad]
        if len(self.cotangents) == index:
            generator = torch.Generator(self.device).manual_seed(index)
            self.cotangents.append(
                [torch.randn(o.shape, device=self.device, generator=generator).to(o.dtype) for o in differentiable]
            )
        return outputs + list(torch.autograd.grad(differentiable, leaves(inputs), self.cotangents[index]))

    def check(self, contender: Contender) -> float | None:
        """Largest relative difference from the first one checked; raises BenchmarkError when it is too large."""
        results = [t.detach().float() for t in self.call(contender, 0, self.case.differentiable)]
        if self.want is None:
            self.want = results
            return None
        worst = max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in zip(results, self.want, strict=True))
        if not worst <= self.agree:
            raise BenchmarkError(f"it differs from PyTorch eager by {worst:.1e}, and {self.agree:.0e} is allowed")
        return worst

    def run(self, contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
        """Contender -> difference, times of forward and of both, or why there are none."""
        rows: dict[str, dict[str, Any]] = {}
        for name, contender in contenders.items():
            try:
                rows[name] = {"difference": self.check(contender)}
            except Exception as error:  # a library that does not take these inputs is a finding
                rows[name] = {"reason": first_line(error)}
        self.want = None
        release(self.device)
        able = {name: contender for name, contender in contenders.items() if "reason" not in rows[name]}
        for key, backward in (("forward", False), ("both", True)):
            if backward and not self.case.differentiable:
                continue
            runs, clocks = {}, {}
            for name, contender in able.items():
                try:
                    runs[name], clocks[name] = self.clocked(contender, backward)
                except Exception as error:
                    rows[name]["reason"] = first_line(error)
            for name, times in interleave(runs, self.device, self.rounds).items():
                per_call = {k: v / len(self.batches) if k.endswith("_ms") else v for k, v in times.items()}
                rows[name][key] = per_call | {"clock": clocks[name]}
            runs.clear()
            release(self.device)
        return rows

    def clocked(self, contender: Contender, backward: bool) -> tuple[Callable[[], object], str]:
        """What to time, all inputs once over, and by which clock."""

        def run() -> None:
            for index in range(len(self.batches)):
                self.call(contender, index, backward)

        return captured(run, self.device) if self.case.capture else (run, "events" if self.on_gpu else "host")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def draw_batches(case: Case, dtype: str, device: torch.device) -> list[list]:
    """As many inputs, of different numbers, as it takes to rotate past the cache."""
    first = case.inputs(DTYPES[dtype], device)
    count = rotations(case.moved(*first)[0], device)
    return [first, *(case.inputs(DTYPES[dtype], device, seed) for seed in range(1, count))]


def add_floor(
    rows: dict[str, dict[str, Any]], case: Case, inputs: list, limits: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """The shortest time there is, forward and both, and each contender's share of it (1: it cannot be faster)."""
    forward, backward = case.moved(*inputs)
    passes = {"forward": (forward, case.forward_flops), "both": (forward + backward, 3 * case.forward_flops)}
    found = {}
    for key, (moved, flops) in passes.items():
        moving, multiplying = 1e-6 * moved / limits["copy_gb_per_s"], 1e-9 * flops / limits["gemm_tflops"][dtype]
        found[key] = {
            "bytes": moved,
            "flops": flops,
            "floor_ms": max(moving, multiplying),
            "bound": "bytes" if moving >= multiplying else "products",
        }
        for row in rows.values():
            if key in row:
                row[key]["share"] = found[key]["floor_ms"] / row[key]["median_ms"]
                row[key]["gb_per_s"] = 1e-6 * moved / row[key]["median_ms"]
                row[key]["tflops"] = 1e-9 * flops / row[key]["median_ms"]
    return found
