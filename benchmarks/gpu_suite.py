"""Everything there is to know about a GPU, in three calls of less than eight minutes: tuned, then measured.

    python benchmarks/gpu_suite.py --call 1 --out DIR             # tune; ours at the batch of the target; where time goes
    python benchmarks/gpu_suite.py --call 2 --out DIR --tuned DIR # options; races; attention and operators, beside others'
    python benchmarks/gpu_suite.py --call 3 --out DIR --tuned DIR # the published model and its improvements; batches; tests
    python benchmarks/gpu_suite.py --device cpu --tiny --call 1   # a rehearsal, without a GPU

The most decisive data comes first. Each section is a process of its own, and so is each contender, so that a fault of the
device in one does not reach the others; it writes `<out>/<device>/<section>.json` as it goes. What `tune` finds lies there
too: a run that was cut off goes on when it is started with the same folder, and `--tuned` names the folder of an earlier
call where later ones are to measure what it chose. Needs torch, triton, numpy and pytest. Kernels of the CUDA library are
tried where it was built before (`python setup.py build_native`, on any machine that has nvcc): building takes minutes, so no
call does it. The exit code is 1 when a section failed, was wrong or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import (
    BenchmarkError,
    add_arguments,
    device_name,
    error_text,
    find_device,
    first_line,
    provenance,
    strip_paths,
    write_json,
)
from benchmarks.render import render
from benchmarks.suite.report import Report
from cavmae_fast.ops.configuration import VARIABLE
from cavmae_fast.tuning.processes import end_with_parent


def _section(module: str, function: str) -> Callable[[Report], None]:
    """A section's function, imported when it runs: the parent process needs none of it."""

    def run(report: Report) -> None:
        getattr(importlib.import_module(f"benchmarks.suite.{module}"), function)(report)

    return run


SECTIONS: dict[str, Callable[[Report], None]] = {
    name: _section(module, function)
    for name, module, function in (
        ("tune", "sections", "tune"),
        ("steps", "steps", "steps"),
        ("breakdown", "sections", "breakdown"),
        ("products", "sections", "products"),
        ("options", "steps", "options"),
        ("races", "checks", "one_pass"),
        ("attention", "sections", "attention_backends"),
        ("operators", "sections", "operators"),
        ("contenders", "steps", "contenders"),
        ("pytest", "checks", "pytest"),
    )
}
"In the order in which they run."
CALLS = {
    "1": ("tune", "steps", "breakdown", "products"),
    "2": ("options", "races", "attention", "operators"),
    "3": ("contenders", "pytest"),
}
"What is done together, in the time of one call."
LIMITS = {
    "tune": 270.0,
    "steps": 110.0,
    "breakdown": 40.0,
    "products": 35.0,
    "options": 220.0,
    "races": 80.0,
    "attention": 70.0,
    "operators": 85.0,
    "contenders": 300.0,
    "pytest": 155.0,
}
"Seconds that a section may take; those of a call are together within `BUDGET`."
BUDGET = 460.0
"Seconds of a call: eight minutes, less what starting and copying takes."
LEAST, START = 20.0, 10.0
"Seconds below which a section is not begun; those of its process that go into starting."


def run_section(name: str, report: Report) -> bool:
    """Runs a section in this process -> whether it went well. What it raises goes into its record."""
    try:
        SECTIONS[name](report)
    except BenchmarkError as error:
        report.finish("failed", str(error))
    except Exception as error:
        report.data["error"] = error_text(error)
        report.finish("failed", first_line(error))
        print(report.data["error"], file=sys.stderr, flush=True)
    else:
        report.finish("ok")
    return report.data["status"] == "ok"


