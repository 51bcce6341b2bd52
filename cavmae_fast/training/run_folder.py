"""The folder of a run: what it was started with, its checkpoints and what it recorded; the same command goes on with it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.errors import CavmaeError
from cavmae_fast.ops.configuration import fingerprint
from cavmae_fast.training.metrics import JsonLines
from cavmae_fast.training.run_config import RunConfig

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
    "teacher",
}
"Options that change no result: a run may go on with others. (A teacher is known by its hash, wherever it lies.)"


class FolderInUseError(CavmaeError):
    """Another process writes into the folder of the run."""


class RunFolder:
    """The files of one run. As a context manager it lets go of the lock that `begin` takes: a run's processes may outlive
    the command that started them, and a second start must not write beside them.

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
        self._held: IO[str] | None = None
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

    def begin(self, options: RunConfig) -> bool:
        """Locks the folder and notes the options of the run that begins here, or finds that it was begun here before.

        Returns whether it was. Raises ValueError, listing the differences, when another was; FolderInUseError when a run is
        going on here.
        """
        self._lock()
        config = json.loads(json.dumps(asdict(options), default=str))
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

    def finish(self, summary: dict[str, Any], rows: list[dict[str, Any]], rejected: int, device: str) -> dict[str, Any]:
        """Writes and returns the summary, to which the steps that were skipped, the clips that were `rejected` and the
        fingerprint of the operators in force on `device` are added; what it held before is the last row of `metrics.jsonl`,
        too. A run that has a summary is finished."""
        with JsonLines(self.metrics) as lines:
            lines.write({"step": len(rows), "final": True, **summary})
        found = {"rejected_clips": rejected, "skipped_steps": rows[-1]["skipped"], "operators": fingerprint(device)}
        summary = {**summary, **found}
        write_whole(self.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    def _lock(self) -> None:
        """Takes the folder for this process, until `__exit__` or its end, however it ends."""
        file = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise FolderInUseError(
                f"--out {self.path} is in use by {owner}; wait until it has ended, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._held = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
