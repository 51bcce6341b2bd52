"""Multi-head attention on the CPU, forward and backward, from PyTorch's own operators.

There are two forms of either pass. PyTorch's flash kernel reads strided views of a packed qkv as they are, and lays its
output out as `[B, L, H, W]`, so that `[B * L, H * W]` is a free view of it. The explicit chain of batched products works
on groups of heads, whose scores stay in the cache. In 16 bits the kernel's own backward took 2 to 5.5 times as long (the
products run on matrix units), and its forward 1.4 to 2 times as long as the products where bfloat16 has vector
instructions alone. In float32 the two are close. Which is faster depends on the CPU: the tuner finds out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast import compat

GROUP_BYTES = 8 << 20
"""Bytes of one score matrix of a group; two are live. Ungrouped, each operator of the chain allocates a fresh
`[B, H, Lq, Lk]` result: forward and backward at 4 x 16 x 708 x 708 took 160 ms, most of it page faults; grouped 56.
Measured flat from 4 to 16 MiB, slower below, on a CPU with AMX; on one with AVX-512, 2 MiB took a tenth less time."""

KEPT_GROUP_BYTES = 2 << 20
"As `GROUP_BYTES`, where the probabilities are kept."


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


def _groups(q: Tensor, keys: int, group_bytes: int) -> tuple[int, int]:
    """(samples whose heads are taken together, heads of a group): a group is some heads of one sample, or all heads of
    several samples."""
    samples, queries, heads, _ = q.shape
    budget = max(1, group_bytes // (q.element_size() * queries * keys))
    per_group = max(1, min(samples, budget // heads))
    return per_group, per_group * heads if per_group > 1 else min(heads, budget)


def _put(to: Tensor, part: slice, cut: slice, total: int, values: Tensor) -> None:
    """Writes `values [n, L, W]`, the heads `cut` of the samples `part` (`total` heads in all), to their places in `to`."""
    heads = to.shape[2]
    if total == heads:
        to[part.start, :, cut].copy_(values.transpose(0, 1))
    else:
        to[part].copy_(values.unflatten(0, (-1, heads)).transpose(1, 2))


def attention_forward_products(q: Tensor, k: Tensor, v: Tensor, scale: float, group_bytes: int = GROUP_BYTES) -> Tensor:
    """As `attention_forward_cpu`, from batched products, and without lse: -> out `[B, Lq, H, W]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    per_group, size = _groups(q, k.shape[1], group_bytes)
    scores = q.new_empty((size, q.shape[1], k.shape[1]))  # one allocation for all groups
    for first in range(0, q.shape[0], per_group):
        part = slice(first, first + per_group)
        # bmm copies an operand whose matrices are not densely packed: once here, not at each use.
        operands = [x[part].transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v)]
        total = operands[0].shape[0]
        for start in range(0, total, size):
            cut = slice(start, start + size)
            q_cut, k_cut, v_cut = (x[cut] for x in operands)
            p = scores[: q_cut.shape[0]]
            torch.baddbmm(p, q_cut, k_cut.mT, beta=0, alpha=scale, out=p)  # beta 0: what p held is not read
            torch.softmax(p, -1, out=p)
            _put(out, part, cut, total, torch.bmm(p, v_cut))
    return out


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
    products: bool | None = None,
    group_bytes: int = GROUP_BYTES,
) -> None:
    """Writes the gradients into dq, dk and dv, views of q's, k's and v's shapes and of any strides.

    dout and out `[B, Lq, H, W]`. `products`: the explicit chain, which reads neither out nor lse, or PyTorch's kernel;
    None: the chain in 16 bits.
    """
    samples, queries, _, _ = q.shape
    if products is None:
        products = q.element_size() == 2
    if not products:
        grads = compat.flash_attention_cpu_backward(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, scale)
        for to, grad in zip((dq, dk, dv), grads):
            to.copy_(grad.transpose(1, 2))
        return
    per_group, size = _groups(q, k.shape[1], group_bytes)
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
                _put(to, part, cut, total, grad)


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


class KeptProbabilities(torch.autograd.Function):
    """Attention by batched products that keeps the probabilities for backward, as PyTorch's autograd would.

    It takes the memory of all of them, B H Lq Lk numbers, and spares backward a product and a softmax. Measured on one core
    with AVX-512 and bfloat16 instructions, at 4 x 16 x 708 x 708: 126 ms of CPU time for both passes, where the flash kernel
    forward and regrouped products backward take 195.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q `[B, Lq, H, W]`, k and v `[B, Lk, H, W]`, any strides -> out `[B, Lq, H, W]`."""
        samples, queries, heads, width = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
        p = q.new_empty((samples * heads, queries, k.shape[1]))
        out = q.new_empty((samples * heads, queries, width))
        for cut in _cuts(p):
            torch.baddbmm(p[cut], q[cut], k[cut].mT, beta=0, alpha=scale, out=p[cut])
            torch.softmax(p[cut], -1, out=p[cut])
            torch.bmm(p[cut], v[cut], out=out[cut])
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.heads = scale, heads
        return out.unflatten(0, (-1, heads)).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        dout = dout.transpose(1, 2).flatten(0, 1).contiguous()
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        cuts = _cuts(p)
        scratch = p.new_empty(p[cuts[0]].shape)
        for cut in cuts:
            ds = scratch[: p[cut].shape[0]]
            torch.baddbmm(ds, dout[cut], v[cut].mT, beta=0, alpha=ctx.scale, out=ds)
            compat.softmax_backward_(ds, p[cut])
            torch.bmm(ds, k[cut], out=dq[cut])
            torch.bmm(ds.mT, q[cut], out=dk[cut])
            torch.bmm(p[cut].mT, dout[cut], out=dv[cut])
        return *(x.unflatten(0, (-1, ctx.heads)).transpose(1, 2) for x in (dq, dk, dv)), None


def _cuts(p: Tensor) -> list[slice]:
    """Groups of the matrices in `p [n, Lq, Lk]` that fit into the cache together."""
    size = max(1, KEPT_GROUP_BYTES // (p[0].numel() * p.element_size()))
    return [slice(start, start + size) for start in range(0, p.shape[0], size)]