def supervise(command: list[str], path: Path, seconds: float, environment: dict[str, str]) -> bool:
    """Runs a section as a process, for `seconds` at most -> whether it went well. `path` is the record that it writes;
    one that says "running" after the process ended was cut short, and is completed here."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        errors.seek(0)
        tail = errors.read()[-6000:]
    sys.stderr.write(tail)
    record = json.loads(path.read_text())
    if record["status"] == "running":
        reason = f"it took more than {seconds:.0f} s" if code is None else f"its process ended with exit code {code}"
        record |= {"status": "timed out" if code is None else "crashed", "reason": reason, "error": strip_paths(tail)}
        write_json(path, record)
    return record["status"] == "ok"


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str], torch.device]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--call", choices=CALLS, help="the sections of one call (default: those of --sections)")
    parser.add_argument("--sections", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small shapes: tries the code, measures nothing")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all sections")
    parser.add_argument("--batch", type=int, help="clips per step (default: 256 on CUDA, else 2)")
    parser.add_argument("--operators", help="those to tune (default: all)")
    parser.add_argument("--tuned", type=Path, help="folder with what an earlier call tuned (default: that of the results)")
    parser.add_argument("--watched", action="store_true", help="end when the program that started this one has ended")
    parser.add_argument("--in-process", action="store_true", help="run the sections in this process")
    args = parser.parse_args(arguments)
    device = find_device(parser, args.device)
    if args.call and args.sections:
        parser.error("--call and --sections exclude each other")
    chosen = list(CALLS[args.call]) if args.call else (args.sections or ",".join(SECTIONS)).split(",")
    for name in chosen:
        if name not in SECTIONS:
            parser.error(f"--sections names {name!r}; it must be of {', '.join(SECTIONS)}")
    if args.batch is None:
        args.batch = 256 if device.type == "cuda" else 2
    if args.batch < 1:
        parser.error(f"--batch is {args.batch}; it must be at least 1")
    if args.tuned is not None and not args.tuned.is_dir():
        parser.error(f"--tuned is {args.tuned}, which is no folder")
    if args.operators is not None:
        from cavmae_fast.ops import dispatch

        able = sorted(dispatch.operators)
        for name in args.operators.split(","):
            if name not in able:
                parser.error(f"--operators names {name!r}; it must be of {', '.join(able)}")
    return args, [name for name in SECTIONS if name in chosen], device


def child_command(args: argparse.Namespace, name: str, seconds: float, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the process of one section."""
    command = [sys.executable, __file__, "--watched", "--in-process", "--sections", name, "--budget", f"{seconds:.0f}"]
    command += ["--device", args.device, "--out", str(args.out)]
    command += ["--batch", str(args.batch), *(["--operators", args.operators] if args.operators else [])]
    command += ["--tiny"] if args.tiny else []
    command += ["--commit", args.commit] if args.commit else []
    environment = dict(os.environ) | {VARIABLE: str(args.tuned or folder)}
    if args.device == "cpu":
        environment.setdefault("TRITON_INTERPRET", "1")
    return command, environment


def main(arguments: list[str] | None = None) -> int:
    args, chosen, device = parse(arguments)
    if args.watched:
        end_with_parent()
    command = [__file__, *(sys.argv[1:] if arguments is None else arguments)]
    folder: Path = args.out / device_name(device)
    operators = tuple(args.operators.split(",")) if args.operators else ()
    begin, good = time.monotonic(), {}
    for number, name in enumerate(chosen):
        left = args.budget - (time.monotonic() - begin)
        # What earlier sections left over goes to this one, but not what the later ones are given.
        spare = left - sum(LIMITS.get(later, 0.0) for later in chosen[number:])
        seconds = left if args.in_process else min(left, LIMITS.get(name, left) + max(0.0, spare))
        path, origin = folder / f"{name}.json", provenance(device, command, args.commit)
        report = Report(path, name, device, args.tiny, seconds, origin, args.batch, operators)
        if args.in_process:
            good[name] = run_section(name, report)
        elif left < LEAST:
            report.finish("not run", f"the budget of {args.budget:.0f} s was spent")
            good[name] = False
        else:
            child, environment = child_command(args, name, seconds - START, folder.resolve())
            good[name] = supervise(child, path, seconds, environment)
            print(_line(path), flush=True)
    if not args.in_process:
        print(render(folder))
    return 0 if all(good.values()) else 1


def _line(path: Path) -> str:
    record = json.loads(path.read_text())
    reason = f": {record['reason']}" if "reason" in record else ""
    return f"{record['kind']}: {record['status']} after {record['seconds']:.0f} s{reason}"


if __name__ == "__main__":
    sys.exit(main())
