"""Sections of the suite that measure: `operators`, `attention`, `steps`, `breakdown`; and `pytest`, which checks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import torch
from common import DTYPES, ROOT, BenchmarkError, first_line, strip_paths
from report import Report
from throughput import (
    VARIANTS,
    Settings,
    Step,
    exact_float32,
    make_task,
    measure,
    release,
)
from timing import captured, ceilings, elapsed, interleave, rotations
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cavmae_fast.ops import registry
from cavmae_fast.ops.attention import attention, available_backends, query_attention

AGREE = 3e-2
"Relative difference from PyTorch eager in bf16 above which a contender is not timed; in float32 a thousandth of it."
PUBLISHED_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


# -------------------------------------------------------------------------------------------- one race of contenders


class Contender(NamedTuple):
    """A function, and the mode of the operators in which it and its backward run."""

    function: Callable
    mode: str = "auto"


class Race:
    """Several functions of the same result on the same rotating inputs, forward and forward with backward."""

    def __init__(self, drawn: list[cases.Case], device: torch.device, dtype: str, rounds: int) -> None:
        self.cases, self.device, self.rounds = drawn, device, rounds
        self.agree = AGREE if dtype != "fp32" else AGREE / 1000
        self.cotangents: list[list[Tensor]] = []
        self.want: list[Tensor] | None = None

    def call(self, contender: Contender, index: int, backward: bool) -> list[Tensor]:
        """Outputs and, with `backward`, the gradients of all leaves."""
        with registry.override(contender.mode):
            return self._call(contender.function, self.cases[index], index, backward)

    def _call(self, function: Callable, case: cases.Case, index: int, backward: bool) -> list[Tensor]:
        outputs = cases.outputs_of(function(*case.inputs))
        if not backward:
            return outputs
        differentiable = [o for o in outputs if o.requires_grad]
        if len(self.cotangents) == index:
            generator = torch.Generator(self.device).manual_seed(index)
            self.cotangents.append([
                torch.randn(o.shape, device=self.device, generator=generator).to(o.dtype) for o in differentiable
            ])  # fmt: skip
        return outputs + list(torch.autograd.grad(differentiable, case.leaves, self.cotangents[index]))

    def check(self, contender: Contender) -> float | None:
        """Largest relative difference from the first one checked; raises BenchmarkError when it is too large."""
        results = [t.detach().float() for t in self.call(contender, 0, bool(self.cases[0].leaves))]
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
            if backward and not self.cases[0].leaves:
                continue
            runs, clocks = {}, {}
            for name, contender in able.items():
                try:
                    runs[name], clocks[name] = self.clocked(contender, backward)
                except Exception as error:
                    rows[name]["reason"] = first_line(error)
            for name, times in interleave(runs, self.device, self.rounds).items():
                per_call = {k: v / len(self.cases) if k.endswith("_ms") else v for k, v in times.items()}
                rows[name][key] = per_call | {"clock": clocks[name]}
            runs.clear()
            release(self.device)
        return rows

    def clocked(self, contender: Contender, backward: bool) -> tuple[Callable[[], object], str]:
        """What to time, all inputs once over, and by which clock."""

        def run() -> None:
            for index in range(len(self.cases)):
                self.call(contender, index, backward)

        return captured(run, self.device) if self.cases[0].capture else (run, "events" if self.on_gpu else "host")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def draw_set(name: str, batch: int, dtype: str, device: torch.device, sizes: cases.Sizes) -> list[cases.Case]:
    """As many calls, of different numbers, as it takes to rotate past the cache."""
    first = cases.draw(name, batch, DTYPES[dtype], device, sizes)
    count = rotations(first.forward_bytes, device)
    return [first, *(cases.draw(name, batch, DTYPES[dtype], device, sizes, seed) for seed in range(1, count))]


def add_floor(rows: dict[str, dict[str, Any]], case: cases.Case, limits: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The shortest time there is, forward and both, and each contender's share of it (1: it cannot be faster)."""
    passes = {
        "forward": (case.forward_bytes, case.forward_flops),
        "both": (case.forward_bytes + case.backward_bytes, 3 * case.forward_flops),
    }
    found = {}
    for key, (moved, flops) in passes.items():
        moving, multiplying = 1e-6 * moved / limits["copy_gb_per_s"], 1e-9 * flops / limits["gemm_tflops"][dtype]
        found[key] = {
            "bytes": moved, "flops": flops, "floor_ms": max(moving, multiplying),
            "bound": "bytes" if moving >= multiplying else "products",
        }  # fmt: skip
        for row in rows.values():
            if key in row:
                row[key]["share"] = found[key]["floor_ms"] / row[key]["median_ms"]
                row[key]["gb_per_s"] = 1e-6 * moved / row[key]["median_ms"]
                row[key]["tflops"] = 1e-9 * flops / row[key]["median_ms"]
    return found


