"""What a training step of each system takes by count: operations, and bytes kept for the backward pass. Nothing is computed.

python benchmarks/budget.py     prints the table of docs/performance.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

import torch

from benchmarks.common import table
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.models.systems import SYSTEMS
from cavmae_fast.training.step_memory import pretraining_memory

NAMES = {
    "cav-mae-base": "CAV-MAE (`base`)",
    "a-mae": "A-MAE (`a-mae`)",
    "v-mae": "V-MAE (`v-mae`)",
    "mavil": "MAViL, stage 1 (`mavil`)",
    "mavil-stage-2": "MAViL, stage 2, teacher included",
}
FEW, MANY = 2, 4
"Clips of two steps, whose difference has no weights in it."


def kept_mib(system: str, recompute: str) -> float:
    """MiB per clip that a step in bfloat16 keeps for its backward pass, weights not counted."""
    few, many = (pretraining_memory(system, recompute, batch).kept for batch in (FEW, MANY))
    return (many - few) / (MANY - FEW) / 2**20


def row(system: str) -> list[str]:
    """A system's line of the table."""
    with torch.device("meta"):
        model = SYSTEMS[system].create()
    operations = [f"{SYSTEMS[system].step_flops(model, plain=plain) / 1e9:.0f}" for plain in (False, True)]
    return [NAMES[system], *operations, *(f"{kept_mib(system, recompute):.0f}" for recompute in RECOMPUTE)]


def rendered(systems: tuple[str, ...] = tuple(NAMES)) -> str:
    """The table: per clip and step GFLOP as they must be done and as the plain reference does them, and MiB kept."""
    headings = ["system", "GFLOP", "plainly", *(f"MiB, `{recompute}`" for recompute in RECOMPUTE)]
    return table(headings, [row(system) for system in systems])


if __name__ == "__main__":
    print(rendered())
