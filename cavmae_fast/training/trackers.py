"""Experiment trackers: the rows of a run, shown by TensorBoard or Weights & Biases as they come."""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.metrics import JsonLines


class TrackerError(CavmaeError, ImportError):
    """A tracker that is asked for and not installed."""


class Tracker(Protocol):
    """Something that shows numbers over steps."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""

    def close(self) -> None:
        """Writes what is held back."""


class TensorBoard:
    """Event files in `folder/tensorboard`. What an interrupted run had shown after `step` is hidden."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if step == 0:
            text = json.dumps(config, indent=2, default=str)
            self._writer.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run, which lies in `folder/wandb` and goes on when the run does: its name is kept in a file beside it. The
    project, the account and whether it is online are W&B's own settings (`WANDB_PROJECT`, `WANDB_MODE`, ...)."""

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        name = folder / "wandb_run.txt"
        if step == 0 or not name.exists():
            write_whole(name, secrets.token_hex(4))
        plain = json.loads(json.dumps(config, default=str))
        self._run = wandb.init(dir=folder, id=name.read_text().strip(), resume="allow", config=plain)
        # Rows carry their own step: after a restart some steps come again, which W&B's own counter would refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_trackers(names: Iterable[str]) -> None:
    """Raises TrackerError for one of `names` that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrackerError(f"--track {name} needs it installed: pip install 'cavmae_fast[{name}]'")


def open_trackers(names: Iterable[str], folder: Path, config: Mapping[str, Any], step: int) -> list[Tracker]:
    """The trackers of `names`, for the run in `folder` that has `step` steps behind it."""
    return [TRACKERS[name](folder, config, step) for name in dict.fromkeys(names)]


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row that a tracker can show; those of an evaluation as `evaluation/mAP`."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in numbers_of(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            flat[name] = value
    return flat


class Recorder:
    """The rows of a run: into `metrics.jsonl` always, and to the trackers. Use as a context manager."""

    def __init__(self, lines: JsonLines, trackers: Iterable[Tracker]) -> None:
        self._lines, self._trackers = lines, list(trackers)

    def write(self, row: dict[str, Any]) -> None:
        """Records one row, which holds its `step`."""
        self._lines.write(row)
        for tracker in self._trackers:
            tracker.log(row["step"], numbers_of(row))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()
        for tracker in self._trackers:
            tracker.close()
