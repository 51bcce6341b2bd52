"""Multi-head attention on the CPU, forward and backward, from PyTorch's own operators.

The forward is PyTorch's flash kernel: it reads strided views of a packed qkv as they are, and lays its output out as
`[B, L, H, W]`, so that `[B * L, H * W]` is a free view of it. In float32 its backward is as fast as anything below, but
in 16 bits it took 2 to 5.5 times as long as the explicit chain of batched GEMMs (AMX in bfloat16) over groups of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast import compat

GROUP_BYTES = 8 << 20
"""Bytes of one score matrix of a group; two are live. Ungrouped, each operator of the chain allocates a fresh
`[B, H, Lq, Lk]` result: forward and backward at 4 x 16 x 708 x 708 took 160 ms, most of it page faults; grouped 56.
Measured flat from 4 to 16 MiB, slower below."""


def attention_forward_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q `[B, Lq, H, W]`, k and v `[B, Lk, H, W]`, any strides -> out `[B, Lq, H, W]`, lse `[B, H, Lq]` (natural)."""
    out, lse = compat.flash_attention_cpu(*(x.transpose(1, 2) for x in (q, k, v)), scale)
    out = out.transpose(1, 2)
    # PyTorch's kernel gives 0 for a row of scores that are all NaN, which would hide a model that has diverged.
    statistics = torch.promote_types(q.dtype, torch.float32) if q.dtype == torch.float16 else q.dtype
    if not torch.isfinite(q.sum(dtype=statistics) + k.sum(dtype=statistics)):
        rows = q.isnan().any(dim=-1) | k.isnan().any(dim=-1).any(dim=1, keepdim=True)  # [B, Lq, H]
        out.masked_fill_(rows.unsqueeze(-1), float("nan"))
    return out, lse


def attention_backward_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients into dq, dk and dv, views of q's, k's and v's shapes and of any strides.

    dout and out `[B, Lq, H, W]`; out and lse are read in float32 and float64 only.
    """
    samples, queries, heads, _ = q.shape
    if q.element_size() > 2:
        grads = compat.flash_attention_cpu_backward(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, scale)
        for to, grad in zip((dq, dk, dv), grads):
            to.copy_(grad.transpose(1, 2))
        return
    # A group is some heads of one sample, or all heads of several samples.
    budget = max(1, GROUP_BYTES // (q.element_size() * queries * k.shape[1]))
    per_group = max(1, min(samples, budget // heads))
    size = per_group * heads if per_group > 1 else min(heads, budget)
    scores = q.new_empty((2, size, queries, k.shape[1]))  # one allocation for all groups
    for first in range(0, samples, per_group):
        part = slice(first, first + per_group)
        # bmm copies an operand whose matrices are not densely packed: once here, not at each use.
        operands = [x[part].transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v, dout)]
        total = operands[0].shape[0]
        for start in range(0, total, size):
            cut = slice(start, start + size)
            grads = _group_backward(*(x[cut] for x in operands), *scores[:, : min(size, total - start)], scale)
            for to, grad in zip((dq, dk, dv), grads):
                if total == heads:
                    to[first, :, cut].copy_(grad.transpose(0, 1))
                else:
                    to[part].copy_(grad.unflatten(0, (-1, heads)).transpose(1, 2))


def _group_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, p: Tensor, ds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Operands `[n, L, W]`, scratch p and ds `[n, Lq, Lk]` -> dq, dk, dv.

    The softmax is computed again from the scores. That takes one pass more over them than exp(scores - lse) would; but
    neither lse nor dout * out is then needed, and every row of p sums to 1 although the scores are rounded.
    """
    torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p)  # beta 0: what p held is not read
    torch.softmax(p, -1, out=p)
    torch.baddbmm(ds, dout, v.mT, beta=0, alpha=scale, out=ds)  # multiplies by the scale of dq and dk at no cost
    compat.softmax_backward_(ds, p)
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, dout)
