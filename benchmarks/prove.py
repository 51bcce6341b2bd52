"""Marks what a record of the parity section shows to be right, in the configuration of its architecture.

    python benchmarks/prove.py benchmarks/results/nvidia-h200/parity.json

`gpu_suite.py --write-proven` marks while it proves; this is for a record that was brought from another machine. An operator
that the record shows to be wrong in a dtype, or to crash, loses its mark in that dtype; others keep theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import DTYPES, BenchmarkError
from cavmae_fast.ops import configuration


def mark(architecture: str, proof: dict[str, Any]) -> str:
    """Marks what `proof` shows of one operator in one dtype -> the implementation that is the default from now on.

    Proven are the Triton kernels. Where the CUDA library is the default, that stays as it is.
    """
    operator, dtype = proof["operator"], DTYPES[proof["dtype"]]
    now = configuration.implementation(architecture, operator, dtype)
    if proof["status"] == "right" and now == "torch":
        configuration.mark_proven(architecture, operator, dtype)
    elif proof["status"] in ("wrong", "crashed") and now == "triton":
        configuration.mark_proven(architecture, operator, dtype, "torch")
    return configuration.implementation(architecture, operator, dtype)


def update(record: dict[str, Any]) -> list[str]:
    """Marks what the record shows -> the pairs that are right. Raises BenchmarkError for a record that proves nothing."""
    architecture = record.get("architecture")
    proofs = [proof for proof in record.get("proofs", []) if "operator" in proof]
    if record.get("kind") != "parity" or not architecture or not proofs or record.get("tiny"):
        raise BenchmarkError("the record is not that of a parity section on a CUDA device, so it proves nothing")
    for proof in proofs:
        mark(architecture, proof)
    return right_pairs(record)


def right_pairs(record: dict[str, Any]) -> list[str]:
    """The pairs that the record shows to be right, for a line of output."""
    proofs = [p for p in record.get("proofs", []) if "operator" in p and p["status"] == "right"]
    return [f"{proof['operator']} in {proof['dtype']}" for proof in proofs]


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
