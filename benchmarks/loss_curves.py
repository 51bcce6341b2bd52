"""Do cheaper steps train as well? Loss curves on the generated clips, several seeds, beside plain bfloat16 with float32
weights.

    python benchmarks/loss_curves.py && python benchmarks/render.py

**Variants**: the residual stream's gradient in bfloat16, recomputation, this package's AdamW with rounded weights, and,
where the models have it, products in fp8. All runs of a seed begin with the same weights and see the same clips and masks.

**The rule**, fixed before the first run. A variant's loss is the mean over the last tenth of the steps; its difference from
the baseline's is taken seed by seed. A variant is *within seed noise* if the mean difference is at most the standard
deviation of the baseline's loss over the seeds, and *the same bits* if no step of any seed differs. Better than the baseline
by more than that is allowed, and named.

A run is recorded when it is done; the same command, started again, goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

import numpy as np
import torch

from benchmarks.common import add_arguments, device_name, find_device, provenance, read_json, table, write_json
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.evaluation.drawing import new_figure
from cavmae_fast.models import CAVMAE, PRESETS
from cavmae_fast.models.precision import Precision
from cavmae_fast.training.clips import make_loader
from cavmae_fast.training.fit import fit
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import Cosine, WarmUp
from cavmae_fast.training.state import RunState

Record = dict[str, Any]
MODEL = PRESETS["small"].model | {
    "embed_dim": 64,
    "num_heads": 2,
    "depth": 2,
    "modality_specific_depth": 1,
    "decoder_embed_dim": 32,
    "decoder_num_heads": 2,
    "decoder_depth": 2,
}
"The preset `small`, smaller."
TASK = PretrainTask(0.5, "unstructured", 1.0, 1.0)
BASELINE = "bfloat16"
POINTS = 100
"Points of a recorded curve, each the mean over as many steps."


@dataclass(frozen=True)
class Variant:
    """How the steps of a run differ from the baseline's: attributes of the model, the optimizer, fields of `Precision`."""

    attributes: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    precision: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    BASELINE: Variant(),
    "residual gradient in bfloat16": Variant({"residual_gradient": "low"}),
    "recompute mlp": Variant({"recompute": "mlp"}),
    "our AdamW": Variant(optimizer="fast-adamw"),
    "fp8": Variant(precision={"fp8": True}),
}


def available() -> list[str]:
    """The variants whose precision there is."""
    known = {each.name for each in fields(Precision)}
    return [name for name, variant in VARIANTS.items() if variant.precision.keys() <= known]


def run(variant: Variant, seed: int, steps: int, loader: Loader, device: torch.device) -> Record:
    """The loss of every step of a run, as means over stretches of steps."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = CAVMAE(**MODEL).to(device).train()
    for name, value in variant.attributes.items():
        setattr(model, name, value)
    TASK.prepare(model)
    schedule = WarmUp(steps // 20, Cosine(0.01))
    recipe = Recipe(2e-3, 0, 1, schedule, betas=(0.9, 0.95), weight_decay=0.05, optimizer=variant.optimizer)
    state = RunState.start(model, recipe, loader, Precision(device, torch.bfloat16, **variant.precision))
    rows: list[Record] = []
    fit(TASK, state, steps, rows.append)
    losses = [row["loss"] for row in rows]
    width = max(1, steps // POINTS)
    curve = [fmean(losses[at : at + width]) for at in range(0, steps, width)]
    tail = fmean(losses[-max(1, steps // 10) :])
    return {"curve": curve, "every": width, "loss": tail, "sum": sum(losses), "seconds": time.perf_counter() - begin}


def _deviation(rows: Sequence[Record]) -> float:
    """The standard deviation of the runs' losses over the seeds."""
    return float(np.std([row["loss"] for row in rows], ddof=1))


def verdicts(record: Record) -> dict[str, Record]:
    """Variant -> its mean difference from the baseline, the seed noise, and what the rule says; of complete variants."""
    runs = {(row["variant"], row["seed"]): row for row in record["runs"]}
    seeds = range(record["settings"]["seeds"])
    if len(seeds) < 2 or any((BASELINE, seed) not in runs for seed in seeds):
        return {}
    base = [runs[BASELINE, seed] for seed in seeds]
    noise, found = _deviation(base), {}
    for name in record["settings"]["variants"]:
        if name == BASELINE or any((name, seed) not in runs for seed in seeds):
            continue
        own = [runs[name, seed] for seed in seeds]
        difference = fmean(a["loss"] - b["loss"] for a, b in zip(own, base))
        if all(a["curve"] == b["curve"] and a["sum"] == b["sum"] for a, b in zip(own, base)):
            outcome = "the same bits"
        elif abs(difference) <= noise:
            outcome = "within seed noise"
        else:  # NaN as well
            outcome = "better" if difference < 0 else "worse"
        found[name] = {"difference": difference, "noise": noise, "outcome": outcome}
    return found


