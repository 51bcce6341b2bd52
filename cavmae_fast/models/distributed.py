"""Rows of all ranks, with gradient: the negatives of the contrastive loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def gather_rows(x: Tensor) -> Tensor:
    """x `[N, D]` of every rank -> `[world size * N, D]`, rank after rank; x itself where nothing is distributed.

    Every rank must hold as many rows. Gradients reach every rank's own rows, scaled so that averaging parameter gradients
    over ranks, as DistributedDataParallel does, gives the gradient of the loss over all rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _GatherRows.apply(x)