# -------------------------------------------------------------------------------------------------------- operators


def operators(report: Report) -> None:
    """Every operator at the models' shapes: our kernels, our PyTorch path, plain PyTorch eager and compiled."""
    device, tiny = report.device, report.tiny
    batch, sizes = (2, cases.TINY) if tiny else (128 if report.on_gpu else 2, cases.BASE)
    dtype = "fp32" if tiny else "bf16"
    limits = report.data["ceilings"] = ceilings(device, [dtype], tiny)
    report.data["settings"] = {"batch": batch, "dtype": dtype, "compiled": not tiny}
    for name in cases.builders(batch, sizes):
        drawn = draw_set(name, batch, dtype, device, sizes)
        case = drawn[0]
        contenders = {"eager": Contender(case.eager), "torch": Contender(case.ours, "torch")}
        if registry.operators.get(case.operator) and (report.on_gpu or registry.interpreting()):
            contenders["triton"] = Contender(case.ours, "triton")
        if not tiny:  # compiling takes minutes
            contenders["compile"] = Contender(torch.compile(case.eager, dynamic=False))
        rows = Race(drawn, device, dtype, 1 if tiny else 5).run(contenders)
        floors = add_floor(rows, case, limits, dtype)
        report.add("operators", {"operator": case.operator, "case": case.name, "floors": floors, "times": rows})
        torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------- attention


def _attend(case: cases.Case, backend: str, sdpa: SDPBackend | None = None) -> Contender:
    queries, layout, heads = case.attention_of

    def run(*inputs):
        with sdpa_kernel(sdpa) if sdpa is not None else contextlib.nullcontext():
            if queries == layout:
                return attention(*inputs, layout, heads, backend=backend)
            return query_attention(*inputs, queries, layout, heads, backend=backend)

    return Contender(run)


def attention_backends(report: Report) -> None:
    """Attention at the four shapes: our kernels beside PyTorch's, flash-attn's and xformers'."""
    device, tiny = report.device, report.tiny
    sizes, dtype = (cases.TINY, "fp32") if tiny else (cases.BASE, "bf16")
    limits = report.data["ceilings"] = ceilings(device, [dtype], tiny)
    states = report.data["available"] = available_backends(device)
    report.data["settings"] = {"dtype": dtype}
    for batch in (2,) if tiny else (64, 256) if report.on_gpu else (2,):
        for name in [n for n in cases.builders(batch, sizes) if n.startswith("attention")]:
            drawn = draw_set(name, batch, dtype, device, sizes)
            case = drawn[0]
            contenders = {"eager": Contender(case.eager)}
            packages = [n for n in ("triton", "flash_attn", "xformers") if states[n] == "available"]
            contenders |= {n: _attend(case, n) for n in packages}
            if report.on_gpu:
                contenders |= {n: _attend(case, "sdpa", backend) for n, backend in PUBLISHED_SDPA.items()}
            else:
                contenders |= {"torch": _attend(case, "torch"), "sdpa": _attend(case, "sdpa")}
            rows = Race(drawn, device, dtype, 1 if tiny else 5).run(contenders)
            floors = add_floor(rows, case, limits, dtype)
            report.add("attention", {"case": case.name, "batch": batch, "floors": floors, "times": rows})
            del drawn, case, contenders
            release(device)


