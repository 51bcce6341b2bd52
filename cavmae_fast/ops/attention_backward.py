"""The backward pass of `attention` in Triton in two launches, with each program writing only what it alone computes.

With c = log2(e) / sqrt(W) the probabilities are formed again from the forward's lse, which is in base 2:

    p = exp2(c * q k^T - lse)

After a small kernel for delta, the launch holds two kinds of program, which differ in what stays in registers while the rest
passes by:

    keys:     dv += p^T dout,   dk += ds^T q                       (scores are formed transposed, [keys, queries])
    queries:  dq += ds k        with ds = p * (dout v^T - delta),  delta = rowsum(dout * out)

Each product reads its first factor from where the step before left it, in registers. The price is a second exponential and
two more products; for up to 177 tokens of width 64 the launch is bound by memory all the same. `attention_one_pass.py`
computes each score once; a launch with ONE_PASS takes it. The sums of columns that are owed (`attention.py`) are formed in a
pass behind, or with SUMS in such a launch.
"""

from __future__ import annotations

import math

import torch

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.attention_one_pass import attention_one_pass_triton
from cavmae_fast.ops.attention_tiles import columns, exp2, launch_of, load_rows, locate, store_rows, tail_block
from cavmae_fast.ops.attention_torch import column_sums
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.stream_tiles import sum_of_streams, three


@triton.jit
def attention_delta_kernel(
    out, dout,  # [R, HEADS * W]
    delta,  # [HEADS, R] fp32
    rows, HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    a = load_rows(out + head * W, row, rows, HEADS * W, W, BLOCK_W, True).to(tl.float32)
    b = load_rows(dout + head * W, row, rows, HEADS * W, W, BLOCK_W, True).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * rows + row, tl.sum(a * b, axis=1), mask=row < rows)


