"""Checkpoints of a run: written whole or not at all, while training goes on; the newest few are kept.

A checkpoint is one file, `checkpoints/step-00000120.pt`, that holds `RunState.state_dict()`. It is read with
`weights_only=True`, so it cannot run code.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavmae_fast.data.sets.shards import put_whole
from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.preemption import Preempted, Preemption
from cavmae_fast.training.state import RunState

_NAME = re.compile(r"step-(\d{8})\.pt")


class SaveError(CavmaeError, RuntimeError):
    """A run that could not save its state; the message says where and why."""


def host_copy(value: Any) -> Any:
    """`value` with every tensor in it copied to the host, so that training may go on while it is written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item) for item in value)
    return value


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the whole checkpoints in `folder`, oldest first."""
    found = [(match, path) for path in folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def read_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; None where there is none.

    Raises:
        SaveError: there are checkpoints, and none can be read.
    """
    reasons = []
    for _, path in reversed(checkpoints(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            reasons.append(f"{path}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
    if reasons:
        raise SaveError(f"none of the {len(reasons)} checkpoints can be read; the newest is {reasons[0]}")
    return None


class CheckpointWriter:
    """Writes checkpoints into `folder` from a thread of its own and keeps the newest `keep` of them.

    `save` copies the state and returns; it first waits for the write before it. A write that fails leaves the checkpoints
    that are there, is reported once by `report`, and makes `close` raise unless a later one succeeded.
    """

    def __init__(self, folder: Path, keep: int, report: Callable[[str], None]) -> None:
        self.folder, self.keep, self.report = folder, keep, report
        self.failure: str | None = None
        self._thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".step-*.part"):  # of a run that was killed while it wrote
            part.unlink()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies `state`, and has it written as the checkpoint of `step`."""
        self.wait()
        copied = host_copy(state)
        self._thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was handed to `save` is on the disk, or could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits for the last write. Raises SaveError when it failed."""
        self.wait()
        if self.failure is not None:
            raise SaveError(self.failure)

    def _write(self, step: int, state: dict[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}.pt"
        try:
            put_whole(path, lambda file: torch.save(state, file))
            _sync_folder(self.folder)
            self.failure = None
        except Exception as error:
            self.failure = f"{path} could not be written: {error}; the checkpoints before it are whole"
            self.report(f"{self.failure}; training goes on")
            return
        for _, old in checkpoints(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Saves a run when it is time: every so many steps or minutes, at its last step, and when it is asked to leave.

    Args:
        writer: writes the checkpoints.
        total: the run's steps.
        every: steps; None: by the clock alone.
        minutes: since the last checkpoint.
        preemption: tells when the run is asked to leave.
    """

    def __init__(
        self, writer: CheckpointWriter, total: int, every: int | None, minutes: float, preemption: Preemption
    ) -> None:
        self.writer, self.total, self.every, self.seconds = writer, total, every, 60 * minutes
        self.preemption = preemption
        self._saved = time.monotonic()

    def due(self, state: RunState) -> bool:
        """Whether it is time, after a step."""
        by_steps = self.every is not None and state.step % self.every == 0
        by_clock = time.monotonic() - self._saved >= self.seconds
        return by_steps or by_clock or state.step == self.total or self.preemption.asked is not None

    def save(self, state: RunState) -> None:
        """Has the run's state written. Raises Preempted, when that is done, where the run was asked to leave."""
        self.writer.save(state.step, state.state_dict())
        self._saved = time.monotonic()
        if (asked := self.preemption.asked) is not None:
            self.writer.close()
            raise Preempted(f"{asked}: left after step {state.step}, which is saved; start the same command again to go on")
