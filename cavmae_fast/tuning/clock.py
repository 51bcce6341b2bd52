"""Clocks: how long a call takes, several candidates in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from cavmae_fast.errors import first_line

CACHE_TIMES = 2
"A GPU's last-level cache is overwritten with this many times its size before a call, which then finds no inputs there."


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds per call, over `calls` calls in a row."""
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
    """Median and spread of milliseconds per call, one sample per round."""
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


class Flush:
    """Overwrites a GPU's last-level cache. On a CPU it does nothing: what is timed there is far larger than a cache."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self.buffer = torch.empty(CACHE_TIMES * cache, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def cold(run: Callable[[], object], flush: Flush, device: torch.device, calls: int = 1) -> float:
    """Milliseconds of one call of `run` that finds nothing in the cache: the median of `calls`."""
    samples = []
    for _ in range(calls):
        flush()
        samples.append(elapsed(run, 1, device))
    return statistics.median(samples)


def captured(
    run: Callable[[], object], device: torch.device, pool: object | None = None
) -> tuple[Callable[[], object], str]:
    """`run` as replays of a CUDA graph, which leaves the launches' cost on the host out of the time.

    `pool`: memory (`torch.cuda.graph_pool_handle()`) that graphs share whose results nobody reads. Returns it with the name
    of the clock: 'graph'; 'host' on a CPU; 'events', with the reason, when it cannot be captured and calls are timed as they
    come.
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
        with torch.cuda.graph(graph, stream=stream, pool=pool):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return run, f"events ({first_line(error)[:200]})"
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
