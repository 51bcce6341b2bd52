"""What becomes of steps that cannot be taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cavmae_fast.data.batches import Batch
from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.state import RunState


class TrainingError(CavmaeError, RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


class Guard:
    """Counts the steps that were skipped, names their clips, and ends a run in which no step can be taken any more.

    Args:
        most: so many skipped steps in a row end the run.
        write: is given a row for each skipped step: step, epoch, position, reason, clips.
        report: is told of the first one.
        kept: says which checkpoint there is, for the message that ends a run.
    """

    def __init__(
        self,
        most: int = 5,
        write: Callable[[dict[str, Any]], None] = lambda row: None,
        report: Callable[[str], None] = lambda message: None,
        kept: Callable[[], str] = lambda: "no checkpoint was written",
    ) -> None:
        self.most, self.write, self.report, self.kept = most, write, report, kept

    def look(self, row: dict[str, Any], position: int, finite: bool, state: RunState) -> None:
        """Takes note of a step whose numbers have arrived; counts in `state`.

        Raises:
            TrainingError: it was one too many.
        """
        if finite:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        batch = state.loader.batch_at(row["epoch"], position)
        reason = _reason(row, batch)
        step = {"step": row["step"], "epoch": row["epoch"], "position": position}
        self.write(step | {"reason": reason, "clips": list(batch.ids)})
        if state.skipped == 1:
            self.report(f"step {row['step']} was skipped: {reason}; every skipped step and its clips are recorded")
        if state.skipped_in_a_row >= self.most:
            raise TrainingError(
                f"{self.most} steps in a row were skipped, the last of them step {row['step']}: {reason}; {self.kept()}"
            )

    def out_of_memory(self, batch: Batch, state: RunState) -> TrainingError:
        """What to raise when the step after `state.step` did not fit."""
        shapes = f"audio {list(batch.audio.shape)}, imgs {list(batch.image.shape)}"
        return TrainingError(
            f"out of memory on {state.precision.device} in step {state.step + 1}, of {len(batch.ids)} clips ({shapes}); "
            f"{self.kept()}; a smaller --batch-size, --accumulate N (the same gradients, in N parts) or --dtype bfloat16 "
            "takes less"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch says so by a class of its own on a GPU, on a CPU by the text alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _reason(row: dict[str, Any], batch: Batch) -> str:
    """Why the step of this row could not be taken. Its batch was built again, to see whether an input is the cause."""
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    gradient = not math.isfinite(numbers.pop("grad_norm"))
    names = [name for name, value in numbers.items() if not math.isfinite(value)] or ["the gradient"] * gradient
    what = f"{', '.join(names)} not finite"
    for name, x in (("audio", batch.audio), ("imgs", batch.image)):
        broken = [clip for clip, ok in zip(batch.ids, x.flatten(1).isfinite().all(dim=1).tolist()) if not ok]
        if broken:
            return f"{what} because the {name} of {', '.join(broken)} is not finite"
    if "loss_scale" in row:
        return f"{what} at a loss scale of {row['loss_scale']:g}, though the inputs are; try --dtype bfloat16 or float32"
    return f"{what} though the inputs are; try a lower --learning-rate, --clip-grad or --dtype float32"
