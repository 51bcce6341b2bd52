"""Sections of the suite that measure: `operators`, `attention`, `steps`, `breakdown`; and `pytest`, which checks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import ROOT, BenchmarkError, strip_paths
from benchmarks.suite.race import Contender, Race, add_floor, draw_batches
from benchmarks.suite.report import Report
from benchmarks.throughput import VARIANTS, Settings, Step, exact_float32, make_task, measure, release
from benchmarks.timing import ceilings, elapsed
from cavmae_fast.ops import catalogue, dispatch
from cavmae_fast.ops.attention import attention, available_backends, query_attention
from cavmae_fast.ops.catalogue import Case

PUBLISHED_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


# -------------------------------------------------------------------------------------------------------- operators


def operators(report: Report) -> None:
    """Every operator at the models' shapes: our kernels, our PyTorch path, plain PyTorch eager and compiled."""
    device, tiny = report.device, report.tiny
    batch, sizes = (2, catalogue.TINY) if tiny else (128 if report.on_gpu else 2, catalogue.BASE)
    dtype = "fp32" if tiny else "bf16"
    limits = report.data["ceilings"] = ceilings(device, [dtype], tiny)
    report.data["settings"] = {"batch": batch, "dtype": dtype, "compiled": not tiny}
    for case in catalogue.pretraining(batch, sizes):
        batches = draw_batches(case, dtype, device)
        contenders = {"eager": Contender(case.eager), "torch": Contender(case.ours, "torch")}
        if "triton" in dispatch.operators[case.operator] and (report.on_gpu or dispatch.interpreting()):
            contenders["triton"] = Contender(case.ours, "triton")
        if not tiny:  # compiling takes minutes
            contenders["compile"] = Contender(torch.compile(case.eager, dynamic=False))
        rows = Race(case, batches, device, dtype, 1 if tiny else 5).run(contenders)
        floors = add_floor(rows, case, batches[0], limits, dtype)
        report.add("operators", {"operator": case.operator, "case": case.name, "floors": floors, "times": rows})
        torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------- attention


def _attend(case: Case, backend: str, sdpa: SDPBackend | None = None) -> Contender:
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
    sizes, dtype = (catalogue.TINY, "fp32") if tiny else (catalogue.BASE, "bf16")
    limits = report.data["ceilings"] = ceilings(device, [dtype], tiny)
    states = report.data["available"] = available_backends(device)
    report.data["settings"] = {"dtype": dtype}
    for batch in (2,) if tiny else (64, 256) if report.on_gpu else (2,):
        for case in [c for c in catalogue.pretraining(batch, sizes) if c.attention_of is not None]:
            batches = draw_batches(case, dtype, device)
            contenders = {"eager": Contender(case.eager)}
            packages = [n for n in ("triton", "flash_attn", "xformers") if states[n] == "available"]
            contenders |= {n: _attend(case, n) for n in packages}
            if report.on_gpu:
                contenders |= {n: _attend(case, "sdpa", backend) for n, backend in PUBLISHED_SDPA.items()}
            else:
                contenders |= {"torch": _attend(case, "torch"), "sdpa": _attend(case, "sdpa")}
            rows = Race(case, batches, device, dtype, 1 if tiny else 5).run(contenders)
            floors = add_floor(rows, case, batches[0], limits, dtype)
            report.add("attention", {"case": case.name, "batch": batch, "floors": floors, "times": rows})
            del batches, contenders
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
