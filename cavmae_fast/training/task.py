"""`Task`: what a model is trained for. `fit` runs every task the same way; a task knows its losses and how it is judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from cavmae_fast.data.batches import Batch


class Task(Protocol):
    """What `fit` asks of a task."""

    def prepare(self, model: nn.Module) -> None:
        """Freezes what no loss of this task reaches. Called once, before the optimizer is made."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one step, on the device: `loss`, which is minimized, and whatever else is to be recorded. Each is a
        mean over the clips, except what a `Contrastive` task's `contrast` gives."""

    def step_flops(self, model: nn.Module) -> float | None:
        """Operations of one training step, per clip; None where they are not counted."""

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """The task's metrics on these batches."""


@runtime_checkable
class Contrastive(Protocol):
    """What a task can do besides when its loss compares the clips of a batch: so it is computed in parts (`accumulation`).

    `losses` of a whole batch are the sum of `contrast` of its embeddings and of the mean of `part`.
    """

    @property
    def contrasts(self) -> bool:
        """Whether there is a contrastive loss in force."""

    def embed(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """What is contrasted, `[clips, width]` each; draws the same random numbers as `part`."""

    def part(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The losses that are means over clips, `loss` among them, and the embeddings with their graph."""

    def contrast(self, model: nn.Module, embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
        """The contrastive losses of all embeddings of a batch, `loss` among them."""
