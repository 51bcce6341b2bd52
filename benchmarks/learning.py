"""Does it learn? The four systems of the CAV-MAE paper, small, on generated clips: one budget, several seeds, and what is
said of them judged claim by claim (`evidence/claims.py`, which was written before the first run).

    python benchmarks/learning.py && python benchmarks/render.py

Every system has the size of the preset `small`, and the losses and the structure of its own preset. All are pretrained for
as many steps on the same batches and then fine-tuned by the recipe `small`. A fifth, not pretrained, is the control.
A run's numbers are written when it is done, and the same command, started again, goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import BenchmarkError, add_arguments, device_name, find_device, provenance, read_json, write_json
from benchmarks.evidence.claims import judge
from benchmarks.evidence.clips import Budget, Data, chance
from benchmarks.evidence.report import draw, figures_table, verdicts_table
from benchmarks.evidence.runs import SYSTEMS, run
from cavmae_fast.models.precision import DTYPES, choose_dtype


def open_record(path: Path, budget: Budget, overwrite: bool) -> dict[str, Any]:
    """The record to go on with: that of `path`, or a new one. BenchmarkError when it is of another budget."""
    if overwrite or not path.exists():
        return {"kind": "learning", "settings": asdict(budget), "runs": []}
    record = read_json(path)
    changed = [name for name, value in asdict(budget).items() if record["settings"].get(name) != value]
    if changed:
        raise BenchmarkError(
            f"{path.name} holds runs of another budget ({', '.join(changed)} differ); name another --out, or add --overwrite"
        )
    return record


def campaign(systems: Sequence[str], seeds: int, budget: Budget, work: Path, path: Path, record: dict[str, Any]) -> None:
    """Computes the runs that `record` lacks and writes it to `path` after each. All systems of a seed come before the next
    seed, so that what is there at any time can be compared."""
    done = {(row["system"], row["seed"]) for row in record["runs"]}
    missing = [(system, seed) for seed in range(seeds) for system in systems if (system, seed) not in done]
    data = Data(work, budget)
    record["chance"] = chance(data)
    for number, (system, seed) in enumerate(missing, start=1):
        print(f"{system}, seed {seed} ({number} of {len(missing)})", file=sys.stderr, flush=True)
        folder = work / "run"
        row = run(system, seed, budget, data, folder)
        shutil.rmtree(folder)
        load = os.getloadavg()[0]
        record["runs"].append({**row, "load": load, "commit": record["provenance"]["commit"]})
        write_json(path, record)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=336, help="of pretraining (default: 16 epochs)")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--clips", type=int, default=672, help="of training")
    parser.add_argument("--test-clips", type=int, default=64)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder for clips and what is thrown away")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where the record is of another budget")
    options = parser.parse_args(arguments)
    for name in ("steps", "epochs", "batch", "seeds", "clips", "test_clips"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 1 or more")
    device = find_device(parser, options.device)
    dtype = choose_dtype(device)[0] if options.dtype == "auto" else options.dtype
    sizes = options.batch, options.clips, options.test_clips
    budget = Budget(options.steps, options.epochs, *sizes, str(device), dtype)
    path = options.out / device_name(device) / "learning.json"
    try:
        record = open_record(path, budget, options.overwrite)
    except BenchmarkError as error:
        parser.error(str(error))
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    record["provenance"] = provenance(device, command, options.commit)
    campaign(options.systems, options.seeds, budget, options.work, path, record)
    draw(record, path.with_suffix(".png"))
    print(figures_table(record), verdicts_table(judge(record)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
