"""`cavmae-fast runs`: the runs below a folder, with their state and main figures, and their losses in one plot."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cavmae_fast.data.sets.shards import put_whole
from cavmae_fast.evaluation.drawing import new_figure
from cavmae_fast.training.metrics import read_rows
from cavmae_fast.training.progress import duration

ACTIVE_SECONDS = 120
"A run that recorded something this lately counts as active."
DEPTH = 4
"Folders below the one that is named in which runs are looked for."


@dataclass(frozen=True)
class RunsConfig:
    """List runs with their state and main figures, newest first, and draw their losses."""

    folder: Path = Path("runs")
    """Where to look, folders inside included."""
    plot: Path | None = None
    """Draw the losses of all these runs into this PNG."""


@dataclass(frozen=True)
class Run:
    """A run, from what lies in its folder.

    Attributes:
        path: the folder.
        config: what it was started with.
        rows: of its steps.
        evaluations: rows of its evaluations.
        summary: None until it is finished.
        touched: when something was last recorded, seconds since the epoch.
    """

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None
    touched: float

    @property
    def state(self) -> str:
        """`finished`, `active` or `stopped`, with the step."""
        step = self.rows[-1]["step"] if self.rows else 0
        if self.summary is not None:
            return f"finished, step {step}"
        ago = time.time() - self.touched
        return f"active, step {step}" if ago < ACTIVE_SECONDS else f"stopped {duration(ago)} ago, step {step}"

    @property
    def figures(self) -> str:
        """The last loss, and what the run was judged by, if it was."""
        parts = [f"loss {self.rows[-1]['loss']:.4g}"] if self.rows and self.rows[-1].get("loss") is not None else []
        judged = self.summary or (self.evaluations[-1].get("evaluation", {}) if self.evaluations else {})
        for name in ("A->V R@1", "V->A R@1", "mAP", "accuracy", "d_prime"):
            value = judged.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                parts.append(f"{name} {value:.4g}")
        return ", ".join(parts) or "nothing recorded yet"


def list_runs(config: RunsConfig) -> list[Run]:
    """The runs at and below `config.folder`, newest first; their losses are drawn into `config.plot` where it is given.

    Raises ValueError when the folder is not there or holds no run, or when there is nothing to draw.
    """
    if not config.folder.is_dir():
        raise ValueError(f"{config.folder} is no folder; name one that holds runs")
    runs = sorted(filter(None, map(_read, _places(config.folder, DEPTH))), key=lambda run: -run.touched)
    if not runs:
        raise ValueError(f"{config.folder} holds no run (a folder with config.json and metrics.jsonl)")
    if config.plot is not None:
        _draw([run for run in runs if run.rows], config.folder, config.plot)
    return runs


def render(config: RunsConfig, runs: list[Run]) -> str:
    """A line for each run."""
    lines = []
    for run in runs:
        task = run.config.get("recipe") or run.config.get("model") or "?"
        lines.append(f"{run.path}\n    {task}, {run.config.get('dtype')}: {run.state}; {run.figures}")
    if config.plot is not None:
        lines.append(f"losses          {config.plot}")
    return "\n".join(lines)


def _places(folder: Path, depth: int) -> list[Path]:
    """Folders that look like runs. What lies inside a run is not searched."""
    if (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file():
        return [folder]
    if depth == 0:
        return []
    return [place for inner in sorted(folder.iterdir()) if inner.is_dir() for place in _places(inner, depth - 1)]


def _read(path: Path) -> Run | None:
    """The run in `path`; None when its configuration is not a run's."""
    try:
        config = json.loads((path / "config.json").read_text())
        summary_file = path / "summary.json"
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else None
    except ValueError:
        return None
    rows = read_rows(path / "metrics.jsonl")
    touched = max((path / name).stat().st_mtime for name in ("config.json", "metrics.jsonl"))
    steps = [row for row in rows if "learning_rate" in row]
    return Run(path, config, steps, [row for row in rows if "evaluation" in row], summary, touched)


def _draw(runs: list[Run], folder: Path, path: Path) -> None:
    if not runs:
        raise ValueError(f"no run below {folder} has recorded a step yet: there is nothing to draw")
    figure, axes = new_figure(1, 1, (9, 5))
    axis = axes[0, 0]
    for run in runs:
        points = [(row["step"], row["loss"]) for row in run.rows if row.get("loss") is not None]
        steps, losses = zip(*points) if points else ((), ())
        # A dollar sign would begin a formula, and a leading underscore hide the line from the legend.
        name = str(run.path.relative_to(folder) if run.path != folder else run.path.absolute().name).replace("$", r"\$")
        axis.plot(steps, losses, label=name.lstrip("_"), linewidth=1, marker="o" if len(points) < 10 else None)
    axis.set(title="training loss", xlabel="step", ylabel="loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    put_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
