"""The process of one contender of the training step, which writes its row: `python -m benchmarks.suite.contender`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from benchmarks.common import DTYPES, find_device, write_json
from benchmarks.throughput import MODELS, VARIANTS, Settings, measure
from cavmae_fast.ops import configuration


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", required=True)
    parser.add_argument("--ceilings", required=True, help="what the machine sustains, as JSON")
    parser.add_argument("--content", help="choices of the operators in place of the tuned ones, as JSON")
    parser.add_argument("--row", type=Path, required=True)
    args = parser.parse_args(arguments)
    settings = Settings(args.model, args.batch, args.dtype, (args.variant,), args.steps, args.rounds)
    device = find_device(parser, args.device)
    with configuration.trial(json.loads(args.content)) if args.content else contextlib.nullcontext():
        write_json(args.row, measure(settings, device, json.loads(args.ceilings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
