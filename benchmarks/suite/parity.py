"""Section `parity`: what is right on this device, operator by operator and dtype by dtype, and then model by model.

Every operator in every dtype has a process of its own (`proof`), so that one that crashes, hangs or is wrong costs itself
alone; a few run at a time, for most of the time is spent compiling. bf16 comes first, at the batch that is trained. What
is found goes into the record at once, and with `--write-proven` also into the configuration of this architecture: the
kernels of a pair (operator, dtype) that is right become its default there, those of a wrong one lose that place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import prove
from benchmarks.common import DTYPES, ROOT, BenchmarkError, strip_paths
from benchmarks.suite.proof import MODEL_KINDS
from benchmarks.suite.report import Report
from cavmae_fast.ops import catalogue, dispatch

JOB_LIMIT = 100.0
"Seconds that one process may take."
LEAST = 5.0
"Seconds that must be left for a process to be started; its imports alone take that long."
MEMORY_OF_JOB = 24 << 30
"Bytes that the largest case at batch 256 takes with its float64 reference, about; estimated."
MOST_JOBS = 4
"Processes at a time."
POLL = 0.1
"Seconds between two looks at what a process has found."


@dataclass(frozen=True)
class Job:
    """One process: an operator in one dtype, or a model in all."""

    operator: str | None = None
    dtype: str | None = None
    model: str | None = None

    @property
    def entry(self) -> dict[str, str]:
        """What names it in the record."""
        return {"model": self.model} if self.model else {"operator": self.operator, "dtype": self.dtype}

    def __str__(self) -> str:
        return self.model or f"{self.operator} in {self.dtype}"


def jobs(operators: list[str] | None = None) -> list[Job]:
    """All operators that have Triton kernels (or those named), bf16 first, in the dtypes that make a difference to them;
    then, unless operators are named, the models."""
    called: dict[str, set[torch.dtype]] = {}
    for case in catalogue.small():
        if "triton" in dispatch.operators[case.operator] and (operators is None or case.operator in operators):
            called.setdefault(case.operator, set()).update(case.dtypes)
    pairs = [Job(name, dtype) for dtype in DTYPES for name, dtypes in called.items() if DTYPES[dtype] in dtypes]
    return pairs + ([] if operators else [Job(model=kind) for kind in MODEL_KINDS])


def command_of(job: Job, report: Report) -> list[str]:
    """The process of a job, but for the file of its rows."""
    command = [sys.executable, "-m", "benchmarks.suite.proof", "--device", str(report.device)]
    for option, value in (("--model", job.model), ("--operator", job.operator), ("--dtype", job.dtype)):
        command += [option, value] if value else []
    return [*command, "--batch", str(report.options.batch), *(["--tiny"] if report.tiny else [])]


def watch(command: list[str], seconds: float, found: Callable[[dict[str, Any]], None]) -> tuple[int | None, str]:
    """Runs the process of a job for `seconds` at most; `found` is called with each of its rows as it comes.

    -> (exit code, None when it ran out of time; the end of what it printed). It stays in this process's group, so that
    whoever kills the section kills it too.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        file = Path(folder) / "rows"
        file.touch()
        child = subprocess.Popen(
            [*command, "--rows", str(file)], stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": paths}
        )
        deadline, rest, code = time.monotonic() + seconds, "", None
        try:
            with file.open() as rows:
                while True:
                    late, code = time.monotonic() > deadline, child.poll()  # first: then all that it wrote is read
                    *lines, rest = (rest + rows.read()).split("\n")
                    for line in lines:
                        found(json.loads(line))
                    if late or code is not None:
                        break
                    time.sleep(POLL)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        output.seek(0)
        return code, strip_paths(output.read()[-4000:])


def verdict(code: int | None, seconds: float, tail: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Status of a job ('right', 'wrong', 'crashed', 'timed out', 'not tried'), and the reason unless it is right."""
    if code is None:
        return {"status": "timed out", "reason": f"it took more than {seconds:.0f} s", "error": tail}
    if code != 0:
        return {"status": "crashed", "reason": f"its process ended with exit code {code}", "error": tail}
    wrong = [f"{row.get('case', row['dtype'])}: {row.get('reason', 'too far off')}" for row in rows if row["right"] is False]
    if wrong:
        return {"status": "wrong", "reason": "; ".join(wrong)}
    if not any(row["right"] for row in rows):
        return {"status": "not tried", "reason": next((row["reason"] for row in rows), "it has no case in this dtype")}
    return {"status": "right"}


class Section:
    """The record while several jobs write into it."""

    def __init__(self, report: Report) -> None:
        self.report, self.lock = report, threading.Lock()
        self.end = time.monotonic() + report.limit

    def do(self, job: Job) -> None:
        """Runs a job, unless there is no time left or nothing to run it with; records what it finds, and marks it."""
        begin = time.monotonic()
        seconds, rows = min(JOB_LIMIT, self.end - begin), []

        def found(row: dict[str, Any]) -> None:
            rows.append(row)
            with self.lock:
                self.report.add("models" if job.model else "operators", row)

        if job.dtype == "bf16" and dispatch.interpreting():
            outcome = {"status": "not tried", "reason": "Triton's interpreter has no bf16"}
        elif seconds < LEAST:
            outcome = {"status": "not run", "reason": "the section's time was spent"}
        else:
            outcome = verdict(*self.timed(job, seconds, found), rows)
        entry = job.entry | outcome | {"seconds": round(time.monotonic() - begin, 1)}
        with self.lock:
            if self.report.options.prove and job.operator:
                entry["default"] = prove.mark(self.report.data["architecture"], entry)
            self.report.add("proofs", entry)

    def timed(self, job: Job, seconds: float, found: Callable) -> tuple[int | None, float, str]:
        code, tail = watch(command_of(job, self.report), seconds, found)
        return code, seconds, tail


def at_a_time(device: torch.device) -> int:
    """How many jobs run side by side: one on a CPU, on a GPU as many as its memory holds."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_JOBS, torch.cuda.get_device_properties(device).total_memory // MEMORY_OF_JOB))


def architecture_of(device: torch.device) -> str | None:
    """'sm_90', whose configuration the marks go into; None on a CPU, which has none."""
    return dispatch.architecture(device.index or 0) if device.type == "cuda" else None


def run(report: Report) -> None:
    """The section. Raises BenchmarkError, naming them, when an operator or a model is not right."""
    report.data["architecture"] = architecture_of(report.device)
    report.data["settings"] = {"batch": report.options.batch}
    section = Section(report)
    with ThreadPoolExecutor(at_a_time(report.device)) as pool:
        for done in [pool.submit(section.do, job) for job in jobs(report.options.operators)]:
            done.result()
    bad = [proof for proof in report.data["proofs"] if proof["status"] not in ("right", "not tried")]
    if bad:
        names = [f"{Job(p.get('operator'), p.get('dtype'), p.get('model'))} ({p['status']})" for p in bad]
        raise BenchmarkError(f"not right on this device: {', '.join(names)}")
