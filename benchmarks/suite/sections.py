"""Sections of the suite: `tune`, which chooses; those that measure; and `pytest`, which checks."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import DTYPES, ROOT, BenchmarkError, clocks, strip_paths
from benchmarks.suite.race import Contender, Race, add_floor, draw_batches
from benchmarks.suite.report import Report
from benchmarks.throughput import VARIANTS, Settings, Step, exact_float32, make_task, release
from benchmarks.timing import ceilings, elapsed, interleave, spin
from cavmae_fast.ops import catalogue, configuration, dispatch
from cavmae_fast.ops.attention import attention, available_backends, query_attention
from cavmae_fast.ops.catalogue import Case
from cavmae_fast.tuning import processes
from cavmae_fast.tuning import tune as tuning
from cavmae_fast.tuning.config import TuneConfig

TUNE_REST = 70.0
"Seconds of the section `tune` that are left for the whole step and for ending what is under way."
CONTENDER = 110.0
"Seconds that one contender of the training step may take, torch.compile included."
LEAST = 15.0
"Seconds that must be left for a contender to be started."
EXPECTED = ("ok", "not available", "out of memory", "not run")
"States of a contender that are findings; others are faults."
CONTENDER_COMMAND = (sys.executable, "-m", "benchmarks.suite.contender")
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
        export=report.path.parent / f"{architecture}.json",
    )
    found = tuning.tune(config, progress=tuning.Lines)
    units = [{k: v for k, v in row.items() if k != "row"} for row in found["units"]]
    report.data |= {"settings": found["settings"].to_json(), "units": units, "step": found["step"]}
    report.data |= {"kept": found["kept"], "result": found["reason"], "left": found["left"]}
    if found["left"]:
        raise BenchmarkError(f"no time for {', '.join(found['left'])}; the same command goes on with them")


# ------------------------------------------------------------------------------------------------------------ steps


def steps(report: Report) -> None:
    """Ours at the batch of the target: with PyTorch's operators, with what was tuned, and that in a CUDA graph."""
    _race_steps(report, [(name, report.batch) for name in ("fast", "fast-graph", "fast-torch")])


def contenders(report: Report) -> None:
    """The others, and ours, at several batches. Compiling takes a minute, so the target's batch alone has it."""
    batch = report.batch
    asked = [("sdpa-compile", batch), ("published", batch), ("published", batch // 2), ("sdpa", batch)]
    _race_steps(report, [*asked, *((name, n) for n in (32, 2 * batch, 128) for name in ("fast", "fast-graph"))])


def _race_steps(report: Report, asked: list[tuple[str, int]]) -> None:
    """One process for each (variant, batch), so that a crash, a hang or a lack of memory costs that one alone; its row is
    in the record as soon as it is there."""
    report.data["ceilings"] = ceilings(report.device, ["bf16", "fp16"] if report.on_gpu else ["bf16"], report.tiny)
    end, bad = time.monotonic() + report.limit - (time.monotonic() - report.begin), []
    for name, batch in dict.fromkeys(asked):
        left = end - time.monotonic()
        row = _contender(report, name, batch if not report.tiny else min(batch, 4), min(CONTENDER, left))
        report.add("steps", row)
        bad += [f"{v['name']} at batch {batch}" for v in row["variants"] if v["status"] not in EXPECTED]
    if bad:
        raise BenchmarkError(f"no time for {', '.join(bad)}")


def _contender(report: Report, name: str, batch: int, seconds: float) -> dict[str, Any]:
    """What the process of a contender writes, or a row that says why it wrote nothing."""
    settings = {"model": "tiny" if report.tiny else "base", "batch": batch, "dtype": "bf16"}
    empty = {"settings": settings, "variants": [{"name": name, "compiled": VARIANTS[name].compiled}]}

    def why(status: str, reason: str) -> dict[str, Any]:
        empty["variants"][0] |= {"status": status, "reason": reason}
        return empty

    if seconds < LEAST:
        return why("not run", "the section's time was spent")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        path = Path(folder) / "row.json"
        command = [*CONTENDER_COMMAND, "--variant", name, "--model", settings["model"], "--batch", str(batch)]
        command += ["--dtype", "bf16", "--device", str(report.device), "--row", str(path)]
        command += ["--steps", "1", "--rounds", "1"] if report.tiny else []
        command += ["--ceilings", json.dumps(report.data["ceilings"])]
        with processes.process(command, output) as child:
            try:
                code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                return why("timed out", f"it took more than {seconds:.0f} s")
        if code == 0 and path.exists():
            return json.loads(path.read_text())
        output.seek(0)
        tail = strip_paths(output.read()[-2000:]).strip().splitlines()
        return why("crashed", f"its process ended with exit code {code}{': ' + tail[-1] if tail else ''}")


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
