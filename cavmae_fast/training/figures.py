"""The figure of a run: its losses over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cavmae_fast.evaluation.drawing import new_figure


def loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots the training losses in `rows` (dicts with step, loss_mae_a, loss_mae_v, loss_c) into the PNG `path`."""
    figure, axes = new_figure(1, 2, (10, 4))
    steps = [row["step"] for row in rows]
    marker = "o" if len(rows) < 10 else None
    panels = (
        (axes[0, 0], "reconstruction", {"audio": "loss_mae_a", "video": "loss_mae_v"}),
        (axes[0, 1], "contrastive (weighted)", {"audio-video": "loss_c"}),
    )
    for axis, title, series in panels:
        for label, key in series.items():
            axis.plot(steps, [row[key] for row in rows], label=label, linewidth=1, marker=marker)
        axis.set(title=f"{title} loss", xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