def tables(record: Record) -> str:
    """The figures, and the verdicts beside them."""
    judged, rows = verdicts(record), []
    for name in record["settings"]["variants"]:
        own = [row for row in record["runs"] if row["variant"] == name]
        if not own:
            continue
        spread = f" ± {_deviation(own):.4f}" if len(own) > 1 else ""
        verdict = judged.get(name)
        of_baseline = f"{verdict['difference']:+.4f}" if verdict else "-"
        outcome = verdict["outcome"] if verdict else "baseline" if name == BASELINE else "not judged"
        rows.append([name, f"{fmean(row['loss'] for row in own):.4f}{spread}", of_baseline, outcome])
    return table(["variant", "loss, last tenth", "to the baseline", "verdict"], rows)


def draw(record: Record, path: Path) -> None:
    """The mean curve of each variant, and the baseline's range over the seeds."""
    figure, ((axes,),) = new_figure(1, 1, (7.0, 4.0))
    for name in record["settings"]["variants"]:
        curves = [row["curve"] for row in record["runs"] if row["variant"] == name]
        if not curves:
            continue
        every = next(row["every"] for row in record["runs"] if row["variant"] == name)
        steps = [every * (index + 1) for index in range(len(curves[0]))]
        mean = [fmean(values) for values in zip(*curves)]
        axes.plot(steps, mean, label=name, linewidth=1)
        if name == BASELINE:
            axes.fill_between(steps, [min(v) for v in zip(*curves)], [max(v) for v in zip(*curves)], alpha=0.2)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def campaign(record: Record, path: Path, work: Path, device: torch.device) -> None:
    """Computes the runs that `record` lacks, all variants of a seed before the next seed, and writes it after each."""
    settings = record["settings"]
    train, _ = generate_clips(work / "clips", num_train=settings["clips"], num_test=2, seed=0)
    clips, spec = open_clips(train), CAVMAE(**MODEL).clip_spec
    done = {(row["variant"], row["seed"]) for row in record["runs"]}
    for seed in range(settings["seeds"]):
        missing = [name for name in settings["variants"] if (name, seed) not in done]
        if not missing:
            continue
        loader = make_loader(
            clips, settings["batch"], spec, training=True, backend="torch", device=device, workers=0, seed=seed
        )
        start = loader.state_dict()
        for name in missing:
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            loader.load_state_dict(start)
            row = run(VARIANTS[name], seed, settings["steps"], loader, device)
            record["runs"].append({"variant": name, "seed": seed, **row, "load": os.getloadavg()[0]})
            write_json(path, record)
        loader.close()


def main(arguments: Sequence[str] | None = None) -> int:
    names = available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--work", type=Path, default=Path("runs/loss_curves"), help="folder for clips")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where the record is of another budget")
    options = parser.parse_args(arguments)
    for name in ("steps", "seeds", "batch", "clips"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if options.clips < options.batch:
        parser.error(f"--clips is {options.clips}; it must be at least --batch, which is {options.batch}")
    device = find_device(parser, options.device)
    path = options.out / device_name(device) / "loss_curves.json"
    budget = {name: getattr(options, name) for name in ("steps", "seeds", "batch", "clips")}
    variants = [name for name in VARIANTS if name in {BASELINE, *options.variants}]
    record: Record = {"kind": "loss_curves", "settings": budget, "runs": []}
    if path.exists() and not options.overwrite:
        record = read_json(path)
        changed = [name for name, value in budget.items() if name != "seeds" and record["settings"][name] != value]
        if changed:
            differ = f"{path.name} holds runs of another budget ({', '.join(changed)} differ)"
            parser.error(f"{differ}; name another --out, or add --overwrite")
        known = record["settings"]["variants"]
        variants = [name for name in VARIANTS if name in {*known, *variants}]
    seeds = max(options.seeds, record["settings"]["seeds"])
    record["settings"] = {**record["settings"], "seeds": seeds, "variants": variants}
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    record["provenance"] = provenance(device, command, options.commit)
    campaign(record, path, options.work, device)
    draw(record, path.with_suffix(".png"))
    print(tables(record))
    return 1 if any(verdict["outcome"] == "worse" for verdict in verdicts(record).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
