"""Kept tokens back to their places, a mask token at all others, + position.

    out[b, l] = pos[l] + (x[b, places[b, l]] if places[b, l] >= 0 else mask_token)       [B * L, D] in pos' dtype

with x [B * K, D], places [B, L], pos [L, D]; each of a sample's K tokens stands at exactly one place. Backward:

    dx[b, places[b, l]] = dout[b, l],   dpos[l] = sum over b of dout[b, l],
    dmask_token = sum of dout[b, l] over all (b, l) with a negative place

A program of the backward kernel owns a place and a tile of columns and goes through the batch: dout is read once, dx
written once, and the sums over the batch are in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather_tokens import check_ids, check_rows
from .registry import register

FORWARD_ROWS = 8
BLOCK_D = 128
BACKWARD_SAMPLES = 16
"Samples whose rows one program of the backward kernel has in flight at once."


# -------------------------------------------------------------------------------------------------------- launchers


def kept_rows(places: Tensor, kept: int) -> Tensor:
    """places `[B, L]` -> `[B * K]`: the row of `[B * L]` at which each kept token stands."""
    batch, length = places.shape
    rows = torch.arange(batch * length, device=places.device).view(batch, length)
    # Masked places all go to an extra column, which is cut off.
    target = torch.where(places < 0, kept, places)
    return places.new_empty(batch, kept + 1).scatter_(1, target, rows)[:, :kept].flatten()


def _forward_torch(x, places, mask_token, pos):
    batch, length = places.shape
    rows = kept_rows(places, x.shape[0] // batch)
    out = torch.empty(batch * length, pos.shape[1], dtype=pos.dtype, device=pos.device)
    out.view(batch, length, -1).copy_((pos + mask_token).expand(batch, -1, -1))
    out[rows] = (pos.index_select(0, rows % length) + x).to(pos.dtype)
    return out


def _backward_torch(dout, places, kept, dtype, sums):
    batch, length = places.shape
    dx = dout.index_select(0, kept_rows(places, kept)).to(dtype)
    statistics = torch.promote_types(dout.dtype, torch.float32)
    if not sums:
        return dx, *(dout.new_empty(0, dtype=statistics) for _ in range(2))
    dout = dout.to(statistics)
    dpos = dout.view(batch, length, -1).sum(0)
    dmask = (places < 0).to(statistics).flatten() @ dout
    return dx, dmask, dpos


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(x, places, mask_token, pos):
    return pos.new_empty(places.shape[0] * places.shape[1], pos.shape[1])


def _backward_fake(dout, places, kept, dtype, sums):
    batch, length = places.shape
    width = dout.shape[1]
    statistics = torch.promote_types(dout.dtype, torch.float32)
    dx = dout.new_empty(batch * kept, width, dtype=dtype)
    shapes = ((width,), (length, width)) if sums else ((0,), (0,))
    return dx, *(dout.new_empty(shape, dtype=statistics) for shape in shapes)


_forward = register(
    "scatter_tokens", "(Tensor x, Tensor places, Tensor mask_token, Tensor pos) -> Tensor",
    reference=_forward_torch, fake=_forward_fake,
)  # fmt: skip
_backward = register(
    "scatter_tokens_backward",
    "(Tensor dout, Tensor places, SymInt kept, ScalarType dtype, bool sums)"
    " -> (Tensor dx, Tensor dmask_token, Tensor dpos)",
    reference=_backward_torch, fake=_backward_fake,
)  # fmt: skip


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, places, mask_token, pos):
        ctx.save_for_backward(places)
        ctx.kept, ctx.dtypes = x.shape[0] // places.shape[0], (x.dtype, mask_token.dtype, pos.dtype)
        return _forward(x, places, mask_token, pos)

    @staticmethod
    def backward(ctx, dout):
        _, _, need_mask, need_pos = ctx.needs_input_grad
        x_dtype, mask_dtype, pos_dtype = ctx.dtypes
        dx, dmask, dpos = _backward(
            dout.contiguous(), ctx.saved_tensors[0], ctx.kept, x_dtype, need_mask or need_pos
        )  # fmt: skip
        return dx, None, dmask.to(mask_dtype) if need_mask else None, dpos.to(pos_dtype) if need_pos else None


def scatter_tokens(x: Tensor, places: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Kept tokens at their places, the mask token elsewhere, + position.

    x `[B * K, D]`, places `[B, L]` int64, mask_token `[D]`, pos `[L, D]` -> `[B * L, D]` in pos' dtype. `places[b, l]` is
    the index, 0..K-1, of the token of sample b that stands at place l, negative where none does; each kept token must
    stand at exactly one place (not checked: that would wait for the device). Raises ValueError or TypeError when a shape
    or dtype does not fit.
    """
    check_ids("places", places)
    check_rows("x", x, places.shape[0])
    length, width = places.shape[1], x.shape[1]
    if x.shape[0] > places.numel():
        raise ValueError(f"x has {x.shape[0]} rows; places {list(places.shape)} have room for {places.numel()}")
    for name, value, shape in (("mask_token", mask_token, (width,)), ("pos", pos, (length, width))):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; x and places need {list(shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}; it must be floating-point")
    return _ScatterTokens.apply(x.contiguous(), places.contiguous(), mask_token.contiguous(), pos.contiguous())
