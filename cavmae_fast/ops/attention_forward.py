"""The forward pass of `attention` in Triton: FlashAttention-2 over packed streams, every stream in one launch.

A program takes one block of queries of one (stream, sample, head); the blocks of a head follow each other in the grid, so
that they share its keys and values in the L2 cache. With c = log2(e) / sqrt(W) the probabilities are

    p = exp2(c * q k^T - c * max)        max and sum kept while the keys pass ("online softmax")
"""

from __future__ import annotations

import math

import torch

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.attention_tiles import columns, exp2, launch_of, load_rows, locate, store_rows, tail_block
from cavmae_fast.ops.stream_tiles import three


@triton.jit
def _forward_step(
    q, acc, total, peak, k_start, v_start, first, count, c,
    STRIDE: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
    ON_FMA: tl.constexpr,
):  # fmt: skip
    """The online softmax over one block of keys."""
    rows = first + tl.arange(0, BLOCK)
    k = load_rows(k_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    scores = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_Q, BLOCK]
    if MASK:
        scores = tl.where((rows < count)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * c)
    p = exp2(tl.fma(scores, c, -new_peak[:, None]), ON_FMA)
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, axis=1)
    v = load_rows(v_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def attention_forward_kernel(
    q, k, v,  # [Rq, ...], [Rk, ...]: the columns of one operand in rows of Q_STRIDE and K_STRIDE elements
    out,  # [Rq, HEADS * W]
    lse,  # [HEADS, Rq] fp32, base 2
    batch, q0, q1, q2, k0, k1, k2, q_rows, c,
    HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr, ON_FMA: tl.constexpr,
):  # fmt: skip
    head, block, q_first, q_count, k_first, k_count = locate(
        tl.program_id(0), batch, q0, q1, q2, k0, k1, k2, HEADS, BLOCK_Q, 0
    )
    q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = load_rows(q + q_first * Q_STRIDE + head * W, rows, q_count, Q_STRIDE, W, BLOCK_W, True)
    k_start = k + k_first * K_STRIDE + head * W
    v_start = v + k_first * K_STRIDE + head * W

    acc = tl.zeros([BLOCK_Q, BLOCK_W], dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    whole = k_count if TAIL == 0 else k_count // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        acc, total, peak = _forward_step(
            queries, acc, total, peak, k_start, v_start, first, k_count, c,
            K_STRIDE, W, BLOCK_W, BLOCK_K, TAIL == 0, ON_FMA,
        )  # fmt: skip
    if TAIL > 0:  # noqa: SIM102 (this one is decided when the kernel is compiled)
        if whole < k_count:
            acc, total, peak = _forward_step(
                queries, acc, total, peak, k_start, v_start, whole, k_count, c, K_STRIDE, W, BLOCK_W, TAIL, True, ON_FMA
            )
    out_start = out + q_first * (HEADS * W) + head * W
    store_rows(out_start, rows, q_count, acc / total[:, None], HEADS * W, W, BLOCK_W)
    lse_start = lse + head.to(tl.int64) * q_rows + q_first
    tl.store(lse_start + rows, peak + tl.log2(total), mask=rows < q_count)


def attention_forward_triton(q, kv, batch, q_lengths, lengths, heads, architecture):
    qs, ks, vs = columns(q, kv)
    rows, width = q.shape[0], qs.shape[1] // heads
    block_w = max(16, triton.next_power_of_2(width))
    options, peel = launch_of("attention_forward", architecture, q.dtype, lengths, width)
    out = q.new_empty(rows, heads * width)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    blocks = sum(triton.cdiv(length, options["BLOCK_Q"]) for length in q_lengths)
    attention_forward_kernel[(blocks * batch * heads,)](
        qs, ks, vs, out, lse, batch, *three(q_lengths), *three(lengths), rows, math.log2(math.e) * width**-0.5,
        HEADS=heads, W=width, BLOCK_W=block_w, Q_STRIDE=q.stride(0), K_STRIDE=ks.stride(0),
        TAIL=tail_block(lengths, options["BLOCK_K"], peel), **options,
    )  # fmt: skip
    return out, lse
