"""A campaign: every system and seed is run under one budget, each run is recorded when it is done, and claims that were
written down before are judged. Stopped at any moment, the same command goes on with the runs that are missing."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkError, add_arguments, device_name, find_device, provenance, read_json, write_json
from benchmarks.evidence.clips import Budget, Data, chance
from cavmae_fast.clip import ClipSpec
from cavmae_fast.models.precision import DTYPES, choose_dtype

Record = dict[str, Any]


@dataclass(frozen=True)
class Defaults:
    """Of a campaign's options."""

    steps: int
    epochs: int
    clips: int
    batch: int = 32
    test_clips: int = 64
    seeds: int = 3


@dataclass(frozen=True)
class Campaign:
    """What is run and what is made of it.

    Attributes:
        kind: of the record, which is also the name of its file.
        systems: in the order in which a seed runs them.
        run: (system, seed, budget, data, folder) -> the figures of one run; the folder is its own and is thrown away.
        draw: (record, path) draws the figure.
        text: what is printed in the end.
        defaults: of the options.
        spec: what the models take of a clip; None: what the preset `small` takes.
    """

    kind: str
    systems: Sequence[str]
    run: Callable[[str, int, Budget, Data, Path], Record]
    draw: Callable[[Record, Path], None]
    text: Callable[[Record], str]
    defaults: Defaults
    spec: ClipSpec | None = None


def open_record(path: Path, budget: Budget, overwrite: bool) -> Record:
    """The record to go on with: that of `path`, or a new one. BenchmarkError when it is of another budget."""
    if overwrite or not path.exists():
        return {"kind": path.stem, "settings": asdict(budget), "runs": []}
    record = read_json(path)
    changed = [name for name, value in asdict(budget).items() if record["settings"].get(name) != value]
    if changed:
        raise BenchmarkError(
            f"{path.name} holds runs of another budget ({', '.join(changed)} differ); name another --out, or add --overwrite"
        )
    return record


def compute(
    campaign: Campaign, systems: Sequence[str], seeds: int, budget: Budget, work: Path, path: Path, record: Record
) -> None:
    """Computes the runs that `record` lacks and writes it to `path` after each. All systems of a seed come before the next
    seed, so that what is there at any time can be compared."""
    done = {(row["system"], row["seed"]) for row in record["runs"]}
    missing = [(system, seed) for seed in range(seeds) for system in systems if (system, seed) not in done]
    data = Data(work, budget, campaign.spec)
    record["chance"] = chance(data)
    for number, (system, seed) in enumerate(missing, start=1):
        print(f"{system}, seed {seed} ({number} of {len(missing)})", file=sys.stderr, flush=True)
        folder = work / "run"
        row = campaign.run(system, seed, budget, data, folder)
        shutil.rmtree(folder, ignore_errors=True)
        load = os.getloadavg()[0]
        record["runs"].append({**row, "load": load, "commit": record["provenance"]["commit"]})
        write_json(path, record)


def main(campaign: Campaign, description: str, arguments: list[str] | None = None) -> int:
    """The program of a campaign."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    usual = campaign.defaults
    parser.add_argument("--steps", type=int, default=usual.steps, help="of pretraining")
    parser.add_argument("--epochs", type=int, default=usual.epochs, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--seeds", type=int, default=usual.seeds)
    parser.add_argument("--systems", nargs="+", choices=campaign.systems, default=list(campaign.systems))
    parser.add_argument("--clips", type=int, default=usual.clips, help="of training")
    parser.add_argument("--test-clips", type=int, default=usual.test_clips)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    work = Path("runs") / campaign.kind
    parser.add_argument("--work", type=Path, default=work, help="folder for clips and what is thrown away")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where the record is of another budget")
    options = parser.parse_args(arguments)
    for name in ("steps", "epochs", "batch", "seeds", "clips", "test_clips"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 1 or more")
    device = find_device(parser, options.device)
    dtype = choose_dtype(device)[0] if options.dtype == "auto" else options.dtype
    sizes = options.batch, options.clips, options.test_clips
    budget = Budget(options.steps, options.epochs, *sizes, str(device), dtype)
    path = options.out / device_name(device) / f"{campaign.kind}.json"
    try:
        record = open_record(path, budget, options.overwrite)
    except BenchmarkError as error:
        parser.error(str(error))
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    record["provenance"] = provenance(device, command, options.commit)
    compute(campaign, options.systems, options.seeds, budget, options.work, path, record)
    campaign.draw(record, path.with_suffix(".png"))
    print(campaign.text(record))
    return 0