@triton.jit
def _backward_keys_step(
    k, v, dk, dv, q_start, dout_start, lse_start, delta_start, first, count, c, Q_STRIDE: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, ON_FMA: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to a block's dk and dv. Queries outside are 0, and so is what they add."""
    rows = first + tl.arange(0, BLOCK)
    q = load_rows(q_start, rows, count, Q_STRIDE, W, BLOCK_W, MASK)
    dout = load_rows(dout_start, rows, count, D, W, BLOCK_W, MASK)
    if MASK:
        lse = tl.load(lse_start + rows, mask=rows < count, other=0.0)
        delta = tl.load(delta_start + rows, mask=rows < count, other=0.0)
    else:
        lse = tl.load(lse_start + rows)
        delta = tl.load(delta_start + rows)
    p = exp2(tl.fma(tl.dot(k, q.T, input_precision="ieee"), c, -lse[None, :]), ON_FMA)  # [keys, BLOCK]
    dp = tl.dot(v, dout.T, input_precision="ieee")
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_queries_step(
    q, dout, lse, delta, dq, k_start, v_start, first, count, c, STRIDE: tl.constexpr,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, ON_FMA: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to a block's dq."""
    rows = first + tl.arange(0, BLOCK)
    k = load_rows(k_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    v = load_rows(v_start, rows, count, STRIDE, W, BLOCK_W, MASK)
    p = exp2(tl.fma(tl.dot(q, k.T, input_precision="ieee"), c, -lse[:, None]), ON_FMA)  # [queries, BLOCK]
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
    ON_FMA: tl.constexpr,
):  # fmt: skip
    head, block, q_first, q_count, k_first, k_count = locate(
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
        keys = load_rows(k_start, rows, k_count, K_STRIDE, W, BLOCK_W, True)
        values = load_rows(v_start, rows, k_count, K_STRIDE, W, BLOCK_W, True)
        acc_v = tl.zeros([OUTER, BLOCK_W], dtype=tl.float32)
        whole = q_count if Q_TAIL == 0 else q_count // INNER * INNER
        for first in range(0, whole, INNER):
            acc, acc_v = _backward_keys_step(
                keys, values, acc, acc_v, q_start, dout_start, lse_start, delta_start, first, q_count, c,
                Q_STRIDE, D, W, BLOCK_W, INNER, Q_TAIL == 0, ON_FMA,
            )  # fmt: skip
        if Q_TAIL > 0:  # noqa: SIM102
            if whole < q_count:
                acc, acc_v = _backward_keys_step(
                    keys, values, acc, acc_v, q_start, dout_start, lse_start, delta_start, whole, q_count, c,
                    Q_STRIDE, D, W, BLOCK_W, Q_TAIL, True, ON_FMA,
                )  # fmt: skip
        store_rows(dk + k_offset, rows, k_count, acc * scale, K_STRIDE, W, BLOCK_W)
        store_rows(dv + k_offset, rows, k_count, acc_v, K_STRIDE, W, BLOCK_W)
    else:
        rows = (block - key_blocks) * OUTER + tl.arange(0, OUTER)
        queries = load_rows(q_start, rows, q_count, Q_STRIDE, W, BLOCK_W, True)
        gradient = load_rows(dout_start, rows, q_count, D, W, BLOCK_W, True)
        lse_rows = tl.load(lse_start + rows, mask=rows < q_count, other=0.0)
        delta_rows = tl.load(delta_start + rows, mask=rows < q_count, other=0.0)
        whole = k_count if K_TAIL == 0 else k_count // INNER * INNER
        for first in range(0, whole, INNER):
            acc = _backward_queries_step(
                queries, gradient, lse_rows, delta_rows, acc, k_start, v_start, first, k_count, c,
                K_STRIDE, W, BLOCK_W, INNER, K_TAIL == 0, ON_FMA,
            )  # fmt: skip
        if K_TAIL > 0:  # noqa: SIM102
            if whole < k_count:
                acc = _backward_queries_step(
                    queries, gradient, lse_rows, delta_rows, acc, k_start, v_start, whole, k_count, c,
                    K_STRIDE, W, BLOCK_W, K_TAIL, True, ON_FMA,
                )  # fmt: skip
        store_rows(dq + q_offset, rows, q_count, acc * scale, Q_STRIDE, W, BLOCK_W)


def attention_backward_triton(
    dout, q, kv, out, lse, batch, q_lengths, lengths, heads, owed, owed_dtype, architecture
):  # fmt: skip
    qs, ks, vs = columns(q, kv)
    rows, width = q.shape[0], qs.shape[1] // heads
    block_w = max(16, triton.next_power_of_2(width))
    options, peel = launch_of("attention_backward", architecture, q.dtype, (*q_lengths, *lengths), width)
    owing = owed, owed_dtype
    if options.pop("ONE_PASS", False):
        arguments = (dout, q, kv, out, lse, batch, q_lengths, lengths, heads)
        if not owed or not options.pop("SUMS", False):
            dq, dkv = attention_one_pass_triton(*arguments, options, peel)
            return dq, dkv, column_sums(dq, None if kv is None else dkv, batch, q_lengths, lengths, *owing)
        sums = torch.empty(len(lengths) * batch, 3 * qs.shape[1], dtype=torch.float32, device=q.device)
        dq, dkv = attention_one_pass_triton(*arguments, options, peel, sums)
        of_streams = sum_of_streams(sums, three([batch] * len(lengths)), len(lengths), architecture)
        return dq, dkv, (of_streams if owed == len(lengths) else of_streams.sum(0, keepdim=True)).to(owed_dtype)
    delta_options = launch("attention_delta", architecture, q.dtype)
    delta = torch.empty_like(lse)
    attention_delta_kernel[(triton.cdiv(rows, delta_options["BLOCK_R"]), heads)](
        out, dout, delta, rows, HEADS=heads, W=width, BLOCK_W=block_w, **delta_options
    )
    dq = torch.empty_like(q)
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    blocks = sum(triton.cdiv(length, options["OUTER"]) for length in (*q_lengths, *lengths))
    attention_backward_kernel[(blocks * batch * heads,)](
        qs, ks, vs, *columns(dq, None if kv is None else dkv), dout, lse, delta,
        batch, *three(q_lengths), *three(lengths), rows, math.log2(math.e) * width**-0.5, width**-0.5,
        HEADS=heads, W=width, BLOCK_W=block_w, Q_STRIDE=q.stride(0), K_STRIDE=ks.stride(0),
        Q_TAIL=tail_block(q_lengths, options["INNER"], peel), K_TAIL=tail_block(lengths, options["INNER"], peel), **options,
    )  # fmt: skip
    return dq, dkv, column_sums(dq, None if kv is None else dkv, batch, q_lengths, lengths, *owing)
