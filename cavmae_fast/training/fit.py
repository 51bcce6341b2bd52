"""The training loop, one for all tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.loader import Loader
from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.checkpoint import Saver
from cavmae_fast.training.readback import Readback
from cavmae_fast.training.state import RunState
from cavmae_fast.training.task import Task


class TrainingError(CavmaeError, RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


def fit(
    task: Task,
    state: RunState,
    total: int,
    record: Callable[[dict[str, Any]], None],
    *,
    batches: Callable[[Loader], Iterable[Batch]] = iter,
    log_every: int = 1,
    stepped: Callable[[], None] = lambda: None,
    epoch_done: Callable[[int], None] = lambda epoch: None,
    saver: Saver | None = None,
) -> None:
    """Trains until `total` steps are taken in all.

    A step whose loss or gradients are not finite changes nothing, and ends the run once its numbers are read.

    Args:
        task: gives the losses of a batch.
        state: the run; it is as it should be after every step.
        total: steps, those that `state` has behind it included.
        record: called with one row per step, in order: step, epoch, the task's losses, learning_rate, clips_per_s,
            data_wait (share of the time), seconds; the last three since this call began.
        batches: gives an epoch's batches from the run's loader, for those who look at them on the way.
        log_every: steps whose numbers are read from the device together; until then rows wait. (On a CPU nothing waits.)
        stepped: called after every step, before its numbers are known.
        epoch_done: called with the epoch after its last step, when the rows of all its steps are recorded, and before a
            checkpoint is written.
        saver: writes checkpoints; the rows of the steps before a checkpoint are recorded before it is written.

    Raises:
        TrainingError: a loss or gradient is not finite; rows before it were recorded.
        UnusableDataError: clip after clip cannot be used.
    """
    readback = Readback(log_every)
    begin, waited_before, clips = time.perf_counter(), state.loader.waited, 0

    def deliver(wait: bool = False) -> None:
        for row in readback.take(wait):
            position, finite = row.pop("position"), row.pop("finite")
            if not finite:
                raise TrainingError(_not_finite(row, position, state.loader))
            record(row)

    try:
        while state.step < total:
            for batch in batches(state.loader):
                state.set_learning_rate(batch.epoch, total)
                with state.precision.autocast():
                    losses = task.losses(state.model, batch)
                finite = state.update(losses["loss"])
                clips += len(batch.ids)
                elapsed = time.perf_counter() - begin
                note = {
                    "step": state.step,
                    "epoch": batch.epoch,
                    "position": batch.position,
                    "learning_rate": state.learning_rate,
                    "clips_per_s": clips / elapsed,
                    "data_wait": (state.loader.waited - waited_before) / elapsed,
                    "seconds": elapsed,
                }
                readback.put(note, losses | {"finite": finite})
                deliver()
                stepped()
                if state.loader.epoch_done:
                    deliver(wait=True)
                    epoch_done(batch.epoch)
                if saver is not None and saver.due(state):
                    deliver(wait=True)
                    saver.save(state)
                if state.step == total:
                    break
    except TrainingError:
        raise
    except BaseException:
        deliver(wait=True)  # what was measured before is not lost
        raise
    deliver(wait=True)


def _not_finite(row: dict[str, Any], position: int, loader: Loader) -> str:
    """Why the step of this row could not be taken. Its batch is built again, to see whether an input is the cause."""
    names = [name for name, value in row.items() if not math.isfinite(value)]
    what = f"step {row['step']}: {', '.join(names) or 'the gradient'} not finite"
    batch = loader.batch_at(row["epoch"], position)
    for name, x in (("audio", batch.audio), ("imgs", batch.image)):
        broken = [clip for clip, ok in zip(batch.ids, x.flatten(1).isfinite().all(dim=1).tolist()) if not ok]
        if broken:
            return f"{what} because the {name} of {', '.join(broken)} is not finite"
    return f"{what} though the inputs are; try a lower --learning-rate or --dtype float32"
