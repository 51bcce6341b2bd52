"""What the benchmarks share: the device's name, where a number came from, JSON files, Markdown tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cavmae_fast.ops import configuration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLOCKS = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


class BenchmarkError(RuntimeError):
    """A benchmark that cannot give a number that means something; the message is one sentence."""


# ---------------------------------------------------------------------------------------------------------- device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder in which the device's folder is written")
    parser.add_argument("--commit", help="commit to record where the code lies outside a git checkout")


def find_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device called `name`; ends the program as a usage error (exit code 2) when there is none."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        parser.error(f"--device is {name!r}; it must be cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(f"--device is {name!r}; PyTorch sees {torch.cuda.device_count()} CUDA devices here")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """The name of the results' folder: 'nvidia-h200', 'cpu-intel-xeon-processor'."""
    name = configuration.device_name(device)
    return configuration.slug(name if device.type == "cuda" else f"cpu {name}")


# ------------------------------------------------------------------------------------------------------ provenance


def run_tool(*command: str) -> str | None:
    """What a program prints, or None when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def clocks(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power limit and temperature of the GPU now; None on a CPU or without nvidia-smi."""
    if device.type != "cuda":
        return None
    query = ",".join(CLOCKS.values())
    line = run_tool("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", str(device.index or 0))
    return dict(zip(CLOCKS, (part.strip() for part in line.splitlines()[0].split(",")))) if line else None


def provenance(device: torch.device, command: list[str], commit: str | None = None) -> dict[str, Any]:
    """Where a number came from. `command`: the script and its arguments, of which `--out` is left out."""
    import triton

    git = ("git", "-C", str(ROOT))
    head = run_tool(*git, "rev-parse", "HEAD")
    changes = run_tool(*git, "status", "--porcelain", "--", str(ROOT), f":!{RESULTS.relative_to(ROOT)}")
    gpu = clocks(device)
    return {
        "commit": commit or head,
        "dirty": None if commit or changes is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *_without_out(command)]),
        "device": configuration.device_name(device),
        "driver": gpu["driver"] if gpu else None,
        "clocks": gpu,
        "cpu": configuration.processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _without_out(command: list[str]) -> list[str]:
    script = Path(command[0]).resolve()
    kept = [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    arguments = iter(command[1:])
    for argument in arguments:
        if argument == "--out":
            next(arguments, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return kept


def error_text(error: BaseException) -> str:
    """The traceback, without the folders that are this machine's own."""
    return strip_paths("".join(traceback.format_exception(error)))


def strip_paths(text: str) -> str:
    return text.replace(f"{ROOT}{os.sep}", "").replace(sys.prefix, "<env>").replace(sys.base_prefix, "<python>")


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for a cell of a table."""
    lines = str(error).strip().splitlines()
    return strip_paths(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)[:300]


# ----------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes whole or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *rows])


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
