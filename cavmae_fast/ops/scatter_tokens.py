"""Every sample's tokens from those that differ: the kept ones of each sample, and those that all samples share.

    out[b, l] = x[b, places[b, l]] if places[b, l] >= 0 else x[B * K + l]                [B * L, D]

with x [B * K + L, D] as `distinct_tokens.py` makes it, or what was computed of it, and places [B, L]; each of a sample's K
tokens stands at exactly one place. Several streams lie one after the other, in x and in out. Backward:

    dx[b, places[b, l]] = dout[b, l],   dx[B * K + l] = sum of dout[b, l] over all b with a negative place

A program of the backward kernel owns a place and a tile of columns and goes through the batch: dout is read once, dx
written once, and the sums over the batch are in float32 and in a fixed order, without atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.distinct_tokens import Kept, distinct_tokens
from cavmae_fast.ops.gather_tokens import check_ids, check_rows, flat_rows
from cavmae_fast.ops.residual import Residual, new_carrier

GROUP = 4
"Samples whose gradients PyTorch's operators sum at a time: what that takes of memory stays small."


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def scatter_tokens_forward_kernel(
    x,  # [B * K + L, D]
    places,  # [B * L]
    out,  # [B * L, D]
    rows, kept, length, shared,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`shared`: the first row of x that all samples share."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = (row < rows)[:, None] & (column < D)[None, :]
    sample = row // length
    place = tl.load(places + row, mask=row < rows, other=-1)
    source = tl.where(place >= 0, sample.to(tl.int64) * kept + place, shared + row - sample * length)
    value = tl.load(x + source[:, None] * D + column[None, :], mask=valid, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=valid)


@triton.jit
def scatter_tokens_backward_kernel(
    dout,  # [B * L, D]
    places,  # [B * L]
    dx,  # [B * K + L, D]
    batch, kept, length, shared,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of one place and BLOCK_D columns; the rows of BLOCK_B samples are in flight at once."""
    here = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for start in range(0, batch, BLOCK_B):
        sample = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        row = sample * length + here
        place = tl.load(places + row, mask=sample < batch, other=-1)
        standing = (place >= 0)[:, None]
        g = tl.load(dout + row[:, None] * D + column[None, :], mask=(sample < batch)[:, None] & inside, other=0.0)
        target = (sample * kept + place)[:, None] * D + column[None, :]
        tl.store(dx + target, g, mask=standing & inside)
        total += tl.where(standing, 0.0, g.to(tl.float32))
    own = dx + (shared + here).to(tl.int64) * D + column
    tl.store(own, tl.sum(total, axis=0).to(dx.dtype.element_ty), mask=column < D)


# ------------------------------------------------------------------------------------------------------- launchers


