"""What kernels over packed streams share: which stream a program works for, and sums over each stream's programs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch

ONE_LEVEL = 2
"Blocks of rows that are summed in one level."


def three(values: Sequence) -> list:
    """Kernels take three streams; missing ones repeat the first (tensors, None) or are empty (0 rows)."""
    filler = 0 if isinstance(values[0], int) else values[0]
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
    total,  # [D / WIDTH, streams * SPLITS, WIDTH] fp32
    tiles0, tiles1, tiles2,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Sums each stream's rows of `partial`, in SPLITS pieces one after the other, in a fixed order."""
    piece = tl.program_id(0)
    stream = piece // SPLITS
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = pick(stream, 0, tiles0, tiles0 + tiles1)
    count = pick(stream, tiles0, tiles1, tiles2)
    share = tl.cdiv(count, SPLITS)
    begin = piece % SPLITS * share
    end = tl.minimum(begin + share, count)
    total_sum = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        valid = (row < end)[:, None] & (column < D)[None, :]
        total_sum += tl.load(partial + (first + row)[:, None].to(tl.int64) * D + column[None, :], mask=valid, other=0.0)
    place = (column // WIDTH * tl.num_programs(0) + piece) * WIDTH + column % WIDTH
    tl.store(total + place, tl.sum(total_sum, axis=0), mask=column < D)


def sum_of_streams(partial: Tensor, programs: Sequence[int], streams: int, architecture: str) -> Tensor:
    """Adds up the partial sums of each stream's programs (three counts): `[programs, D]` fp32 -> `[streams, D]` fp32, or
    `[programs, kinds, D]`, sums of several kinds, -> `[kinds, streams, D]`.

    In two levels where there are many: a stream and some columns alone would occupy a few of a GPU's processors, each of
    which would wait for one row after the other.
    """
    options = dict(launch("stream_sum", architecture, torch.float32))
    splits, rows, (*kinds, width) = options.pop("SPLITS"), options["BLOCK_P"], partial.shape[1:]
    columns = math.prod(kinds) * width

    def add(programs: Sequence[int], splits: int, total: Tensor) -> Tensor:
        grid = (streams * splits, triton.cdiv(columns, options["BLOCK_D"]))
        arguments = {"D": columns, "WIDTH": total.shape[-1], "SPLITS": splits, **options}
        stream_sum_kernel[grid](partial, total, *programs, **arguments)
        return total

    if splits > 1 and max(programs) > ONE_LEVEL * rows:
        room = torch.empty(streams * splits, columns, dtype=torch.float32, device=partial.device)
        partial, programs = add(programs, splits, room), three([splits] * streams)
    return add(programs, 1, torch.empty(*kinds, streams, width, dtype=torch.float32, device=partial.device))
