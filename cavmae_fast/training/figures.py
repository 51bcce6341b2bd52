"""The figures of a run: its losses over time, and what its epochs reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cavmae_fast.evaluation.drawing import new_figure


def loss_curve(rows: list[dict[str, Any]], panels: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Plots the training losses in `rows` (dicts with step and losses) into the PNG `path`. `panels`: for each its title,
    and for each of its lines the label and the name of the loss; a loss that is 0 throughout is left out."""
    drawn = {
        title: {label: key for label, key in series.items() if any(row[key] != 0 for row in rows)}
        for title, series in panels.items()
    }
    drawn = {title: series for title, series in drawn.items() if series} or dict(panels)
    figure, axes = new_figure(1, len(drawn), (5 * len(drawn), 4))
    steps = [row["step"] for row in rows]
    marker = "o" if len(rows) < 10 else None
    for axis, (title, series) in zip(axes.flat, drawn.items()):
        for label, key in series.items():
            axis.plot(steps, [row[key] for row in rows], label=label, linewidth=1, marker=marker)
        axis.set(title=f"{title} loss", xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def fine_tuning_curves(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Plots the losses and learning rates in `rows` (dicts with step, loss, learning_rate), and the figures in `evaluations`
    (dicts with step and evaluation, a dict of figures) that belong to `metric`, into the PNG `path`."""
    figure, axes = new_figure(1, 3, (14, 4))
    steps = [row["step"] for row in rows]
    for axis, title, key in ((axes[0, 0], "loss", "loss"), (axes[0, 2], "learning rate", "learning_rate")):
        axis.plot(steps, [row[key] for row in rows], linewidth=1, marker="o" if len(rows) < 10 else None)
        axis.set(title=title, xlabel="step")
    axis = axes[0, 1]
    for name in ("accuracy", "mAP") if metric == "accuracy" else ("mAP", "AUC"):
        known = [(row["step"], row["evaluation"][name]) for row in evaluations if row["evaluation"][name] is not None]
        if known:
            axis.plot(*zip(*known), label=name, marker="o", linewidth=2 if name == metric else 1)
            axis.legend()
    axis.set(title="held-out clips, after each epoch", xlabel="step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