def _rows(ids: Sequence[Tensor], places: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The rows of each stream: of the tokens that differ, and of all."""
    all_rows = [index.shape[0] * index.shape[1] for index in places]
    return [i.shape[0] * i.shape[1] + p.shape[1] for i, p in zip(ids, places)], all_rows


def _streams(distinct: Tensor, every: Tensor, ids: Sequence[Tensor], places: Sequence[Tensor]) -> Iterator[tuple]:
    """Of each stream the tokens that differ, all tokens, ids and places."""
    few, many = _rows(ids, places)
    return zip(distinct.split(few), every.split(many), ids, places)


def _forward_triton(x, ids, places, architecture):
    width = x.shape[1]
    out = x.new_empty(sum(_rows(ids, places)[1]), width)
    options = launch("scatter_tokens_forward", architecture, x.dtype)
    for x_s, out_s, ids_s, places_s in _streams(x, out, ids, places):
        rows, (batch, kept) = len(out_s), ids_s.shape
        grid = (triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_D"]))
        arguments = (rows, kept, places_s.shape[1], batch * kept)
        scatter_tokens_forward_kernel[grid](x_s, places_s, out_s, *arguments, D=width, **options)
    return out


def _backward_triton(dout, ids, places, architecture):
    width = dout.shape[1]
    dx = dout.new_empty(sum(_rows(ids, places)[0]), width)
    options = launch("scatter_tokens_backward", architecture, dout.dtype)
    for dx_s, dout_s, ids_s, places_s in _streams(dx, dout, ids, places):
        (batch, kept), length = ids_s.shape, places_s.shape[1]
        grid = (length, triton.cdiv(width, options["BLOCK_D"]))
        arguments = (batch, kept, length, batch * kept)
        scatter_tokens_backward_kernel[grid](dout_s, places_s, dx_s, *arguments, D=width, **options)
    return dx


def _forward_torch(x, ids, places):
    out = x.new_empty(sum(_rows(ids, places)[1]), x.shape[1])
    for x_s, out_s, ids_s, places_s in _streams(x, out, ids, places):
        batch, length = places_s.shape
        out_s.view(batch, length, -1).copy_(x_s[-length:].expand(batch, -1, -1))
        out_s[flat_rows(ids_s, length)] = x_s[:-length]
    return out


def _backward_torch(dout, ids, places):
    dx = dout.new_empty(sum(_rows(ids, places)[0]), dout.shape[1])
    for dx_s, dout_s, ids_s, places_s in _streams(dx, dout, ids, places):
        length = places_s.shape[1]
        torch.index_select(dout_s, 0, flat_rows(ids_s, length), out=dx_s[:-length])
        total = torch.zeros(length, dout.shape[1], dtype=torch.promote_types(dout.dtype, torch.float32), device=dout.device)
        for samples, ids_here in zip(dout_s.split(GROUP * length), ids_s.split(GROUP)):
            # Rows filled by number: on a CPU a mask over bfloat16 takes ten times as long as all the rest.
            masked = samples.to(total.dtype, copy=True).index_fill_(0, flat_rows(ids_here, length), 0)
            total += masked.unflatten(0, (-1, length)).sum(0)
        dx_s[-length:] = total
    return dx


# -------------------------------------------------------------------------------------------------- torch operators


_forward = register(
    "scatter_tokens",
    "(Tensor x, Tensor[] ids, Tensor[] places) -> Tensor",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=lambda x, ids, places: x.new_empty(sum(_rows(ids, places)[1]), x.shape[1]),
)
_backward = register(
    "scatter_tokens_backward",
    "(Tensor dout, Tensor[] ids, Tensor[] places) -> Tensor",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=lambda dout, ids, places: dout.new_empty(sum(_rows(ids, places)[0]), dout.shape[1]),
)


class _ScatterDistinct(torch.autograd.Function):
    """Where x has a carrier, gradients go by way of it, and x itself has none."""

    @staticmethod
    def forward(ctx, x, carrier, *indices):
        ctx.save_for_backward(*indices)
        ctx.set_materialize_grads(False)
        out = _forward(x, *_ids_and_places(indices))
        if carrier is None:
            return out
        ctx.mark_non_differentiable(out)
        return out, new_carrier(out, carrier.dtype)

    @staticmethod
    def backward(ctx, dout, dcarrier=None):
        tensors = ctx.saved_tensors  # once: where it is formed again for this call, a second call is an error
        indices = _ids_and_places(tensors)
        dxs = (None if g is None else _backward(g.contiguous(), *indices) for g in (dout, dcarrier))
        return *dxs, *[None] * len(tensors)


def _ids_and_places(indices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return list(indices[: len(indices) // 2]), list(indices[len(indices) // 2 :])


def scatter_distinct(x: Tensor | Residual, kept: Sequence[Kept]) -> Tensor | Residual:
    """Every sample's tokens from those that differ, which `distinct_tokens` made, or from what was computed of these.

    x: of every stream its B * K + L rows, `kept` says where they stand -> of every stream its B * L rows, of x's width and
    dtype. Backward, what belongs to masked tokens of one position is summed over the samples, in float32. A `Residual`
    gives one. Raises ValueError when a shape does not fit.
    """
    x, carrier = x if isinstance(x, Residual) else (x, None)
    ids, places = (list(indices) for indices in zip(*kept))
    few, _ = _rows(ids, places)
    if x.dim() != 2 or len(x) != sum(few):
        raise ValueError(f"x has shape {list(x.shape)}; the tokens that differ are [{sum(few)}, width]")
    out = _ScatterDistinct.apply(x.contiguous(), carrier, *ids, *places)
    return out if carrier is None else Residual(*out)


def kept_rows(places: Tensor, kept: int) -> Tensor:
    """places `[B, L]` -> `[B, K]`: the place at which each kept token stands."""
    # Masked places all go to an extra column, which is cut off.
    target = torch.where(places < 0, kept, places)
    length = torch.arange(places.shape[1], device=places.device).expand_as(places)
    return places.new_empty(len(places), kept + 1).scatter_(1, target, length)[:, :kept].contiguous()


def scatter_tokens(x: Tensor, places: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Kept tokens at their places, the mask token elsewhere, + position.

    x `[B * K, D]`, places `[B, L]` int64, mask_token `[D]`, pos `[L, D]` -> `[B * L, D]` in pos' dtype. `places[b, l]`
    is the index, 0..K-1, of the token of sample b that stands at place l, negative where none does; each kept token
    must stand at exactly one place (not checked: that would wait for the device). Raises ValueError or TypeError when a
    shape or dtype does not fit.
    """
    check_ids("places", places)
    check_rows("x", x, places.shape[0])
    if x.shape[0] > places.numel():
        raise ValueError(f"x has {x.shape[0]} rows; places {list(places.shape)} have room for {places.numel()}")
    kept = Kept(kept_rows(places, x.shape[0] // places.shape[0]), places.contiguous())
    return scatter_distinct(distinct_tokens(x, kept, mask_token, pos), [kept])
