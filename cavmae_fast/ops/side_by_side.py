"""Independent launches, one after the other or on two CUDA streams beside each other.

Products of few rows do not fill a GPU, and those of two token streams with weights of their own do not depend on each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

Jobs = Sequence[Callable[[], object]]
"Functions that write into tensors which are there already, each into its own."
Run = Callable[[Jobs, torch.device], None]


def in_turn(jobs: Jobs, device: torch.device) -> None:
    """Runs all jobs where the caller is."""
    for job in jobs:
        job()


def side_by_side(jobs: Jobs, device: torch.device) -> None:
    """Runs the jobs on two CUDA streams by turns; what the caller launches next waits for all of them.

    The side stream waits for what was launched before, so that it finds its inputs and no earlier user of its results is
    still at work; the caller's waits for it in the end, so that memory which is freed then is nowhere in use. Both waits are
    on the device, and a CUDA graph can hold them.
    """
    if len(jobs) == 1:
        return in_turn(jobs, device)
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            in_turn(jobs[1::2], device)
        in_turn(jobs[::2], device)
    finally:
        current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device. PyTorch hands out 32 streams by turns, again and again: those of high priority are asked for by
    few others, so this one is hardly ever the caller's own, where nothing would be side by side."""
    return torch.cuda.Stream(device, priority=-1)
