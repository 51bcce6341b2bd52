"""Multi-head attention for the CPU, forward and backward, from plain aten operators.

The forward is PyTorch's flash kernel: it reads strided views of a packed qkv as they are, and lays
its output out as [B, L, H, W], so [B * L, H * W] is a free view of it. In float32 its backward is
as fast as anything below, but in 16 bits it is 2 to 6 times slower than GEMMs on matrix units
(AMX, through oneDNN's bmm), so there the backward is explicit, over groups of heads.
"""

import torch

# Bytes of one score matrix of a group; two are live. Without groups the [B, H, Lq, Lk] temporaries
# exceed malloc's largest mmap threshold (32 MiB), are mapped afresh by every operator, and the page
# faults alone cost several times the arithmetic. Flat from 4 to 16 MiB; below, overheads and
# badly divided GEMMs show.
GROUP_BYTES = 8 << 20


def attention_forward_cpu(q, k, v, scale):
    """q [B, Lq, H, W], k and v [B, Lk, H, W], any strides -> out [B, Lq, H * W], lse [B, H, Lq]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
    )
    return out.transpose(1, 2).reshape(*q.shape[:2], -1), lse


def attention_backward_cpu(dout, q, k, v, out, lse, scale, dq, dk, dv):
    """Writes the gradients into dq, dk, dv (views of q's, k's and v's shapes, any strides).

    dout and out hold [B, Lq, H * W]. out and lse are read only in float32 and float64.
    """
    samples, queries, heads, _ = q.shape
    dout = dout.view(q.shape)
    if q.element_size() > 2:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (dout, q, k, v, out.view(q.shape))), lse, 0.0, False, scale=scale
        )
        for to, grad in zip((dq, dk, dv), grads):
            to.copy_(grad.transpose(1, 2))
        return
    # A group is some heads of one sample, or all the heads of several samples.
    budget = max(1, GROUP_BYTES // (q.element_size() * queries * k.shape[1]))
    per_group = max(1, min(samples, budget // heads))
    size = per_group * heads if per_group > 1 else min(heads, budget)
    scores = q.new_empty((2, size, queries, k.shape[1]))  # one allocation, used by every group
    for first in range(0, samples, per_group):
        part = slice(first, first + per_group)
        # bmm copies any operand whose matrices are not densely packed: do it once, not per use.
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


def _group_backward(q, k, v, dout, p, ds, scale):
    """[n, L, W] operands, [n, Lq, Lk] scratch p and ds -> dq, dk, dv.

    Recomputing the softmax costs one pass more than exp(S - lse), and it makes up for it: it needs
    neither lse nor dout * out, and it normalises the rounded scores, so each row of p sums to one.
    """
    torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p)  # beta=0: p's old content is not read
    torch._softmax(p, -1, False, out=p)
    torch.baddbmm(ds, dout, v.mT, beta=0, alpha=scale, out=ds)  # dq and dk get their scale here
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, ds.dtype, grad_input=ds)  # rowwise: in place is safe
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, dout)
