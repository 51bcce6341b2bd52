"""Checkpoints of a run: written whole or not at all, while training goes on; the newest few are kept.

A checkpoint holds `RunState.state_dict()`. It is one file, `checkpoints/step-00000120.pt`, which the first rank writes; or
a folder without the ending, where parameters are sharded and each rank writes its part (`sharded_checkpoint`). Both are read
into the same state on any number of ranks, and neither can run code.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cavmae_fast.data.sets.shards import put_whole
from cavmae_fast.errors import CavmaeError, first_line
from cavmae_fast.training import sharded_checkpoint
from cavmae_fast.training.preemption import Preempted, Preemption
from cavmae_fast.training.ranks import PATIENCE, Agreement, Ranks
from cavmae_fast.training.state import RunState

_NAME = re.compile(r"step-(\d{8})(\.pt)?")


class SaveError(CavmaeError, RuntimeError):
    """A run that could not save its state; the message says where and why."""


def host_copy(value: Any) -> Any:
    """`value` with every tensor in it copied to the host, so that training may go on while it is written."""
    if isinstance(value, DTensor):
        return sharded_checkpoint.host_shard(value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: host_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(item) for item in value)
    return value


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file or folder) of the whole checkpoints in `folder`, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, with whole tensors on the CPU. A damaged one can raise anything."""
    if path.is_dir():
        return sharded_checkpoint.read(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_newest(folder: Path, ranks: Ranks | None = None) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; None where there is none. Under several ranks the first decides which it is.

    Raises:
        SaveError: there are checkpoints, and none can be read; or a rank cannot read what the first one reads.
    """
    ranks = ranks or Ranks()
    path, state = _newest(folder) if ranks.first else (None, None)
    path = ranks.from_first(lambda: path)
    if ranks.first or path is None:
        return state
    try:
        return read(path)
    except Exception as error:
        raise SaveError(
            f"{path}, which the first rank can read, cannot be read here ({first_line(error)}); --out must lie on a disk "
            "that all machines share"
        ) from error


def _newest(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    reasons = []
    for _, path in reversed(checkpoints(folder)):
        try:
            return path, read(path)
        except Exception as error:  # a damaged file can raise anything
            reasons.append(f"{path}: {first_line(error)}")
    if reasons:
        raise SaveError(f"none of the {len(reasons)} checkpoints can be read; the newest is {reasons[0]}")
    return None, None


class CheckpointWriter:
    """Writes checkpoints into `folder` from a thread of its own and keeps the newest `keep` of them.

    `save` copies the state and returns; it first waits for the write before it. A write that fails leaves the checkpoints
    that are there, is reported once by `report`, and makes `close` raise unless a later one succeeded.

    Under several `ranks` all of them call `save`. A state that is the same on all of them is written by the first alone.
    """

    def __init__(self, folder: Path, keep: int, report: Callable[[str], None], ranks: Ranks | None = None) -> None:
        self.folder, self.keep, self.report = folder, keep, report
        self.failure: str | None = None
        self._ranks = ranks or Ranks()
        # The writing threads of all ranks talk to each other, at moments of their own and so in a group of their own.
        several = self._ranks.world_size > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self._thread: threading.Thread | None = None
        if self._ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            for part in folder.glob(".step-*"):  # of a run that was killed while it wrote, or removed an old one
                _remove(part)
        self._ranks.barrier()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies `state`, and has it written as the checkpoint of `step`."""
        self.wait()
        sharded = sharded_checkpoint.is_sharded(state)
        if not (sharded or self._ranks.first):
            return
        path = self.folder / (f"step-{step:08d}" if sharded else f"step-{step:08d}.pt")
        work = self._write_folder if sharded else self._write_file
        self._thread = threading.Thread(target=self._write, args=(work, path, host_copy(state)), name="checkpoint")
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

    def _write(self, work: Callable[[Path, dict[str, Any]], None], path: Path, state: dict[str, Any]) -> None:
        try:
            work(path, state)
            self.failure = None
        except Exception as error:
            self.failure = f"{path} could not be written: {first_line(error)}; the checkpoints before it are whole"
            if self._ranks.first:
                self.report(f"{self.failure}; training goes on")
            return
        if self._ranks.first:
            for _, old in checkpoints(self.folder)[: -self.keep]:
                _remove(old)

    def _write_file(self, path: Path, state: dict[str, Any]) -> None:
        put_whole(path, lambda file: torch.save(state, file))
        _sync_folder(self.folder)

    def _write_folder(self, path: Path, state: dict[str, Any]) -> None:
        """Under a hidden name, which is changed when every rank's part is on the disk."""
        part = path.with_name(f".{path.name}.part")
        try:
            sharded_checkpoint.write(part, state, self._group)
            if self._ranks.first:
                _sync_folder(part)
                if path.exists():  # a damaged one, which was passed over
                    _remove(path)
                part.rename(path)
                _sync_folder(self.folder)
        except BaseException:
            if self._ranks.first:
                shutil.rmtree(part, ignore_errors=True)
            raise


def _remove(checkpoint: Path) -> None:
    """Removes a file; or a folder, whose name goes first, so that what is left of it counts for nothing."""
    if checkpoint.is_dir():
        hidden = checkpoint.with_name(f".{checkpoint.name.lstrip('.')}.old")
        shutil.rmtree(checkpoint.rename(hidden))
    else:
        checkpoint.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last, not only the files' contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Saves a run when it is time: every so many steps or minutes, at its last step, and when it is asked to leave.

    Under several ranks all save after the same step: a signal that one of them gets, and the first one's clock, count for
    all, one step later.

    Args:
        writer: writes the checkpoints.
        total: the run's steps.
        every: steps; None: by the clock alone.
        minutes: since the last checkpoint.
        preemption: tells when the run is asked to leave.
        ranks: that train together; default: this process alone.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        total: int,
        every: int | None,
        minutes: float,
        preemption: Preemption,
        ranks: Ranks | None = None,
    ) -> None:
        self.writer, self.total, self.every, self.seconds = writer, total, every, 60 * minutes
        self.preemption, self._ranks = preemption, ranks or Ranks()
        self._agreement = Agreement(self._ranks)
        self._saved = time.monotonic()
        self._asked = 0

    def due(self, state: RunState) -> bool:
        """Whether it is time, after a step; to be called once after each."""
        elapsed = self._ranks.first and time.monotonic() - self._saved >= self.seconds
        self._asked, by_clock = self._agreement.exchange(self.preemption.asked or 0, int(elapsed))
        by_steps = self.every is not None and state.step % self.every == 0
        return by_steps or bool(by_clock) or state.step == self.total or self._asked != 0

    def save(self, state: RunState) -> None:
        """Has the run's state written. Raises Preempted, when that is done, where the run was asked to leave."""
        self.writer.save(state.step, state.state_dict())
        self._saved = time.monotonic()
        if self._asked:
            self.writer.close()
            self._ranks.barrier()
            asked = signal.Signals(self._asked).name
            raise Preempted(f"{asked}: left after step {state.step}, which is saved; start the same command again to go on")
