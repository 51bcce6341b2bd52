"""Multi-head attention of packed streams from PyTorch's operators: what the Triton kernels do, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops.attention_cpu import (
    GROUP_BYTES,
    attention_backward_cpu,
    attention_forward_cpu,
    attention_forward_products,
)
from cavmae_fast.ops.stream_linear import bias_gradient

LOG2E = math.log2(math.e)


def stream_views(x: Tensor, parts: int, batch: int, lengths: Sequence[int], heads: int) -> list[tuple[Tensor, ...]]:
    """Packed `[rows, parts * D]` -> for each stream its `parts` views `[batch, length, heads, W]`."""
    streams = zip(x.split([batch * length for length in lengths]), lengths)
    return [s.view(batch, length, parts, heads, x.shape[1] // parts // heads).unbind(2) for s, length in streams]


def operands(q, kv, batch, q_lengths, lengths, heads) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each stream its q, k, v as views `[batch, length, heads, W]`."""
    if kv is None:
        return stream_views(q, 3, batch, lengths, heads)
    queries, others = stream_views(q, 1, batch, q_lengths, heads), stream_views(kv, 2, batch, lengths, heads)
    return [(*a, *b) for a, b in zip(queries, others)]


def _lse_views(lse: Tensor, batch: int, q_lengths: Sequence[int]) -> list[Tensor]:
    """lse `[heads, Rq]` -> for each stream a view `[batch, heads, length]`."""
    streams = zip(lse.split([batch * length for length in q_lengths], dim=1), q_lengths)
    return [s.unflatten(1, (batch, length)).transpose(0, 1) for s, length in streams]


def attention_forward_torch(q, kv, batch, q_lengths, lengths, heads, products=False, group_bytes=GROUP_BYTES):
    """`products`: on a CPU, by batched products, which form no lse: it is NaN, and only a backward that does not read it
    may follow (`attention_backward_torch` with `products`)."""
    lse = q.new_empty(heads, q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    outputs = []
    parts = zip(operands(q, kv, batch, q_lengths, lengths, heads), _lse_views(lse, batch, q_lengths))
    for (qs, ks, vs), lse_s in parts:
        scale = qs.shape[-1] ** -0.5
        if q.device.type == "cpu" and products:
            out_s, sums = attention_forward_products(qs, ks, vs, scale, group_bytes), lse_s.new_tensor(math.nan)
        elif q.device.type == "cpu":
            out_s, sums = attention_forward_cpu(qs, ks, vs, scale)
        else:
            qs, ks, vs = (t.transpose(1, 2).to(lse.dtype) for t in (qs, ks, vs))
            scores = qs @ ks.mT * scale
            sums = scores.logsumexp(-1)
            out_s = ((scores - sums.unsqueeze(-1)).exp() @ vs).transpose(1, 2)
        torch.mul(sums.expand_as(lse_s), LOG2E, out=lse_s)
        outputs.append(out_s.reshape(-1, out_s[0, 0].numel()).to(q.dtype))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0], lse


def attention_backward_torch(
    dout, q, kv, out, lse, batch, q_lengths, lengths, heads, owed, owed_dtype, products=None, group_bytes=GROUP_BYTES
):
    """`products`, `group_bytes`: which backward pass of the CPU (`attention_backward_cpu`)."""
    dq = torch.empty_like(q)
    dkv = q.new_empty(0) if kv is None else torch.empty_like(kv)
    parts = zip(
        operands(q, kv, batch, q_lengths, lengths, heads),
        operands(dq, None if kv is None else dkv, batch, q_lengths, lengths, heads),
        stream_views(dout, 1, batch, q_lengths, heads),
        stream_views(out, 1, batch, q_lengths, heads),
        _lse_views(lse, batch, q_lengths),
    )
    for (qs, ks, vs), grads, (dout_s,), (out_s,), lse_s in parts:
        scale, lse_s = qs.shape[-1] ** -0.5, lse_s / LOG2E
        if q.device.type == "cpu":
            attention_backward_cpu(dout_s, qs, ks, vs, out_s, lse_s, scale, *grads, products, group_bytes)
            continue
        qs, ks, vs, g, o = (t.transpose(1, 2).to(lse.dtype) for t in (qs, ks, vs, dout_s, out_s))
        p = (qs @ ks.mT * scale - lse_s.unsqueeze(-1)).exp()
        ds = p * (g @ vs.mT - (g * o).sum(-1, keepdim=True)) * scale
        for to, grad in zip(grads, (ds @ ks, ds.mT @ qs, p.mT @ g)):
            to.copy_(grad.transpose(1, 2))
    return dq, dkv, column_sums(dq, None if kv is None else dkv, batch, q_lengths, lengths, owed, owed_dtype)


def column_sums(dq, dkv, batch, q_lengths, lengths, owed, dtype) -> Tensor:
    """The columns of dq, dk and dv added up, `[owed, 3 D]`: over all rows, or over each stream's; empty for 0."""
    if not owed:
        return dq.new_empty(0)
    sums = []
    for gradient, of_streams in ((dq, q_lengths), (dkv, lengths)):
        if gradient is not None:
            rows = [batch * length for length in of_streams]
            sums.append(bias_gradient(gradient, rows if owed == len(rows) else [sum(rows)], dtype))
    return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]
