"""What the processes of an evaluation under torchrun tell each other. Alone, these functions do what one process does."""

from __future__ import annotations

from collections.abc import Callable
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


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, which alone calls it: on every rank, and not before it is done."""
    return gather(make() if is_first() else None)[0]


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not _several() or dist.get_rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