# ------------------------------------------------------------------------------------------------------------ steps


def steps(report: Report) -> None:
    """The full training step at four batch sizes. Compiling takes a minute, so only the batch of the target has it."""
    device, tiny = report.device, report.tiny
    batches, ops = ((256, 128, 32, 512), "triton") if report.on_gpu else ((2,), "torch")
    base = Settings("tiny" if tiny else "base", ops=ops, steps=5 if report.on_gpu else 1, rounds=3)
    limits = report.data["ceilings"] = ceilings(device, ["bf16", "fp16"] if report.on_gpu else ["bf16"], tiny)
    bad = []
    for batch in (2, 4) if tiny else batches:
        compiled = ("sdpa-compile",) if batch == 256 else ()
        variants = ("published", *compiled, "fast", "fast-graph")
        chosen = Settings(base.model, batch, "bf16", variants, base.steps, base.rounds, "default", base.ops)
        row = report.add("steps", measure(chosen, device, limits))
        bad += [f"{v['name']} at batch {batch}" for v in row["variants"] if v["status"] in ("wrong", "failed")]
    if bad:
        raise BenchmarkError(f"no time for {', '.join(bad)}")


def breakdown(report: Report) -> None:
    """Time by kernel of one fast step (the profiler's, GPU time alone), and what share of the step the GPU is busy."""
    device = report.device
    batch = 256 if report.on_gpu else 2
    settings = Settings("tiny" if report.tiny else "base", batch, ops="triton" if report.on_gpu else "torch")
    report.data["settings"] = {"batch": batch, "dtype": settings.dtype, "variant": "fast"}
    with exact_float32():
        task = make_task(settings, device)
        release(device)
        step = Step(VARIANTS["fast"], settings, task, device)
        for _ in range(3):
            step.run()
        report.data["step_ms"] = elapsed(step.run, 3, device)
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU, activity.CUDA] if report.on_gpu else [activity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            step.run()
            if report.on_gpu:
                torch.cuda.synchronize(device)
    kernels = kernel_times(profile.key_averages(), report.on_gpu)
    total = sum(k["ms"] for k in kernels)
    report.data |= {"kernels_ms": total, "launches": sum(k["calls"] for k in kernels), "kernels": kernels[:40]}
    report.data["others_ms"] = sum(k["ms"] for k in kernels[40:])
    if not kernels:
        raise BenchmarkError("the profiler recorded no kernel")


def kernel_times(events: list, on_gpu: bool) -> list[dict[str, Any]]:
    """Kernels (on a CPU: operators) by their own time, the longest first. Ranges that code marks are left out."""
    found = []
    for event in events:
        if getattr(event, "is_user_annotation", False) or event.key.startswith(("ProfilerStep", "Optimizer.")):
            continue
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if ms > 0:
            found.append({"name": event.key[:200], "calls": event.count, "ms": ms})
    return sorted(found, key=lambda kernel: -kernel["ms"])


# ----------------------------------------------------------------------------------------------------------- pytest


def pytest(report: Report) -> None:
    """The tests marked `gpu`. Tests that need more than torch, triton, numpy and pytest lie elsewhere."""
    command = ["-m", "pytest", "-m", "gpu", "tests/ops", "-p", "no:cacheprovider"]
    report.data["command"] = " ".join(["python", *command])
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=report.limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        report.data["tail"] = strip_paths(output.decode() if isinstance(output, bytes) else output)[-6000:]
        raise BenchmarkError(f"the tests took more than {report.limit:.0f} s") from error
    lines = strip_paths(done.stdout + done.stderr).strip().splitlines()
    report.data |= {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "tail": "\n".join(lines[-60:])}
    if done.returncode != 0:
        raise BenchmarkError(f"pytest ended with exit code {done.returncode}: {report.data['summary']}")
