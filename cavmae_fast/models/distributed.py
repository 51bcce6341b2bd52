"""Rows of all ranks, with gradient: the negatives of the contrastive loss."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cavmae_fast import compat

FIRST, LATER = timedelta(hours=1), timedelta(minutes=1)
"How long a rank whose number of rows is new waits for the others to say theirs: the first time, when all do, and later."
NEGATIVES = ("all", "rank")
"What a model's `negatives` may be: the clips of every rank, or this rank's alone."


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every rank computes the same loss of the same rows, so the sum over ranks of the gradients that reach this rank's
        # rows is world_size times its own; DDP's mean over ranks then gives the gradient of that one loss.
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows] * dist.get_world_size()


class _RowCheck:
    """Holds against each other what the ranks gather, whenever a rank's shape changes: a collective operation over unequal
    parts would hang or mix up rows.

    It goes through the store that the ranks met in, since a rank whose shape has not changed takes no part.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.shape: tuple[int, ...] | None = None
        self.group: dist.ProcessGroup | None = None

    def __call__(self, shape: tuple[int, ...]) -> None:
        """To be called before each gathering. ValueError, on every rank whose shape has changed, when they are unequal."""
        if self.group is not dist.group.WORLD:  # another run in the same process
            self.calls, self.shape, self.group = 0, None, dist.group.WORLD
        self.calls += 1
        if shape == self.shape or (store := compat.rank_store()) is None:
            return
        before, self.shape = self.shape, shape
        keys = [f"gather_rows/{self.calls}/{rank}" for rank in range(dist.get_world_size())]
        store.set(keys[dist.get_rank()], str(list(shape)))
        with contextlib.suppress(RuntimeError):  # not all have said so in time
            store.wait(keys, FIRST if before is None else LATER)
        shapes = [store.get(key).decode() if store.check([key]) else str(list(before or ())) for key in keys]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"the ranks hold rows of shapes {', '.join(shapes)}, in the order of the ranks; they must be equal (in a "
                "DataLoader: drop_last=True), or the model's negatives be 'rank'"
            )


_check_rows = _RowCheck()


def gather_rows(x: Tensor) -> Tensor:
    """x `[N, D]` of every rank -> `[world size * N, D]`, rank after rank; x itself where nothing is distributed.

    Every rank must hold as many rows. Gradients reach every rank's own rows, scaled so that averaging parameter gradients
    over ranks, as DistributedDataParallel does, gives the gradient of the loss over all rows.

    Raises ValueError when the ranks hold different numbers of rows, which is looked at whenever the shape changes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    _check_rows(tuple(x.shape))
    return _GatherRows.apply(x)
