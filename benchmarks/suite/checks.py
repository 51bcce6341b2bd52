"""Sections that check on the device what no other machine shows: races, and the tests that need a GPU."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common import ROOT, BenchmarkError, strip_paths
from benchmarks.suite.report import Report
from cavmae_fast.ops import catalogue
from cavmae_fast.tuning import processes

RACE_CHECKER = "compute-sanitizer"
TESTS = ("tests/ops/test_gpu.py", "tests/test_graph.py")
"Tests that need no more than torch, triton, numpy and pytest."
TOGETHER = 8
"Processes of tests at a time: mostly they compile."
NO_TESTS = 5
"pytest's exit code where none was selected."


def one_pass(report: Report) -> None:
    """The attention backward pass in one launch: the same bits again and again, and what NVIDIA's race checker says, where
    it is at hand."""
    command = [sys.executable, "-m", "benchmarks.suite.races", "--device", str(report.device)]
    command += ["--tiny", "--batch", "2", "--repeats", "2"] if report.tiny else ["--batch", str(min(16, report.batch))]
    done, report.data["repeats"] = _races(command, 0.6 * report.limit)
    report.save()
    checker = [RACE_CHECKER, "--tool", "racecheck", "--kernel-regex", "kns=attention_one_pass", "--error-exitcode", "9"]
    if not report.on_gpu or shutil.which(RACE_CHECKER) is None:
        report.data["checker"] = {"status": "not available", "tail": f"{RACE_CHECKER} is not on PATH, or there is no GPU"}
        checked = True
    else:
        small = [*command[: command.index("--batch")], "--batch", "1", "--repeats", "1"]
        checked, report.data["checker"] = _races([*checker, *small], report.limit - (time.monotonic() - report.begin) - 5)
    if not (done and checked):
        raise BenchmarkError(f"repeats: {report.data['repeats']['status']}; checker: {report.data['checker']['status']}")


def _races(command: list[str], seconds: float) -> tuple[bool, dict[str, Any]]:
    """Whether a run of `suite/races.py` found nothing, and what it said: its rows, and the end of all else."""
    with tempfile.TemporaryFile("w+") as output:
        with processes.process(command, output) as child:
            try:
                code = child.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                code = None
        output.seek(0)
        lines = output.read().splitlines()
    status = "timed out" if code is None else "ok" if code == 0 else f"exit code {code}"
    rows = [json.loads(line) for line in lines if line.startswith('{"case"')]
    tail = strip_paths("\n".join(line for line in lines if not line.startswith('{"case"')))[-3000:]
    return code == 0, {"status": status, "rows": rows, "tail": tail}


def pytest(report: Report) -> None:
    """The tests marked `gpu`, a process for each operator, so that a fault of the device in one does not fail the others."""
    operators = sorted({case.operator for case in [*catalogue.pretraining(2), *catalogue.small()]})
    kernels, graph = (str(ROOT / path) for path in TESTS)
    wanted = {name: ["-k", name, kernels] for name in operators}
    wanted |= {"attention": ["-k", "attention and not float32", kernels]}
    wanted |= {"attention in float32": ["-k", "attention and float32", kernels], "a step in a CUDA graph": [graph]}
    first = ["attention", "a step in a CUDA graph", "stream_layer_norm"]  # they take longest
    waiting = [*first, *(name for name in wanted if name not in first)]
    end, running, bad = report.begin + report.limit - 5, {}, []
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < (TOGETHER if report.on_gpu else 1):
                name = waiting.pop(0)
                output = stack.enter_context(tempfile.TemporaryFile("w+"))
                # Of the project's own options some are those of plug-ins, which need not be there.
                command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
                running[name] = stack.enter_context(processes.process([*command, *wanted[name]], output)), output
            time.sleep(0.1)
            for name, (child, output) in list(running.items()):
                if child.poll() is None and time.monotonic() < end:
                    continue
                code = child.poll()
                del running[name]
                output.seek(0)
                lines = strip_paths(output.read()).strip().splitlines() or [""]
                status = "timed out" if code is None else "ok" if code in (0, NO_TESTS) else f"exit code {code}"
                row = {"tests": name, "status": status, "summary": lines[-1][:200]}
                report.add("pytest", row if status == "ok" else row | {"tail": "\n".join(lines[-40:])[-4000:]})
                bad += [name] if status != "ok" else []
            if time.monotonic() > end and waiting:
                bad += waiting
                report.data["not_run"], waiting = list(waiting), []
    if bad:
        raise BenchmarkError(f"tests of {', '.join(bad)} failed or had no time")
