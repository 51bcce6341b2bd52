"""Triton kernels of `attention`: FlashAttention-2 over packed streams, every stream in one launch.

A program takes one block of rows of one (stream, sample, head); the blocks of a head follow each other in the grid, so
that they share its keys and values in the L2 cache. With c = log2(e) / sqrt(W) the probabilities are

    p = exp2(c * q k^T - c * max)        forward, max and sum kept while the keys pass ("online softmax")
    p = exp2(c * q k^T - lse)            backward, from the forward's lse in base 2

The backward launch holds two kinds of program, which differ in what stays in registers while the rest passes by:

    keys:     dv += p^T dout,   dk += ds^T q                       (scores are formed transposed, [keys, queries])
    queries:  dq += ds k        with ds = p * (dout v^T - delta),  delta = rowsum(dout * out), a small kernel before

Each product reads its first factor from where the step before left it, in registers. The price is a second exponential
and two more products; for up to 177 tokens of width 64 the launch is bound by memory all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.stream_tiles import pick, stream_of_tile, three

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

Backward: read off the sm_90 machine code, not measured on a GPU. At width 32, (128, 32) with 4 warps has the fewest
instructions per score (16 in both loops) and 2 programs per SM. At width 64, (64, 64) has 22 instructions against 28 of
(64, 32), but 2 programs per SM against 3, and it spills on sm_80.

float32 runs without matrix units, exactly; small blocks keep it in registers."""


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _locate(program, batch, q0, q1, q2, k0, k1, k2, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
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
def _load_rows(start, rows, count, STRIDE: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, MASK: tl.constexpr):
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
def _store_rows(start, rows, count, tile, STRIDE: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    column = tl.arange(0, BLOCK_W)
    valid = (rows < count)[:, None] & (column < W)[None, :]
    tl.store(start + rows[:, None] * STRIDE + column[None, :], tile.to(start.dtype.element_ty), mask=valid)


@triton.jit
def _forward_step(
    q, acc, total, peak, k_start, v_start, first, count, c,
    STRIDE: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The online softmax over one block of keys."""
    rows = first + tl.arange(0, BLOCK)
    k = _load_rows(k_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    scores = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_Q, BLOCK]
    if MASK:
        scores = tl.where((rows < count)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * c)
    p = tl.exp2(tl.fma(scores, c, -new_peak[:, None]))
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, axis=1)
    v = _load_rows(v_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def attention_forward_kernel(
    q, k, v,  # [Rq, ...], [Rk, ...]: the columns of one operand in rows of Q_STRIDE and K_STRIDE elements
    out,  # [Rq, HEADS * W]
    lse,  # [HEADS, Rq] fp32, base 2
    batch, q0, q1, q2, k0, k1, k2, q_rows, c,
    HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    head, block, q_first, q_count, k_first, k_count = _locate(
        tl.program_id(0), batch, q0, q1, q2, k0, k1, k2, HEADS, BLOCK_Q, 0
    )
    q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = _load_rows(q + q_first * Q_STRIDE + head * W, rows, q_count, Q_STRIDE, W, BLOCK_W, True)
    k_start = k + k_first * K_STRIDE + head * W
    v_start = v + k_first * K_STRIDE + head * W

    acc = tl.zeros([BLOCK_Q, BLOCK_W], dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    whole = k_count if TAIL == 0 else k_count // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        acc, total, peak = _forward_step(
            queries, acc, total, peak, k_start, v_start, first, k_count, c,
            K_STRIDE, W, BLOCK_W, BLOCK_K, TAIL == 0,
        )  # fmt: skip
    if TAIL > 0:  # noqa: SIM102 (this one is decided when the kernel is compiled)
        if whole < k_count:
            acc, total, peak = _forward_step(
                queries, acc, total, peak, k_start, v_start, whole, k_count, c, K_STRIDE, W, BLOCK_W, TAIL, True
            )
    out_start = out + q_first * (HEADS * W) + head * W
    _store_rows(out_start, rows, q_count, acc / total[:, None], HEADS * W, W, BLOCK_W)
    lse_start = lse + head.to(tl.int64) * q_rows + q_first
    tl.store(lse_start + rows, peak + tl.log2(total), mask=rows < q_count)


@triton.jit
def attention_delta_kernel(
    out, dout,  # [R, HEADS * W]
    delta,  # [HEADS, R] fp32
    rows, HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    a = _load_rows(out + head * W, row, rows, HEADS * W, W, BLOCK_W, True).to(tl.float32)
    b = _load_rows(dout + head * W, row, rows, HEADS * W, W, BLOCK_W, True).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * rows + row, tl.sum(a * b, axis=1), mask=row < rows)


@triton.jit
def _backward_keys_step(
    k, v, dk, dv, q_start, dout_start, lse_start, delta_start, first, count, c, Q_STRIDE: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to a block's dk and dv. Queries outside are 0, and so is what they add."""
    rows = first + tl.arange(0, BLOCK)
    q = _load_rows(q_start, rows, count, Q_STRIDE, W, BLOCK_W, MASK)
    dout = _load_rows(dout_start, rows, count, D, W, BLOCK_W, MASK)
    if MASK:
        lse = tl.load(lse_start + rows, mask=rows < count, other=0.0)
        delta = tl.load(delta_start + rows, mask=rows < count, other=0.0)
    else:
        lse = tl.load(lse_start + rows)
        delta = tl.load(delta_start + rows)
    p = tl.exp2(tl.fma(tl.dot(k, q.T, input_precision="ieee"), c, -lse[None, :]))  # [keys, BLOCK]
    dp = tl.dot(v, dout.T, input_precision="ieee")
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_queries_step(
    q, dout, lse, delta, dq, k_start, v_start, first, count, c, STRIDE: tl.constexpr,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to a block's dq."""
    rows = first + tl.arange(0, BLOCK)
    k = _load_rows(k_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    v = _load_rows(v_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    p = tl.exp2(tl.fma(tl.dot(q, k.T, input_precision="ieee"), c, -lse[:, None]))  # [queries, BLOCK]
    if MASK:
        p = tl.where((rows < count)[None, :], p, 0.0)  # exp2(0 - lse) may be infinite
    ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def attention_backward_kernel(
    q, k, v, dq, dk, dv,  # [Rq, ...], [Rk, ...]: rows of Q_STRIDE and K_STRIDE elements
    dout,  # [Rq, HEADS * W]
    lse, delta,  # [HEADS, Rq] fp32
    batch, q0, q1, q2, k0, k1, k2, q_rows, c, scale,
    HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, Q_TAIL: tl.constexpr, K_TAIL: tl.constexpr,
):  # fmt: skip
    head, block, q_first, q_count, k_first, k_count = _locate(
        tl.program_id(0), batch, q0, q1, q2, k0, k1, k2, HEADS, OUTER, OUTER
    )
    q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
    D: tl.constexpr = HEADS * W
    q_offset = q_first * Q_STRIDE + head * W
    k_offset = k_first * K_STRIDE + head * W
    q_start, k_start, v_start = q + q_offset, k + k_offset, v + k_offset
    dout_start = dout + q_first * D + head * W
    row_offset = head.to(tl.int64) * q_rows + q_first
    lse_start, delta_start = lse + row_offset, delta + row_offset
    key_blocks = tl.cdiv(k_count, OUTER)
    acc = tl.zeros([OUTER, BLOCK_W], dtype=tl.float32)
    if block < key_blocks:
        rows = block * OUTER + tl.arange(0, OUTER)
        keys = _load_rows(k_start, rows, k_count, K_STRIDE, W, BLOCK_W, True)
        values = _load_rows(v_start, rows, k_count, K_STRIDE, W, BLOCK_W, True)
        acc_v = tl.zeros([OUTER, BLOCK_W], dtype=tl.float32)
        whole = q_count if Q_TAIL == 0 else q_count // INNER * INNER
        for first in range(0, whole, INNER):
            acc, acc_v = _backward_keys_step(
                keys, values, acc, acc_v, q_start, dout_start, lse_start, delta_start, first, q_count, c,
                Q_STRIDE, D, W, BLOCK_W, INNER, Q_TAIL == 0,
            )  # fmt: skip
        if Q_TAIL > 0:  # noqa: SIM102
            if whole < q_count:
                acc, acc_v = _backward_keys_step(
                    keys, values, acc, acc_v, q_start, dout_start, lse_start, delta_start, whole, q_count, c,
                    Q_STRIDE, D, W, BLOCK_W, Q_TAIL, True,
                )  # fmt: skip
        _store_rows(dk + k_offset, rows, k_count, acc * scale, K_STRIDE, W, BLOCK_W)
        _store_rows(dv + k_offset, rows, k_count, acc_v, K_STRIDE, W, BLOCK_W)
    else:
        rows = (block - key_blocks) * OUTER + tl.arange(0, OUTER)
        queries = _load_rows(q_start, rows, q_count, Q_STRIDE, W, BLOCK_W, True)
        gradient = _load_rows(dout_start, rows, q_count, D, W, BLOCK_W, True)
        lse_rows = tl.load(lse_start + rows, mask=rows < q_count, other=0.0)
        delta_rows = tl.load(delta_start + rows, mask=rows < q_count, other=0.0)
        whole = k_count if K_TAIL == 0 else k_count // INNER * INNER
        for first in range(0, whole, INNER):
            acc = _backward_queries_step(
                queries, gradient, lse_rows, delta_rows, acc, k_start, v_start, first, k_count, c,
                K_STRIDE, W, BLOCK_W, INNER, K_TAIL == 0,
            )  # fmt: skip
        if K_TAIL > 0:  # noqa: SIM102
            if whole < k_count:
                acc = _backward_queries_step(
                    queries, gradient, lse_rows, delta_rows, acc, k_start, v_start, whole, k_count, c,
                    K_STRIDE, W, BLOCK_W, K_TAIL, True,
                )  # fmt: skip
        _store_rows(dq + q_offset, rows, q_count, acc * scale, Q_STRIDE, W, BLOCK_W)


# ------------------------------------------------------------------------------------------------------- launchers


def _columns(q, kv):
    """The operands q, k, v as column slices of `q` [Rq, D] and `kv` [Rk, 2 D], or of one packed [R, 3 D]."""
    if kv is None:
        return q.chunk(3, dim=1)
    return q, *kv.chunk(2, dim=1)


def _tail(lengths, block, peel):
    """Width of the block that takes what whole blocks leave of every length; 0: the loop takes it, masked."""
    if not peel:
        return 0
    rest = max(length % block for length in lengths)
    return max(16, triton.next_power_of_2(rest))


def launch_key(lengths: Sequence[int], width: int) -> str:
    """What the choice depends on: the longest stream, and the heads' width as the kernels take it."""
    return f"{'short' if max(lengths) <= SHORT else 'long'} {max(16, triton.next_power_of_2(width))}"


def _launch(kernel: str, architecture: str, dtype: torch.dtype, lengths: Sequence[int], width: int) -> tuple[dict, bool]:
    """Block sizes and options, and whether what whole blocks leave is peeled off."""
    options = dict(launch(kernel, architecture, dtype, launch_key(lengths, width)))
    return options, options.pop("PEEL")


def attention_forward_triton(q, kv, batch, q_lengths, lengths, heads, architecture):
    qs, ks, vs = _columns(q, kv)
    rows, width = q.shape[0], qs.shape[1] // heads
    block_w = max(16, triton.next_power_of_2(width))
    options, peel = _launch("attention_forward", architecture, q.dtype, lengths, width)
    out = q.new_empty(rows, heads * width)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    blocks = sum(triton.cdiv(length, options["BLOCK_Q"]) for length in q_lengths)
    attention_forward_kernel[(blocks * batch * heads,)](
        qs, ks, vs, out, lse, batch, *three(q_lengths), *three(lengths), rows, math.log2(math.e) * width**-0.5,
        HEADS=heads, W=width, BLOCK_W=block_w, Q_STRIDE=q.stride(0), K_STRIDE=ks.stride(0),
        TAIL=_tail(lengths, options["BLOCK_K"], peel), **options,
    )  # fmt: skip
    return out, lse


def attention_backward_triton(dout, q, kv, out, lse, batch, q_lengths, lengths, heads, architecture):
    qs, ks, vs = _columns(q, kv)
    rows, width = q.shape[0], qs.shape[1] // heads
    block_w = max(16, triton.next_power_of_2(width))
    options, peel = _launch("attention_backward", architecture, q.dtype, (*q_lengths, *lengths), width)
    delta_options = launch("attention_delta", architecture, q.dtype)
    delta = torch.empty_like(lse)
    attention_delta_kernel[(triton.cdiv(rows, delta_options["BLOCK_R"]), heads)](
        out, dout, delta, rows, HEADS=heads, W=width, BLOCK_W=block_w, **delta_options
    )
    dq = torch.empty_like(q)
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    blocks = sum(triton.cdiv(length, options["OUTER"]) for length in (*q_lengths, *lengths))
    attention_backward_kernel[(blocks * batch * heads,)](
        qs, ks, vs, *_columns(dq, None if kv is None else dkv), dout, lse, delta,
        batch, *three(q_lengths), *three(lengths), rows, math.log2(math.e) * width**-0.5, width**-0.5,
        HEADS=heads, W=width, BLOCK_W=block_w, Q_STRIDE=q.stride(0), K_STRIDE=ks.stride(0),
        Q_TAIL=_tail(q_lengths, options["INNER"], peel), K_TAIL=_tail(lengths, options["INNER"], peel), **options,
    )  # fmt: skip
    return dq, dkv
