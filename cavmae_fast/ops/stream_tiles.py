"""What kernels over packed streams share: which stream a program works for, and sums over each stream's programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch


def three(values: Sequence) -> list:
    """Kernels take three streams; missing ones repeat the first (tensors) or are empty (0 rows)."""
    filler = values[0] if isinstance(values[0], Tensor) else 0
    return [*values, *[filler] * (3 - len(values))]


@triton.jit
def stream_of_tile(tile, tiles0, tiles1):
    """Stream of a tile, and its number within the stream; each stream has whole tiles of its own."""
    if tile < tiles0:
        stream, local = 0, tile
    elif tile < tiles0 + tiles1:
        stream, local = 1, tile - tiles0
    else:
        stream, local = 2, tile - tiles0 - tiles1
    return stream, local


@triton.jit
def pick(stream, first, second, third):
    if stream == 0:
        chosen = first
    elif stream == 1:
        chosen = second
    else:
        chosen = third
    return chosen


@triton.jit
def stream_sum_kernel(
    partial,  # [programs, D] fp32
    total,  # [streams, D] fp32
    tiles0, tiles1, tiles2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums each stream's rows of `partial` in a fixed order."""
    stream = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = pick(stream, 0, tiles0, tiles0 + tiles1)
    count = pick(stream, tiles0, tiles1, tiles2)
    total_sum = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for start in range(0, count, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        valid = (row < count)[:, None] & (column < D)[None, :]
        total_sum += tl.load(partial + (first + row)[:, None] * D + column[None, :], mask=valid, other=0.0)
    tl.store(total + stream * D + column, tl.sum(total_sum, axis=0), mask=column < D)


def sum_of_streams(partial: Tensor, programs: Sequence[int], streams: int, architecture: str) -> Tensor:
    """Adds up the partial sums `[programs, D]` fp32 of each stream's programs (three counts) -> `[streams, D]` fp32."""
    width = partial.shape[1]
    total = torch.empty(streams, width, dtype=torch.float32, device=partial.device)
    options = launch("stream_sum", architecture, torch.float32)
    stream_sum_kernel[(streams, triton.cdiv(width, options["BLOCK_D"]))](partial, total, *programs, D=width, **options)
    return total
