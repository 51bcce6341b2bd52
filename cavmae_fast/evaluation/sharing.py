"""What the processes of an evaluation under torchrun tell each other. Alone, both functions do what one process does."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value (what pickle takes; tensors on the CPU), in the order of the ranks, on every rank."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not _several() or dist.get_rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
