"""What does each part of MAViL add? The paper's ablation, small, on generated clips: one budget, several seeds, and what the
paper says of the parts judged claim by claim (`evidence/mavil_claims.py`, which was written before the first run).

    python benchmarks/mavil_learning.py && python benchmarks/render.py

A-MAE and V-MAE alone, joint AV-MAE, with the contrast between modalities, with that between two views, and two rounds of
student and teacher; a model that is not pretrained is the control. All have the same sizes and are pretrained for as many
steps on the same batches. A run's numbers are written when it is done, and the same command, started again, goes on with the
runs that are missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.evidence import campaign
from benchmarks.evidence.campaign import Campaign, Defaults
from benchmarks.evidence.mavil_report import draw, figures_table, verdicts
from benchmarks.evidence.mavil_runs import SPEC, SYSTEMS, run


def main(arguments: list[str] | None = None) -> int:
    made = Campaign(
        kind="mavil-learning",
        systems=tuple(SYSTEMS),
        run=run,
        draw=draw,
        text=lambda record: f"{figures_table(record)}\n\n{verdicts(record)}",
        defaults=Defaults(steps=160, epochs=6, clips=320),  # 16 epochs of pretraining
        spec=SPEC,
    )
    return campaign.main(made, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
