"""Does it learn? The four systems of the CAV-MAE paper, small, on generated clips: one budget, several seeds, and what is
said of them judged claim by claim (`evidence/claims.py`, which was written before the first run).

    python benchmarks/learning.py && python benchmarks/render.py

Every system has the size of the preset `small`, and the losses and the structure of its own preset. All are pretrained for
as many steps on the same batches and then fine-tuned by the recipe `small`. A fifth, not pretrained, is the control.
A run's numbers are written when it is done, and the same command, started again, goes on with the runs that are missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.evidence import campaign
from benchmarks.evidence.campaign import Campaign, Defaults
from benchmarks.evidence.claims import judge
from benchmarks.evidence.report import draw, figures_table, verdicts_table
from benchmarks.evidence.runs import SYSTEMS, run


def main(arguments: list[str] | None = None) -> int:
    made = Campaign(
        kind="learning",
        systems=tuple(SYSTEMS),
        run=run,
        draw=draw,
        text=lambda record: f"{figures_table(record)}\n\n{verdicts_table(judge(record))}",
        defaults=Defaults(steps=336, epochs=6, clips=672),  # 16 epochs of pretraining
    )
    return campaign.main(made, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
