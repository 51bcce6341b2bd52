"""The folder of a run: what it was started with, its checkpoints and what it recorded; the same command goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cavmae_fast.data.sets.shards import write_whole

FREE = {
    "workers",
    "log_every",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "max_skipped",
    "overwrite",
    "out",
    "track",
    "config",
    "dry_run",
    "shard",
    "recompute",
}
"Options that change no result: a run may go on with others."


class RunFolder:
    """The files of one run.

    Args:
        path: the folder, made if absent.
        overwrite: the run that the folder may hold does not count; `begin` removes it, and nothing but files of a run.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.config, self.summary = path / "config.json", path / "summary.json"
        self.metrics, self.rejects = path / "metrics.jsonl", path / "rejects.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.losses, self.reconstruction = path / "loss.png", path / "reconstruction.png"
        self.checkpoints, self.model = path / "checkpoints", path / "model"
        path.mkdir(parents=True, exist_ok=True)

    def _clear(self) -> None:
        # The summary first: a run whose removal is interrupted is no finished one.
        for file in (
            self.summary,
            self.config,
            self.metrics,
            self.rejects,
            self.skipped,
            self.losses,
            self.reconstruction,
        ):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.model):
            shutil.rmtree(folder, ignore_errors=True)

    def unfinished(self) -> dict[str, Any] | None:
        """The configuration of the run that was begun here, to go on with; None where none was, or where it does not count.

        Raises ValueError when that run is finished, or its configuration cannot be read.
        """
        if self.overwrite:
            return None
        if self.summary.exists():
            raise ValueError(f"--out {self.path} holds a finished run; name another folder, or add --overwrite")
        if not self.config.exists():
            return None
        try:
            return json.loads(self.config.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config} cannot be read ({error}); name another --out, or add --overwrite") from error

    def begin(self, config: dict[str, Any]) -> bool:
        """Notes the (JSON-able) configuration of the run that begins here, or finds that it was begun here before.

        Returns whether it was. Raises ValueError, listing the differences, when another was.
        """
        before = self.unfinished()
        if before is None:
            if self.overwrite:
                self._clear()
            for file in (self.metrics, self.rejects, self.skipped):  # what was left without a configuration
                file.unlink(missing_ok=True)
            write_whole(self.config, json.dumps(config, indent=2) + "\n")
            return False
        names = (before.keys() | config.keys()) - FREE
        changed = sorted(name for name in names if before.get(name) != config.get(name))
        if changed:
            now = ", ".join(f"{name} {before.get(name)} then, {config.get(name)} now" for name in changed)
            raise ValueError(
                f"--out {self.path} was begun with other options ({now}); name another folder, or add --overwrite"
            )
        return True
