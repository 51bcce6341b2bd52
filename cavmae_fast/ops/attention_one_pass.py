"""The backward pass of `attention` in Triton in one launch that computes each score once, a program for a head of a sample.

A program keeps a block of keys with their dk and dv in registers, while the queries pass by (c, p and ds as in
`attention_backward.py`; scores are formed transposed, [keys, queries]):

    dv += p^T dout,    dk += ds^T q,    dq += ds k

Five products and one exponential for each score, instead of seven and two. A query's dq is the sum over the blocks of keys.
Until the last block it is kept in float32 in a piece of memory of the program's own, which stays in the L2 cache. Nobody
else touches that piece, so no atomics are needed and the order of the sum is fixed. There are as many programs as run at a
time, and each takes one head after the other; so the memory is small. Barriers let the threads of a program read what others
of them wrote.

A head whose keys fit into one block (RESIDENT, short streams) needs no such memory: its dq is written at once, and delta is
formed from out and dout where they pass. Otherwise delta is formed before the blocks, because each of them reads it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.attention_tiles import columns, exp2, load_rows, locate, store_rows, tail_block
from cavmae_fast.ops.stream_tiles import three

ROWS = 64
"Queries at a time, before and after the blocks."
ALL = 1 << 20
"More tokens than a stream has: each head is one block."


@triton.jit
def _step(
    k, v, dk, dv, q_start, dout_start, out_start, lse_start, dq_start, delta_start, kept_start,
    key_rows, k_count, first, count, later, c, scale,
    Q_STRIDE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, RESIDENT: tl.constexpr, ON_FMA: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to a block's dk and dv, and that block of keys to the queries' dq, which is returned
    as well.

    `later`: it is not the head's first block of keys. Queries outside are 0, and so is what they add.
    """
    rows = first + tl.arange(0, BLOCK)
    inside = rows < count
    q = load_rows(q_start, rows, count, Q_STRIDE, W, BLOCK_W, MASK_Q)
    dout = load_rows(dout_start, rows, count, D, W, BLOCK_W, MASK_Q)
    lse = tl.load(lse_start + rows, mask=inside, other=0.0) if MASK_Q else tl.load(lse_start + rows)
    if RESIDENT:
        out = load_rows(out_start, rows, count, D, W, BLOCK_W, MASK_Q)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    else:
        delta = tl.load(delta_start + rows, mask=inside, other=0.0) if MASK_Q else tl.load(delta_start + rows)
    # Not tl.fma: its negated lse would be instructions of their own, and the compiler makes one of product and difference.
    p = exp2(tl.dot(k, q.T, input_precision="ieee") * c - lse[None, :], ON_FMA)  # [keys, BLOCK]
    if MASK_K:
        p = tl.where((key_rows < k_count)[:, None], p, 0.0)  # exp2(0 - lse) may be infinite
    dp = tl.dot(v, dout.T, input_precision="ieee")
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    dq = tl.dot(ds.T, k, input_precision="ieee")
    if RESIDENT:
        store_rows(dq_start, rows, count, dq * scale, Q_STRIDE, W, BLOCK_W)
    else:
        # As one row of numbers, so that the compiler reads and writes them in one layout: it changes that of dq once.
        place = first * BLOCK_W + tl.arange(0, BLOCK * BLOCK_W)
        within = place < count * BLOCK_W
        before = tl.load(kept_start + place, mask=within & later, other=0.0)
        tl.store(kept_start + place, before + tl.reshape(dq, [BLOCK * BLOCK_W]), mask=within)
    return dk, dv, dq


