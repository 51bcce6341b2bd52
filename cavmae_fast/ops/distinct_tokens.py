"""The tokens that a decoder begins with, those that are the same in all samples only once.

Before attention, a masked token is the mask token at its position, whatever the sample. So B * K kept tokens and one for
each of L positions stand for all B * L:

    out = x[b, k] + pos[ids[b, k]], then mask_token + pos[l]                     [B * K + L, D] in pos' dtype

What is computed of every token by itself is computed of these; `scatter_tokens.py` then makes every sample's tokens of the
results. Backward, with places[b, l] = the k for which ids[b, k] = l, or -1:

    dx[b, k] = dout[b, k],   dmask_token = sum over l of dout[B * K + l],
    dpos[l] = dout[B * K + l] + sum over b of dout[b, places[b, l]]

The kernels are those by which kept patches get their positions, and sum in the same fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cavmae_fast.ops._triton import triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.embed_kept_patches import add_position_kernel, embed_kept_patches_backward_kernel
from cavmae_fast.ops.gather_tokens import check_ids, check_rows, put_tokens, slots


class Kept(NamedTuple):
    """Which of its L tokens each sample kept."""

    ids: Tensor
    "`[B, K]` int64: at which place each kept token stands."
    places: Tensor
    "`[B, L]` int64: which kept token stands at each place; -1 where none does."


def kept_at(ids: Tensor, length: int) -> Kept:
    """ids `[B, K]` int64 in 0..length-1, unique in each sample (neither is checked: that would wait for the device)."""
    check_ids("ids", ids)
    return Kept(ids.contiguous(), slots(ids, length))


# ------------------------------------------------------------------------------------------------------- launchers


def _forward_triton(x, ids, mask_token, pos, architecture):
    (rows, width), kept = x.shape, ids.shape[1]
    out = pos.new_empty(rows + pos.shape[0], width)
    options = launch("add_position", architecture, pos.dtype)
    add_position_kernel[(triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_D"]))](
        x, ids, None, None, pos, out, rows, kept, D=width, HAS_IDS=True, **options
    )
    torch.add(pos, mask_token.to(pos.dtype), out=out[rows:])
    return out


def _backward_triton(dout, ids, places, dtype, need_pos, architecture):
    (batch, kept), length, width = ids.shape, places.shape[1], dout.shape[1]
    rest = dout[batch * kept :]
    dmask = rest.sum(0, dtype=torch.float32)
    if not need_pos:
        return dout[: batch * kept].to(dtype, copy=True), dmask, dmask.new_empty(0)
    dx = dout.new_empty(batch * kept, width, dtype=dtype)
    dpos = dout.new_empty(length, width, dtype=torch.float32)
    options = launch("embed_kept_patches_backward", architecture, dout.dtype)
    embed_kept_patches_backward_kernel[(length, triton.cdiv(width, options["BLOCK_D"]))](
        dout, dx, places, dpos, batch, kept, length, D=width, HAS_IDS=True, CAST=True, **options
    )
    return dx, dmask, dpos.add_(rest)


def _forward_torch(x, ids, mask_token, pos):
    rows = len(x)
    out = pos.new_empty(rows + pos.shape[0], pos.shape[1])
    torch.index_select(pos, 0, ids.flatten(), out=out[:rows]).add_(x)
    out[rows:] = pos + mask_token
    return out


def _backward_torch(dout, ids, places, dtype, need_pos):
    kept, rest = dout.split([ids.numel(), places.shape[1]])
    statistics = torch.promote_types(dout.dtype, torch.float32)
    dmask = rest.sum(0, dtype=statistics)
    if not need_pos:
        return kept.to(dtype, copy=True), dmask, dmask.new_empty(0)
    every = put_tokens(kept.to(statistics), ids, places.shape[1])
    return kept.to(dtype, copy=True), dmask, every.view(*places.shape, -1).sum(0).add_(rest)


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(x, ids, mask_token, pos):
    return pos.new_empty(x.shape[0] + pos.shape[0], pos.shape[1])


def _backward_fake(dout, ids, places, dtype, need_pos):
    width, statistics = dout.shape[1], torch.promote_types(dout.dtype, torch.float32)
    dpos = dout.new_empty((places.shape[1], width) if need_pos else (0,), dtype=statistics)
    dx = dout.new_empty(ids.shape[0] * ids.shape[1], width, dtype=dtype)
    return dx, dout.new_empty(width, dtype=statistics), dpos


_forward = register(
    "distinct_tokens",
    "(Tensor x, Tensor ids, Tensor mask_token, Tensor pos) -> Tensor",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "distinct_tokens_backward",
    "(Tensor dout, Tensor ids, Tensor places, ScalarType dtype, bool need_pos)"
    " -> (Tensor dx, Tensor dmask_token, Tensor dpos)",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=_backward_fake,
)


class _DistinctTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, places, mask_token, pos):
        ctx.save_for_backward(ids, places)
        ctx.dtypes = x.dtype, mask_token.dtype, pos.dtype
        return _forward(x, ids, mask_token, pos)

    @staticmethod
    def backward(ctx, dout):
        *_, need_mask, need_pos = ctx.needs_input_grad
        x_dtype, mask_dtype, pos_dtype = ctx.dtypes
        dx, dmask, dpos = _backward(dout.contiguous(), *ctx.saved_tensors, x_dtype, need_pos)
        return dx, None, None, dmask.to(mask_dtype) if need_mask else None, dpos.to(pos_dtype) if need_pos else None


def distinct_tokens(x: Tensor, kept: Kept, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Kept tokens at their positions, sample after sample, and behind them the mask token at every position.

    x `[B * K, D]`, mask_token `[D]`, pos `[L, D]` -> `[B * K + L, D]` in pos' dtype. Raises ValueError or TypeError when a
    shape or dtype does not fit.
    """
    (ids, places), width = kept, x.shape[-1]
    check_rows("x", x, ids.shape[0])
    if len(x) != ids.numel():
        raise ValueError(f"x has {len(x)} rows; kept has {ids.numel()} tokens")
    for name, value, shape in (("mask_token", mask_token, (width,)), ("pos", pos, (places.shape[1], width))):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; x and places need {list(shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}; it must be floating-point")
    return _DistinctTokens.apply(x.contiguous(), ids, places, mask_token.contiguous(), pos.contiguous())
