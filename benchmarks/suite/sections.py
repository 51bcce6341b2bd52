"""Sections of the suite: `tune`, which chooses; those that measure; and `pytest`, which checks."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import DTYPES, ROOT, BenchmarkError, clocks
from benchmarks.suite.race import Contender, Race, add_floor, draw_batches
from benchmarks.suite.report import Report
from benchmarks.throughput import VARIANTS, Settings, Step, exact_float32, make_task, release
from benchmarks.timing import ceilings, elapsed, interleave, spin
from cavmae_fast.ops import catalogue, configuration, dispatch, native
from cavmae_fast.ops.attention import attention, available_backends, query_attention
from cavmae_fast.ops.catalogue import Case
from cavmae_fast.tuning import tune as tuning
from cavmae_fast.tuning.config import TuneConfig

TUNE_REST = 85.0
"Seconds of the section `tune` that are left for the whole step and for ending what is under way."
PUBLISHED_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


# -------------------------------------------------------------------------------------------------------- operators


def operators(report: Report) -> None:
    """Every operator at the models' shapes: our kernels, our PyTorch path, plain PyTorch eager and compiled."""
    device, tiny = report.device, report.tiny
    batch, sizes = (2, catalogue.TINY) if tiny else (report.batch, catalogue.BASE)
    dtype = "fp32" if tiny else "bf16"
    limits = report.data["ceilings"] = ceilings(device, [dtype], tiny)
    report.data["settings"] = {"batch": batch, "dtype": dtype, "compiled": not tiny}
    for case in [c for c in catalogue.pretraining(batch, sizes) if c.attention_of is None]:  # it has a section of its own
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
    for batch in (2,) if tiny else (report.batch,):
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


# ------------------------------------------------------------------------------------------------------------- tune


def tune(report: Report) -> None:
    """Proves, times and chooses what the operators are computed with; later sections run with it. What is found lies in
    the section's folder: the user's own file, a journal while it is not done, and the file that may ship."""
    architecture = configuration.target_of(report.device).partition(" ")[0]
    config = TuneConfig(
        model="tiny" if report.tiny else "base",
        batch="2" if report.tiny else str(report.batch),
        dtype="float32" if report.tiny else "bfloat16",
        device=str(report.device),
        operators=report.operators,
        minutes=max(0.1, (report.limit - TUNE_REST) / 60),
        rounds=1 if report.tiny else 7,
    )
    report.data["cuda_library"] = native.status().replace(f"{ROOT}{os.sep}", "")
    found = tuning.tune(config, progress=tuning.Lines)
    units = [{k: v for k, v in row.items() if k != "row"} for row in found["units"]]
    report.data |= {"settings": found["settings"].to_json(), "units": units, "step": found["step"]}
    report.data |= {"kept": found["kept"], "result": found["reason"], "left": found["left"]}
    if found["left"]:
        raise BenchmarkError(f"no time for {', '.join(found['left'])}; the same command goes on with them")
    tuning.export(report.path.parent / f"{architecture}.json", configuration.target_of(report.device))


# ---------------------------------------------------------------------------------------------------------- products


def products(report: Report) -> None:
    """Every product of the step, forward, dX and dW, as PyTorch computes it: time and share of the best rate."""
    device, batch = report.device, 2 if report.tiny else report.batch
    sizes = catalogue.TINY if report.tiny else catalogue.BASE
    dtype = "fp32" if report.tiny else "bf16"
    report.data["settings"] = {"batch": batch, "dtype": dtype}
    spin(device)
    for name, rows, k, n in _product_shapes(batch, sizes):
        x, w, dy = (torch.randn(*shape, device=device).to(DTYPES[dtype]) for shape in ((rows, k), (n, k), (rows, n)))
        bias = torch.randn(n, device=device).to(DTYPES[dtype])
        times = interleave(
            {
                "forward": lambda x=x, w=w, bias=bias: torch.nn.functional.linear(x, w, bias),
                "dx": lambda dy=dy, w=w: dy @ w,
                "dw": lambda dy=dy, x=x: dy.t() @ x,
            },
            device,
            1 if report.tiny else 5,
        )
        tflops = {key: 2e-9 * rows * k * n / ms["median_ms"] for key, ms in times.items()}
        report.add("products", {"product": name, "rows": rows, "k": k, "n": n, "times": times, "tflops": tflops})


def _product_shapes(batch: int, s: catalogue.Sizes) -> list[tuple[str, int, int, int]]:
    """(name, rows, k, n) of the linear layers of a training step."""
    found = []
    streams = {"audio": s.kept_a, "video": s.kept_v, "shared": 2 * s.kept}
    for name, tokens, width in (
        *((name, tokens, s.width) for name, tokens in streams.items()),
        ("decoder", s.total, s.decoder_width),
    ):
        shapes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
        found += [(f"{name} {layer}", batch * tokens, k, n) for layer, (k, n) in shapes.items()]
    return found


# -------------------------------------------------------------------------------------------------------- breakdown


def breakdown(report: Report) -> None:
    """Time by kernel of one fast step (the profiler's, GPU time alone), and what share of the step the GPU is busy."""
    device = report.device
    batch = 2 if report.tiny else report.batch
    settings = Settings("tiny" if report.tiny else "base", batch)
    report.data["clocks_before"] = clocks(device)
    report.data["settings"] = {"batch": batch, "dtype": settings.dtype, "variant": "fast"}
    with exact_float32():
        task = make_task(settings, device)
        release(device)
        step = Step(VARIANTS["fast"], settings, task, device)
        for _ in range(3):
            step.run()
        report.data["step_ms"] = elapsed(step.run, 3, device)
        report.data["clocks"] = clocks(device)
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
