"""The training loop, one for all tasks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.loader import Loader
from cavmae_fast.training.accumulation import accumulate
from cavmae_fast.training.checkpoint import Saver
from cavmae_fast.training.graph import Step, graphed
from cavmae_fast.training.guard import Guard, TrainingError, is_out_of_memory
from cavmae_fast.training.memory import peak_memory
from cavmae_fast.training.readback import Readback
from cavmae_fast.training.state import RunState
from cavmae_fast.training.task import Task


def take_step(task: Task, state: RunState, batch: Batch) -> dict[str, Tensor]:
    """Forward, backward and update on one batch -> the task's losses and what `RunState.update` measured, on the device.

    The host waits for nothing in it, and nothing in it but tensors changes, so that a CUDA graph can replay it.
    """
    if state.recipe.accumulate > 1:
        losses = accumulate(task, state, batch)
    else:
        with state.precision.autocast():
            losses = task.losses(state.model, batch)
        state.backward(losses["loss"])
    return {name: value.detach() for name, value in losses.items()} | state.update(losses["loss"])


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
    guard: Guard | None = None,
    cuda_graph: Literal["auto", "on", "off"] = "off",
    report: Callable[[str], None] = lambda message: None,
) -> None:
    """Trains until `total` steps are taken in all.

    A step whose loss or gradients are not finite changes nothing; the run goes on with the next batch, and ends when there
    are too many of them in a row.

    Args:
        task: gives the losses of a batch.
        state: the run; it is as it should be after every step.
        total: steps, those that `state` has behind it included.
        record: called with one row per step, in order: step, epoch, the task's losses, grad_norm, loss_scale (in float16),
            learning_rate, skipped (steps so far), memory (peak, bytes), clips_per_s, data_wait (share of the time), seconds;
            the last three since this call began. What was not finite is NaN or infinite.
        batches: gives an epoch's batches from the run's loader, for those who look at them on the way.
        log_every: steps whose numbers are read from the device together; until then rows wait. (On a CPU nothing waits.)
        stepped: called after every step, before its numbers are known.
        epoch_done: called with the epoch after its last step, when the rows of all its steps are recorded, and before a
            checkpoint is written.
        saver: writes checkpoints; the rows of the steps before a checkpoint are recorded before it is written.
        guard: is told of steps that were skipped.
        cuda_graph: replay the step as a CUDA graph, where that computes the same ('auto') or in any case ('on').
        report: is told whether it is.

    Raises:
        TrainingError: too many steps in a row had a loss or gradient that is not finite, or memory ran out; rows up to
            there were recorded. Or the step cannot be replayed as a CUDA graph, and must be.
        UnusableDataError: clip after clip cannot be used.
    """
    guard = guard or Guard()
    readback = Readback(log_every)
    step: Step = functools.partial(take_step, task, state)
    begin, waited_before, clips = time.perf_counter(), state.loader.waited, 0

    def deliver(wait: bool = False) -> None:
        rows = readback.take(wait)
        memory = peak_memory(state.precision.device) if rows else 0
        for row in rows:
            position, finite = row.pop("position"), bool(row.pop("finite"))
            try:
                guard.look(row, position, finite, state)
            finally:
                record(row | {"skipped": state.skipped, "memory": memory})

    try:
        while state.step < total:
            for batch in batches(state.loader):
                state.set_learning_rate(batch.epoch, total)
                try:
                    if cuda_graph != "off":
                        step, cuda_graph = graphed(step, state, batch, cuda_graph == "on", report), "off"
                    numbers = step(batch)
                except (RuntimeError, MemoryError) as error:
                    if is_out_of_memory(error):
                        deliver(wait=True)
                        raise guard.out_of_memory(batch, state) from error
                    raise
                state.step += 1
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
                readback.put(note, numbers)
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
