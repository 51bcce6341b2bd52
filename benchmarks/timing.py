"""Clocks: interleaved rounds of several contenders, CUDA graphs of a call, and what the machine itself can do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import DTYPES

CACHE_TIMES = 4
"Inputs rotate through this many times the last-level cache, so that no call finds its inputs there."
MODEL_SHAPES = [(45312, 768, 3072), (45312, 3072, 768), (181248, 512, 2048), (181248, 2048, 512), (8192, 8192, 8192)]
"(rows, k, n) of the models' products at batch 256, and a large square one."
CPU_SHAPES = [(708, 768, 3072), (708, 3072, 768), (2832, 512, 2048), (2832, 2048, 512), (2048, 2048, 2048)]
TINY_SHAPES = [(64, 64, 64)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds a call, over `calls` calls in a row."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) * 1e3 / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def summary(samples: list[float], calls: int) -> dict[str, float]:
    """Median and spread of milliseconds a call, one sample a round."""
    return {
        "median_ms": statistics.median(samples),
        "min_ms": min(samples),
        "max_ms": max(samples),
        "rounds": len(samples),
        "calls": calls,
    }


def interleave(
    contenders: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7, sample_ms: float = 10.0
) -> dict[str, dict[str, float]]:
    """Times all contenders in turn, `rounds` times over, so that a drift of the clocks meets all of them alike.

    Each is called once to warm up; a sample is as many calls as last about `sample_ms`.
    """
    calls, samples = {}, {name: [] for name in contenders}
    for name, run in contenders.items():
        run()
        calls[name] = max(1, min(200, math.ceil(sample_ms / max(elapsed(run, 1, device), 1e-3))))
    for _ in range(rounds):
        for name, run in contenders.items():
            samples[name].append(elapsed(run, calls[name], device))
    return {name: summary(values, calls[name]) for name, values in samples.items()}


def rotations(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs of `set_bytes` it takes to rotate past the last-level cache (1 on a CPU)."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(1, min(32, math.ceil(CACHE_TIMES * cache / max(set_bytes, 1))))


def captured(run: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], str]:
    """`run` as replays of a CUDA graph, which leaves the launches' cost on the host out of the time.

    Returns it with the name of the clock: 'graph'; 'host' on a CPU; 'events', with the reason, when it cannot be
    captured and calls are timed as they come.
    """
    if device.type != "cuda":
        return run, "host"
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, fills caches and creates handles, none of which capture allows
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return run, f"events ({str(error).strip().splitlines()[0][:200]})"
    return graph.replay, "graph"


def spin(device: torch.device, seconds: float = 0.5) -> None:
    """Keeps a GPU busy until its clocks are up; they idle at a fraction of what they reach."""
    if device.type == "cuda":
        x = torch.randn(4096, 4096, device=device, dtype=torch.float16)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for _ in range(20):
                x @ x
            torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------------- ceilings


def ceilings(device: torch.device, dtypes: list[str], tiny: bool = False) -> dict[str, Any]:
    """What the machine sustains: products in TFLOP/s by dtype and shape, on random data, and a copy in GB/s, counting
    bytes read and bytes written."""
    on_gpu = device.type == "cuda"
    shapes = TINY_SHAPES if tiny else MODEL_SHAPES if on_gpu else CPU_SHAPES
    found: dict[str, Any] = {"gemm_tflops": {}, "gemm_shapes": {}}
    spin(device)
    for dtype in dtypes:
        rates = {}
        for m, k, n in shapes:
            x, weight = (torch.randn(*size, device=device).to(DTYPES[dtype]) for size in ((m, k), (n, k)))
            ms = interleave({"gemm": lambda x=x, weight=weight: F.linear(x, weight)}, device, 5, 20.0)
            rates[f"{m}x{k}x{n}"] = 2e-9 * m * k * n / ms["gemm"]["median_ms"]
            del x, weight
        found["gemm_shapes"][dtype] = rates
        found["gemm_tflops"][dtype] = max(rates.values())
    size = 1 << (16 if tiny else 32 if on_gpu else 28)  # bytes
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ms = interleave({"copy": lambda: target.copy_(source)}, device, 5, 20.0)
    found["copy_gb_per_s"] = 2e-6 * size / ms["copy"]["median_ms"]
    return found
