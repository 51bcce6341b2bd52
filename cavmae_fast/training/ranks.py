"""The processes of a run under torchrun: which one this is, and what they tell each other. How they come together and end
together is in `joining.py`.

Every function works alone, too, where it does what one process does. Numbers on a device travel by `torch.distributed`'s
default group (NCCL on GPUs); what the hosts tell each other (decisions, objects) by a gloo group of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"How long a rank waits for another in a collective operation, as when one alone writes; failures are noticed in seconds."


@dataclass(eq=False)
class Ranks:
    """The processes of this run: `rank` is this one's number, `local_rank` the one on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    group: dist.ProcessGroup | None = None
    "gloo, for what the hosts tell each other; None alone."

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Shows a line; what all ranks say alike is said by the first."""
        if self.first:
            from tqdm import tqdm

            tqdm.write(text)

    def report(self, text: str) -> None:
        """Shows a line that concerns this rank."""
        from tqdm import tqdm

        tqdm.write(text if self.world_size == 1 else f"rank {self.rank}: {text}")

    def barrier(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value (what pickle takes; tensors on the CPU), in the order of the ranks, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, which alone runs it, on every rank. When it fails, the run ends."""
        if self.group is None:
            return make()
        box: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` returns here; rank after rank runs it."""
        for turn in range(self.world_size):
            if turn == self.rank:
                result = make()
            self.barrier()
        return result

    def share(self, batch_size: int) -> int:
        """Clips per step on each rank. ValueError when the ranks cannot share a step evenly."""
        if batch_size % self.world_size:
            raise ValueError(
                f"--batch-size is {batch_size} (with fewer clips than that, their number) on {self.world_size} processes, "
                f"which share each step; it must be a multiple of {self.world_size}"
            )
        return batch_size // self.world_size

    def mean(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of this rank's part of a step -> their means over the ranks. A gradient passes as if it were this rank's
        own value, because DDP and FSDP take the mean of gradients."""
        if self.world_size == 1:
            return losses
        values = _Mean.apply(torch.stack([value.float() for value in losses.values()]))
        return dict(zip(losses, values.unbind()))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Agreement:
    """Numbers that each step is to be decided by, the highest of any rank: every rank learns the same ones at the same step.

    Nobody waits: under several ranks the answer to a step's numbers is taken with the next step's. Alone it is at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._under_way: tuple[Tensor, dist.Work] | None = None

    def exchange(self, *numbers: int) -> list[int]:
        """Gives this rank's numbers, 0 or more -> the highest of all ranks' (of the step before; at first zeros)."""
        if self._ranks.group is None:
            return list(numbers)
        before, values = self._under_way, torch.tensor(numbers)
        self._under_way = values, dist.all_reduce(values, dist.ReduceOp.MAX, self._ranks.group, async_op=True)
        if before is None:
            return [0] * len(numbers)
        before[1].wait()
        return before[0].tolist()


_current = Ranks()


def current() -> Ranks:
    """The ranks that `joining.joined` has joined; else this process alone."""
    return _current


@contextlib.contextmanager
def as_current(ranks: Ranks) -> Iterator[None]:
    """Makes `ranks` the current ones, for a block."""
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before
