"""The folder of a run: what it was started with, its checkpoints and what it recorded; the same command goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CONFIG, METRICS, REJECTS, SUMMARY = "config.json", "metrics.jsonl", "rejects.jsonl", "summary.json"
CHECKPOINTS, MODEL, FIGURES = "checkpoints", "model", ("loss.png", "reconstruction.png")
FREE = {"workers", "log_every", "save_every", "save_minutes", "keep_checkpoints", "overwrite", "out"}
"Options that change no result: a run may go on with others."


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, made if absent.
        overwrite: begin anew, whatever the folder holds. Only files of a run are removed.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._clear()

    def _clear(self) -> None:
        for name in (SUMMARY, CONFIG, METRICS, REJECTS, *FIGURES):
            (self.path / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, MODEL):
            shutil.rmtree(self.path / name, ignore_errors=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def started_with(self) -> dict[str, Any] | None:
        """The configuration of the run that was begun here; None where none was. ValueError when it cannot be read."""
        path = self.path / CONFIG
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}); name another --out, or add --overwrite") from error

    def refuse_finished(self) -> None:
        """ValueError when the run here is finished."""
        if (self.path / SUMMARY).exists():
            raise ValueError(f"--out {self.path} holds a finished run; name another folder, or add --overwrite")

    def begin(self, config: dict[str, Any]) -> bool:
        """Notes the (JSON-able) configuration of the run that begins here, or finds that it was begun here before.

        Returns whether it was. Raises ValueError, listing the differences, when another was.
        """
        before = self.started_with()
        if before is None:
            for name in (METRICS, REJECTS):
                (self.path / name).unlink(missing_ok=True)
            part = self.path / f".{CONFIG}.part"
            part.write_text(json.dumps(config, indent=2) + "\n")
            part.replace(self.path / CONFIG)
            return False
        names = (before.keys() | config.keys()) - FREE
        changed = sorted(name for name in names if before.get(name) != config.get(name))
        if changed:
            now = ", ".join(f"{name} {before.get(name)} then, {config.get(name)} now" for name in changed)
            raise ValueError(
                f"--out {self.path} was begun with other options ({now}); name another folder, or add --overwrite"
            )
        return True