@triton.jit
def _block(
    k_start, v_start, dk_start, dv_start, q_start, dout_start, out_start, lse_start, dq_start, delta_start, kept_start,
    q_sum, k_sum, v_sum, key_first, k_count, q_count, c, scale,
    Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, Q_TAIL: tl.constexpr, MASK_K: tl.constexpr, RESIDENT: tl.constexpr,
    ON_FMA: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One block of keys: all queries pass by. Adds up the columns of what it computes if SUMS."""
    rows = key_first + tl.arange(0, OUTER)
    keys = load_rows(k_start, rows, k_count, K_STRIDE, W, BLOCK_W, MASK_K)
    values = load_rows(v_start, rows, k_count, K_STRIDE, W, BLOCK_W, MASK_K)
    dk = tl.zeros([OUTER, BLOCK_W], dtype=tl.float32)
    dv = tl.zeros([OUTER, BLOCK_W], dtype=tl.float32)
    dq_sum = tl.zeros([INNER, BLOCK_W], dtype=tl.float32)
    later = key_first > 0
    whole = q_count if Q_TAIL == 0 else q_count // INNER * INNER
    for first in range(0, whole, INNER):
        dk, dv, dq = _step(
            keys, values, dk, dv, q_start, dout_start, out_start, lse_start, dq_start, delta_start, kept_start,
            rows, k_count, first, q_count, later, c, scale,
            Q_STRIDE, D, W, BLOCK_W, INNER, Q_TAIL == 0, MASK_K, RESIDENT, ON_FMA,
        )  # fmt: skip
        if SUMS and RESIDENT:
            dq_sum += dq
    if SUMS and RESIDENT:
        q_sum += tl.sum(dq_sum, axis=0)
    if Q_TAIL > 0:  # noqa: SIM102 (this one is decided when the kernel is compiled)
        if whole < q_count:
            dk, dv, dq = _step(
                keys, values, dk, dv, q_start, dout_start, out_start, lse_start, dq_start, delta_start, kept_start,
                rows, k_count, whole, q_count, later, c, scale,
                Q_STRIDE, D, W, BLOCK_W, Q_TAIL, True, MASK_K, RESIDENT, ON_FMA,
            )  # fmt: skip
            if SUMS and RESIDENT:
                q_sum += tl.sum(dq, axis=0)
    store_rows(dk_start, rows, k_count, dk * scale, K_STRIDE, W, BLOCK_W)
    store_rows(dv_start, rows, k_count, dv, K_STRIDE, W, BLOCK_W)
    if SUMS:
        k_sum += tl.sum(dk, axis=0)
        v_sum += tl.sum(dv, axis=0)
    if not RESIDENT:
        tl.debug_barrier()  # what follows reads what is kept of dq
    return q_sum, k_sum, v_sum


@triton.jit
def attention_one_pass_kernel(
    q, k, v, dq, dk, dv,  # [Rq, ...], [Rk, ...]: rows of Q_STRIDE and K_STRIDE elements
    dout, out,  # [Rq, HEADS * W]
    lse,  # [HEADS, Rq] fp32
    kept,  # [programs, longest, BLOCK_W] fp32: dq so far
    delta,  # [programs, longest] fp32
    sums,  # [streams * batch, 3 * HEADS * W] fp32, or None: the columns of dq, dk, dv of each sample added up
    heads, longest, batch, q0, q1, q2, k0, k1, k2, q_rows, c, scale,
    HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, Q_TAIL: tl.constexpr, K_TAIL: tl.constexpr, RESIDENT: tl.constexpr,
    ON_FMA: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = HEADS * W
    SUMS: tl.constexpr = sums is not None
    kept_start = kept + tl.program_id(0).to(tl.int64) * longest * BLOCK_W
    delta_start = delta + tl.program_id(0) * longest
    for number in range(tl.program_id(0), heads, tl.num_programs(0)):
        head, _, q_first, q_count, k_first, k_count = locate(number, batch, q0, q1, q2, k0, k1, k2, HEADS, ALL, 0)
        q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
        q_offset, k_offset = q_first * Q_STRIDE + head * W, k_first * K_STRIDE + head * W
        out_offset = q_first * D + head * W
        lse_start = lse + head.to(tl.int64) * q_rows + q_first
        if not RESIDENT:
            for first in range(0, q_count, ROWS):
                rows = first + tl.arange(0, ROWS)
                a = load_rows(out + out_offset, rows, q_count, D, W, BLOCK_W, True).to(tl.float32)
                b = load_rows(dout + out_offset, rows, q_count, D, W, BLOCK_W, True).to(tl.float32)
                tl.store(delta_start + rows, tl.sum(a * b, axis=1), mask=rows < q_count)
            tl.debug_barrier()
        q_sum = tl.zeros([BLOCK_W], dtype=tl.float32)
        k_sum, v_sum = q_sum, q_sum
        whole = k_count if K_TAIL == 0 else k_count // OUTER * OUTER
        for first in range(0, whole, OUTER):
            q_sum, k_sum, v_sum = _block(
                k + k_offset, v + k_offset, dk + k_offset, dv + k_offset, q + q_offset, dout + out_offset,
                out + out_offset, lse_start, dq + q_offset, delta_start, kept_start,
                q_sum, k_sum, v_sum, first, k_count, q_count, c, scale,
                Q_STRIDE, K_STRIDE, D, W, BLOCK_W, OUTER, INNER, Q_TAIL, K_TAIL == 0, RESIDENT, ON_FMA, SUMS,
            )  # fmt: skip
        if K_TAIL > 0:  # noqa: SIM102
            if whole < k_count:
                q_sum, k_sum, v_sum = _block(
                    k + k_offset, v + k_offset, dk + k_offset, dv + k_offset, q + q_offset, dout + out_offset,
                    out + out_offset, lse_start, dq + q_offset, delta_start, kept_start,
                    q_sum, k_sum, v_sum, whole, k_count, q_count, c, scale,
                    Q_STRIDE, K_STRIDE, D, W, BLOCK_W, K_TAIL, INNER, Q_TAIL, True, RESIDENT, ON_FMA, SUMS,
                )  # fmt: skip
        if not RESIDENT:
            dq_sum = tl.zeros([ROWS, BLOCK_W], dtype=tl.float32)
            for first in range(0, q_count, ROWS):
                rows = first + tl.arange(0, ROWS)
                tile = load_rows(kept_start, rows, q_count, BLOCK_W, BLOCK_W, BLOCK_W, True)
                store_rows(dq + q_offset, rows, q_count, tile * scale, Q_STRIDE, W, BLOCK_W)
                dq_sum += tile
            q_sum = tl.sum(dq_sum, axis=0)
            tl.debug_barrier()  # the next head uses the memory anew
        if SUMS:
            column = tl.arange(0, BLOCK_W)
            sums_start = sums + number // HEADS * (3 * D) + head * W + column
            tl.store(sums_start, q_sum * scale, mask=column < W)
            tl.store(sums_start + D, k_sum * scale, mask=column < W)
            tl.store(sums_start + 2 * D, v_sum, mask=column < W)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. A CPU, where the interpreter runs one program after the other, counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def attention_one_pass_triton(
    dout, q, kv, out, lse, batch, q_lengths, lengths, heads, options, peel, sums: Tensor | None = None
):
    """(dq, dkv) as `attention_backward_triton` returns them. `options`: a launch of this form, of which PER_SM programs are
    on a multiprocessor at a time.

    `sums`, where given: fp32 `[streams * batch, 3 D]`. It is filled with the sums of dq, dk and dv over the tokens of each
    sample, formed before they are rounded: the bias gradient of the layer that made q, k and v is the sum of its rows.
    """
    qs, ks, vs = columns(q, kv)
    rows, width = q.shape[0], qs.shape[1] // heads
    block_w = max(16, triton.next_power_of_2(width))
    options = dict(options)
    at_a_time, tiles = options.pop("PER_SM") * _processors(q.device), len(lengths) * batch * heads
    resident = max(lengths) <= options["OUTER"]
    programs, longest = (tiles, 0) if resident else (min(at_a_time, tiles), max(q_lengths))
    dq = torch.empty_like(q)
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    kept = q.new_empty(programs * longest * block_w, dtype=torch.float32)
    delta = q.new_empty(programs * longest, dtype=torch.float32)
    attention_one_pass_kernel[(programs,)](
        qs, ks, vs, *columns(dq, None if kv is None else dkv), dout, out, lse, kept, delta, sums,
        tiles, longest, batch, *three(q_lengths), *three(lengths), rows, math.log2(math.e) * width**-0.5, width**-0.5,
        HEADS=heads, W=width, BLOCK_W=block_w, Q_STRIDE=q.stride(0), K_STRIDE=ks.stride(0),
        Q_TAIL=tail_block(q_lengths, options["INNER"], peel),
        K_TAIL=0 if resident else tail_block(lengths, options["OUTER"], peel),
        RESIDENT=resident, ROWS=ROWS, ALL=ALL, **options,
    )  # fmt: skip
    return dq, dkv
