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
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.gather_tokens import check_ids, check_rows

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def scatter_tokens_forward_kernel(
    x,  # [B * K, D]
    places,  # [B * L]
    mask_token,  # [D]
    pos,  # [L, D]
    out,  # [B * L, D]
    rows, kept, length,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = (row < rows)[:, None] & (column < D)[None, :]
    sample = row // length
    place = tl.load(places + row, mask=row < rows, other=-1)
    standing = (place >= 0)[:, None]
    source = (sample.to(tl.int64) * kept + place)[:, None] * D + column[None, :]
    token = tl.load(x + source, mask=valid & standing, other=0.0).to(tl.float32)
    masked = tl.load(mask_token + column, mask=column < D, other=0.0).to(tl.float32)
    position = tl.load(pos + (row - sample * length)[:, None] * D + column[None, :], mask=valid, other=0.0)
    value = tl.where(standing, token, masked[None, :]) + position.to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value.to(out.dtype.element_ty), mask=valid)


@triton.jit
def scatter_tokens_backward_kernel(
    dout,  # [B * L, D]
    places,  # [B * L]
    dx,  # [B * K, D]
    dpos, dmask_partial,  # [L, D] fp32
    batch, kept, length,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of one place and BLOCK_D columns; the rows of BLOCK_B samples are in flight at once."""
    here = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    masked = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for start in range(0, batch, BLOCK_B):
        sample = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        row = sample * length + here
        place = tl.load(places + row, mask=sample < batch, other=-1)
        standing = (place >= 0)[:, None]
        valid = (sample < batch)[:, None] & inside
        g = tl.load(dout + row[:, None] * D + column[None, :], mask=valid, other=0.0)
        target = (sample * kept + place)[:, None] * D + column[None, :]
        tl.store(dx + target, g.to(dx.dtype.element_ty), mask=standing & inside)
        if SUMS:
            total += g.to(tl.float32)
            masked += tl.where(standing, 0.0, g.to(tl.float32))
    if SUMS:
        tl.store(dpos + here * D + column, tl.sum(total, axis=0), mask=column < D)
        tl.store(dmask_partial + here * D + column, tl.sum(masked, axis=0), mask=column < D)


# ------------------------------------------------------------------------------------------------------- launchers


def kept_rows(places: Tensor, kept: int) -> Tensor:
    """places `[B, L]` -> `[B * K]`: the row of `[B * L]` at which each kept token stands."""
    batch, length = places.shape
    rows = torch.arange(batch * length, device=places.device).view(batch, length)
    # Masked places all go to an extra column, which is cut off.
    target = torch.where(places < 0, kept, places)
    return places.new_empty(batch, kept + 1).scatter_(1, target, rows)[:, :kept].flatten()


def _forward_triton(x, places, mask_token, pos, architecture):
    (batch, length), width = places.shape, x.shape[1]
    rows = batch * length
    out = pos.new_empty(rows, width)
    options = launch("scatter_tokens_forward", architecture, pos.dtype)
    grid = (triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_D"]))
    kept = x.shape[0] // batch
    scatter_tokens_forward_kernel[grid](x, places, mask_token, pos, out, rows, kept, length, D=width, **options)
    return out


def _backward_triton(dout, places, kept, dtype, sums, architecture):
    (batch, length), width = places.shape, dout.shape[1]
    dx = dout.new_empty(batch * kept, width, dtype=dtype)
    dpos, dmask = (dout.new_empty((length, width) if sums else (0,), dtype=torch.float32) for _ in range(2))
    options = launch("scatter_tokens_backward", architecture, dout.dtype)
    scatter_tokens_backward_kernel[(length, triton.cdiv(width, options["BLOCK_D"]))](
        dout, places, dx, dpos, dmask, batch, kept, length, D=width, SUMS=sums, **options
    )
    return dx, dmask.sum(0) if sums else dmask, dpos


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
    "scatter_tokens",
    "(Tensor x, Tensor places, Tensor mask_token, Tensor pos) -> Tensor",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "scatter_tokens_backward",
    "(Tensor dout, Tensor places, SymInt kept, ScalarType dtype, bool sums) -> (Tensor dx, Tensor dmask_token, Tensor dpos)",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=_backward_fake,
)


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
        (places,) = ctx.saved_tensors
        dx, dmask, dpos = _backward(dout.contiguous(), places, ctx.kept, x_dtype, need_mask or need_pos)
        return dx, None, dmask.to(mask_dtype) if need_mask else None, dpos.to(pos_dtype) if need_pos else None


def scatter_tokens(x: Tensor, places: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Kept tokens at their places, the mask token elsewhere, + position.

    x `[B * K, D]`, places `[B, L]` int64, mask_token `[D]`, pos `[L, D]` -> `[B * L, D]` in pos' dtype. `places[b, l]`
    is the index, 0..K-1, of the token of sample b that stands at place l, negative where none does; each kept token
    must stand at exactly one place (not checked: that would wait for the device). Raises ValueError or TypeError when a
    shape or dtype does not fit.
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
