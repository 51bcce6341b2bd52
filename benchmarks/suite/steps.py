"""Sections that time the whole training step, one process for each contender."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BenchmarkError, strip_paths
from benchmarks.suite import races
from benchmarks.suite.report import Report
from benchmarks.throughput import VARIANTS
from benchmarks.timing import ceilings
from cavmae_fast.ops import catalogue, configuration
from cavmae_fast.ops.stream_linear import SIDE_BY_SIDE
from cavmae_fast.tuning import processes

CONTENDER = 110.0
"Seconds that one contender of the training step may take, torch.compile included."
LEAST = 15.0
"Seconds that must be left for a contender to be started."
EXPECTED = ("ok", "not available", "out of memory", "not run")
"States of a contender that are findings; others are faults."
FORKED, SMALL = "side by side", 32
"The choice that is for small batches, and how many clips of one."
CONTENDER_COMMAND = (sys.executable, "-m", "benchmarks.suite.contender")


def steps(report: Report) -> None:
    """Ours at the batch of the target: with PyTorch's operators, with what was tuned, and that in a CUDA graph."""
    _race_steps(report, [(name, report.batch) for name in ("fast", "fast-graph", "fast-torch")])


def options(report: Report) -> None:
    """Ours at the same batch, with one thing different each time: this package's optimizer, as it is and captured in a CUDA
    graph; cheaper arithmetic and recomputation; and candidates that the tuner holds against PyTorch alone, forced into the
    whole step, at a small batch those that are for one."""
    names = ("fast-fp8", "fast-adam", "fast-adam-graph", "fast-low", "fast-elementwise", "fast-mlp", "fast-all")
    forced = forced_choices(report.device, torch.bfloat16)
    whole = [("fast", report.batch, label) for label in forced if label != FORKED]
    few = ("fast-graph" if report.on_gpu else "fast", min(SMALL, report.batch), FORKED)
    _race_steps(report, [*((name, report.batch) for name in names), *whole, few], forced)


def forced_choices(device: torch.device, dtype: torch.dtype) -> dict[str, configuration.Content]:
    """What is in force on `device` now, with one choice forced that the tuner may have turned down: label -> content."""
    target, name = configuration.target_of(device), configuration.name_of(dtype)
    changes: dict[str, configuration.Content] = {
        FORKED: {"implementations": {op: {name: SIDE_BY_SIDE} for op in ("stream_linear", "linear_gelu", "hidden_gradient")}}
    }
    if device.type == "cuda":  # no kernel computes in bfloat16 elsewhere
        products = {operator: {name: "triton product"} for operator in ("linear_gelu", "hidden_gradient")}
        changes["products"] = {"implementations": products}
        for case in [c for c in catalogue.pretraining(2) if str(c) in races.CASES]:
            for content in itertools.islice(races.one_pass(case, device, dtype), 1):
                configuration.merge(changes.setdefault("one pass", {}), content)
    contents = {}
    for label, change in changes.items():
        contents[label] = copy.deepcopy(configuration.table(target))
        configuration.merge(contents[label], change)
    return contents


def contenders(report: Report) -> None:
    """The others, and ours, at several batches. Compiling takes a minute, so the target's batch alone has it."""
    batch = report.batch
    fewer = max(2, batch // 2)  # one clip has no others to be told from
    asked = [("sdpa-compile", batch), ("published", batch), ("published", fewer), ("sdpa", batch)]
    _race_steps(report, [*asked, *((name, n) for n in (32, 2 * batch, 128) for name in ("fast", "fast-graph"))])


def _race_steps(
    report: Report,
    asked: list[tuple[str, int] | tuple[str, int, str]],
    forced: dict[str, configuration.Content] | None = None,
) -> None:
    """One process for each (variant, batch, label of what is `forced`), so that a crash, a hang or a lack of memory costs
    that one alone; its row is in the record as soon as it is there."""
    report.data["ceilings"] = ceilings(report.device, ["bf16", "fp16"] if report.on_gpu else ["bf16"], report.tiny)
    end, bad = report.begin + report.limit, []
    for name, batch, *labels in dict.fromkeys(asked):
        left = end - time.monotonic()
        content = forced[labels[0]] if labels else None
        row = _contender(report, name, batch if not report.tiny else min(batch, 4), min(CONTENDER, left), content)
        for variant in row["variants"] if labels else ():
            variant["name"] += f", {labels[0]}"
        report.add("steps", row)
        bad += [f"{v['name']} at batch {batch} ({v['status']})" for v in row["variants"] if v["status"] not in EXPECTED]
    if bad:
        raise BenchmarkError(f"no time for {', '.join(bad)}")


def _contender(
    report: Report, name: str, batch: int, seconds: float, content: configuration.Content | None = None
) -> dict[str, Any]:
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
        command += ["--content", json.dumps(content)] if content else []
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
