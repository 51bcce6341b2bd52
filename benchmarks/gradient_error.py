"""How far gradients in bfloat16 are from those in float32, for every choice that the tuner may make on this machine.

    python benchmarks/gradient_error.py

The measure is the published model's own error: its gradients under autocast, beside its gradients in float32, on the same
clips and masks. A parameter's *ratio* is our error over that one. **The rule**: for no choice may the median of the ratios
be above 1.0, or the largest above 1.3.

Choices are the implementations of each operator, one operator at a time with all others PyTorch's; what the backward pass
forms again; and the gradient of the residual stream in bfloat16, which is an option of the models. fp8 is a choice of the
user's alone, errs by nature several times as much, and is judged by loss curves: `--fp8` reports it apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

import torch
from torch import Tensor

from benchmarks.common import add_arguments, device_name, find_device, provenance, table, write_json
from cavmae_fast.models import CAVMAE
from cavmae_fast.ops import configuration
from cavmae_fast.ops.parity import error
from cavmae_fast.reference import cavmae as published
from cavmae_fast.tuning.plan import MODELS, Settings, units
from cavmae_fast.tuning.search import PYTORCH, plain
from cavmae_fast.tuning.step import chosen, draw, gradients

MEDIAN, WORST = 1.0, 1.3
"What the median and the largest ratio may be."
WIDTH_384 = {"embed_dim": 384, "num_heads": 6, "norm_pix_loss": True}
TINY = {**MODELS["tiny"].system.sizes, "norm_pix_loss": True}
SIZES = {"width-384": (WIDTH_384, "base"), "tiny": (TINY, "tiny")}
"Size -> (constructor arguments, the tuner's model with operators of the same keys). 'tiny' is for tests."
NOTHING: configuration.Content = {"implementations": {}, "launches": {}}
SYSTEM = MODELS["base"].system
"Says what a step computes; the sizes are those above."


class Choice(NamedTuple):
    """What is compared: entries of the configuration, and attributes of the model."""

    name: str
    content: configuration.Content
    attributes: dict[str, Any]
    fp8: bool = False


IN_FP8 = Choice("fp8", NOTHING, {}, fp8=True)
"What a user chooses, and the tuner never does: it is measured apart, and the rule is not for it."


def choices(model: str, batch: int, device: torch.device) -> Iterator[Choice]:
    """Those of this machine: PyTorch's everywhere first."""
    yield Choice("PyTorch everywhere", NOTHING, {})
    for unit in units(Settings(model, batch, "bfloat16", str(device))):
        for candidate in plain(unit, device) if unit.dtype == torch.bfloat16 else ():
            if candidate.name != PYTORCH:
                yield Choice(f"{unit.name}: {candidate.name}", {**NOTHING, **candidate.content}, {})
    for recompute in CAVMAE.recomputations[1:]:
        yield Choice(f"recompute {recompute}", NOTHING, {"recompute": recompute})
    yield Choice("residual gradient in bfloat16", NOTHING, {"residual_gradient": "low"})


class Truth:
    """The published model's gradients in float32, the error of its own in bfloat16, and our model with its weights."""

    def __init__(self, config: dict[str, Any], batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        reference = published.CAVMAE(**config).to(device)
        self.inputs = draw(reference, batch, device)
        self.exact = gradients(SYSTEM, reference, self.inputs, torch.float32)[1]
        low = gradients(SYSTEM, reference, self.inputs, torch.bfloat16)[1]
        self.errors = [error(g, want) for g, want in zip(low, self.exact, strict=True)]
        self.config, self.state, self.device = config, reference.state_dict(), device
        self.names = [name for name, p in reference.named_parameters() if p.requires_grad]

    def ratios(self, choice: Choice) -> dict[str, float]:
        """Parameter -> its error over the published model's; of those that have a gradient in both."""
        model = CAVMAE(**self.config).to(self.device)
        model.load_state_dict(self.state)
        for name, value in choice.attributes.items():
            setattr(model, name, value)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        with chosen(choice.content):
            values = gradients(SYSTEM, model, self.inputs, torch.bfloat16, choice.fp8)[1]
            found: dict[str, Tensor] = dict(zip(names, values, strict=True))
        rows = zip(self.names, self.exact, self.errors, strict=True)
        return {name: error(found[name], want) / own for name, want, own in rows if name in found and own > 0 and want.any()}


def judge(ratios: dict[str, float]) -> dict[str, Any]:
    """Median and largest ratio, whose it is, and whether the rule allows them."""
    values = torch.tensor(list(ratios.values()), dtype=torch.float64)
    median, worst = float(values.median()), float(values.max())
    parameter = max(ratios, key=ratios.__getitem__)
    allowed = median <= MEDIAN and worst <= WORST  # NaN is not
    return {"median": median, "worst": worst, "parameter": parameter, "parameters": len(ratios), "allowed": allowed}


def report(rows: list[dict[str, Any]], apart: Sequence[dict[str, Any]] = ()) -> str:
    """The table, and the rule in a line; what the rule is not for, in a line each."""
    cells = [
        [r["choice"], f"{r['median']:.2f}", f"{r['worst']:.2f}", r["parameter"], "yes" if r["allowed"] else "**no**"]
        for r in rows
    ]
    rule = f"Allowed: a median of at most {MEDIAN}, a largest ratio of at most {WORST}."
    others = [
        f"{r['choice']}, to which the rule does not apply: median {r['median']:.2f}, worst {r['worst']:.2f}" for r in apart
    ]
    return "\n\n".join([table(["choice", "median", "worst", "of", "allowed"], cells), rule, *others])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="width-384")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--fp8", action="store_true", help="also blocks in fp8, reported apart")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch is {options.batch}; it must be 1 or more")
    device = find_device(parser, options.device)
    config, model = SIZES[options.size]
    truth, rows, apart = Truth(config, options.batch, device), [], []
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    record = {
        "kind": "gradient_error",
        "settings": {"size": options.size, "batch": options.batch},
        "rows": rows,
        "apart": apart,
    }
    record["provenance"] = provenance(device, command, options.commit)
    for choice in (*choices(model, options.batch, device), *([IN_FP8] if options.fp8 else [])):
        row = {"choice": choice.name, **judge(truth.ratios(choice))}
        (apart if choice.fp8 else rows).append(row)
        print(f"{choice.name}: median {row['median']:.2f}, worst {row['worst']:.2f}", file=sys.stderr, flush=True)
        write_json(options.out / device_name(device) / "gradient_error.json", record)
    print(report(rows, apart))
    return 0 if all(row["allowed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
