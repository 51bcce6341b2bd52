"""Marks operators as right on an architecture, in `cavmae_fast/ops/proven.json`, from a record of the parity section.

    python benchmarks/prove.py benchmarks/results/nvidia-h200/parity.json

An operator that the record shows to be wrong loses its mark.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import BenchmarkError, write_json

from cavmae_fast.ops.registry import PROVEN_FILE


def update(record: dict[str, Any], path: Path = PROVEN_FILE) -> list[str]:
    """Writes `path` anew -> the operators marked. Raises BenchmarkError for a record that proves nothing."""
    architecture, right = record.get("architecture"), record.get("right")
    if record.get("kind") != "parity" or not architecture or not right or record.get("tiny"):
        raise BenchmarkError("the record is not that of a whole parity section on a CUDA device, so it proves nothing")
    proven = json.loads(path.read_text())
    for name, passed in right.items():
        others = set(proven.get(name, [])) - {architecture}
        proven[name] = sorted(others | {architecture} if passed else others)
    write_json(path, {name: proven[name] for name in sorted(proven) if proven[name]})
    return [name for name, passed in right.items() if passed]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    args = parser.parse_args(arguments)
    if not args.record.is_file():
        parser.error(f"record is {args.record}, which does not exist")
    try:
        print(f"proven: {', '.join(update(json.loads(args.record.read_text())))}")
    except BenchmarkError as error:
        print(f"prove: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
