"""`Task`: what a model is trained for. `fit` runs every task the same way; a task knows its losses and how it is judged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from cavmae_fast.data.batches import Batch


class Task(Protocol):
    """What `fit` asks of a task."""

    def prepare(self, model: nn.Module) -> None:
        """Freezes what no loss of this task reaches. Called once, before the optimizer is made."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one step, on the device: `loss`, which is minimized, and whatever else is to be recorded."""

    def step_flops(self, model: nn.Module) -> float | None:
        """Operations of one training step, per clip; None where they are not counted."""

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """The task's metrics on these batches."""
