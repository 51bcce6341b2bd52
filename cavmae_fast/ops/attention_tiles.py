"""What the Triton kernels of `attention` share: where a program works, rows of a head, exponentials, launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import ConfigurationError, launch
from cavmae_fast.ops.stream_tiles import pick, stream_of_tile

MAX_HEAD_WIDTH = 128
SHORT = 256
"""Up to so many tokens the launches "short" are taken, each by padded head width; beyond, "long". Of a launch (`configs/`),
BLOCK_Q and OUTER are the rows that a program keeps, BLOCK_K and INNER those that pass by at a time; what the checked-in
ones rest on:

Short: 64 rows per program waste least of 49, 128 and 177 tokens, and 4 warps of 16 rows are one wgmma tile. The rows that
whole blocks leave go through the same loop, masked, because its loads are pipelined, and these launches wait for memory.

Long: 128 rows per program, because every block reads all keys again from the L2 cache. At width 32 that is 2048 / 128 = 16
bytes per clock and SM while exponentials (16 per clock and SM) are the bound, and L2 gives about 24. Because exponentials
are the bound there (products take half their time, all other instructions of the loop 5/6 of it), whole blocks run without
masks, and PEEL gives the rest a block just long enough: 708 = 11 * 64 + 4 tokens then cost 720 columns of exponentials and
not 768. At width 128 products are the bound, and a second copy of the loop's body would make the compiler spill on sm_80.

A 16-bit launch may have ON_FMA, an eighth of the exponentials for each unit of it, which are then computed without the unit
for exponentials (`exp2`). A backward launch with ONE_PASS may have SUMS: sums of columns that are owed are then formed in
the kernel, and not in a pass behind it.

Backward: read off the sm_90 machine code, not measured on a GPU. At width 32, (128, 32) with 4 warps has the fewest
instructions per score (16 in both loops) and 2 programs per SM. At width 64, (64, 64) has 22 instructions against 28 of
(64, 32), but 2 programs per SM against 3, and it spills on sm_80.

float32 runs without matrix units, exactly; small blocks keep it in registers."""


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def locate(program, batch, q0, q1, q2, k0, k1, k2, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Program -> (head, block within the head, first row and count of its queries, of its keys).

    A head has `cdiv(queries, BLOCK_Q)` blocks and, where BLOCK_K is not 0, `cdiv(keys, BLOCK_K)` before them.
    """
    blocks0, blocks1, blocks2 = tl.cdiv(q0, BLOCK_Q), tl.cdiv(q1, BLOCK_Q), tl.cdiv(q2, BLOCK_Q)
    if BLOCK_K > 0:
        blocks0 += tl.cdiv(k0, BLOCK_K)
        blocks1 += tl.cdiv(k1, BLOCK_K)
        blocks2 += tl.cdiv(k2, BLOCK_K)
    stream, local = stream_of_tile(program, blocks0 * (batch * HEADS), blocks1 * (batch * HEADS))
    blocks = pick(stream, blocks0, blocks1, blocks2)
    q_count = pick(stream, q0, q1, q2)
    k_count = pick(stream, k0, k1, k2)
    sample = local // (blocks * HEADS)
    head = local // blocks % HEADS
    q_first = batch * pick(stream, 0, q0, q0 + q1) + sample * q_count
    k_first = batch * pick(stream, 0, k0, k0 + k1) + sample * k_count
    return head, local % blocks, q_first, q_count, k_first, k_count


@triton.jit
def load_rows(start, rows, count, STRIDE: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, MASK: tl.constexpr):
    """Rows `rows` (below `count` if MASK) of one head as [rows, BLOCK_W], 0 outside."""
    column = tl.arange(0, BLOCK_W)
    pointers = start + rows[:, None] * STRIDE + column[None, :]
    if MASK and BLOCK_W != W:
        tile = tl.load(pointers, mask=(rows < count)[:, None] & (column < W)[None, :], other=0.0)
    elif MASK:
        tile = tl.load(pointers, mask=(rows < count)[:, None], other=0.0)
    elif BLOCK_W != W:
        tile = tl.load(pointers, mask=(column < W)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(start, rows, count, tile, STRIDE: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    column = tl.arange(0, BLOCK_W)
    valid = (rows < count)[:, None] & (column < W)[None, :]
    tl.store(start + rows[:, None] * STRIDE + column[None, :], tile.to(start.dtype.element_ty), mask=valid)


@triton.jit
def exp2(x, ON_FMA: tl.constexpr):
    """2^x of a tile [rows, columns], for x up to 127. ON_FMA of every 8 groups of 8 columns are computed by multiplications
    and additions alone (`_exp2_on_fma`), the others by the unit for exponentials.

    Groups of 8 columns are whole registers in the layout of matrix products. So the compiler knows for each register which
    of the two it takes, and the other one is not computed.
    """
    if ON_FMA == 0:
        power = tl.exp2(x)
    else:
        group = tl.arange(0, x.shape[1]) // 8
        power = tl.where((group % 8 < ON_FMA)[None, :], _exp2_on_fma(x), tl.exp2(x))
    return power


@triton.jit
def _exp2_on_fma(x):
    """2^x = 2^n 2^(x - n), with n the integer next to x and a polynomial for |x - n| <= 1/2, whose relative error is below
    7.6e-5: less than a third of what the rounding of a probability to float16 can make. What is smaller than 2^-126 becomes
    2^-126; NaN stays NaN."""
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0  # 1.5 * 2^23: the sum has no bits for a fraction, and n is in its lowest ones
    rest = x - (shifted - 12582912.0)
    power = tl.fma(rest, tl.fma(rest, tl.fma(rest, 0.05517167, 0.24261112), 0.69326099), 0.99992807)
    return power * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)


# ------------------------------------------------------------------------------------------------------- launchers


def columns(q, kv):
    """The operands q, k, v as column slices of `q` [Rq, D] and `kv` [Rk, 2 D], or of one packed [R, 3 D]."""
    if kv is None:
        return q.chunk(3, dim=1)
    return q, *kv.chunk(2, dim=1)


def tail_block(lengths, block, peel):
    """Width of the block that takes what whole blocks leave of every length; 0: the loop takes it, masked."""
    if not peel:
        return 0
    rest = max(length % block for length in lengths)
    return max(16, triton.next_power_of_2(rest))


def launch_key(lengths: Sequence[int], width: int) -> str:
    """What the choice depends on: the longest stream, and the heads' width as the kernels take it."""
    return f"{'short' if max(lengths) <= SHORT else 'long'} {max(16, triton.next_power_of_2(width))}"


def launch_of(kernel: str, architecture: str, dtype: torch.dtype, lengths: Sequence[int], width: int) -> tuple[dict, bool]:
    """Block sizes and options, and whether what whole blocks leave is peeled off. Raises ConfigurationError for
    exponentials that the dtype is too exact for."""
    options = {"ON_FMA": 0} | launch(kernel, architecture, dtype, launch_key(lengths, width))
    if options["ON_FMA"] and dtype.itemsize > 2:
        raise ConfigurationError(f"{kernel} has a launch with ON_FMA for {dtype}; its exponentials are for 16-bit dtypes")
    return options, options.pop("PEEL")
