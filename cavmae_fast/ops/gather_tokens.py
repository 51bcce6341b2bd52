"""Takes tokens out of every sample of a packed buffer.

    out[b, m] = x[b, ids[b, m]]                       x [B * L, D], ids [B, M] -> out [B * M, D]

Backward, with slot[b, l] = the m for which ids[b, m] = l (a token is taken at most once), or -1:

    dx[b, l] = dout[b, slot[b, l]], 0 where the slot is -1

The backward kernel owns destination rows, so it writes every element of dx once: no zero fill before it, no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.origin import Origin

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def take_rows_kernel(
    source,  # [B * FROM, D]
    index,  # [B * TO] integers
    out,  # [B * TO, D]
    rows, length_from, length_to,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, t] = source[b, index[b, t]], or 0 where the index is negative."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    taken = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    first = (row // length_to).to(tl.int64) * length_from
    inside = (column < D)[None, :]
    offset = (first + taken)[:, None] * D + column[None, :]
    value = tl.load(source + offset, mask=(taken >= 0)[:, None] & inside, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=(row < rows)[:, None] & inside)


# ------------------------------------------------------------------------------------------------------- launchers


def slots(ids: Tensor, length: int) -> Tensor:
    """ids `[B, M]`, unique in each sample -> `[B, length]`: where in `ids[b]` each token stands, or -1."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return ids.new_full((ids.shape[0], length), -1).scatter_(1, ids, places)


def flat_rows(ids: Tensor, length: int) -> Tensor:
    """ids `[B, M]` into samples of `length` tokens -> `[B * M]` rows of the packed buffer."""
    first = torch.arange(0, ids.shape[0] * length, length, device=ids.device)
    return (ids + first.unsqueeze(1)).flatten()


def _take_rows(source, index, length_from, architecture):
    batch, length_to = index.shape
    rows, width = batch * length_to, source.shape[1]
    out = source.new_empty(rows, width)
    options = launch("take_rows", architecture, source.dtype)
    grid = (triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_D"]))
    take_rows_kernel[grid](source, index, out, rows, length_from, length_to, D=width, **options)
    return out


def _forward_triton(x, ids, architecture):
    return _take_rows(x, ids, x.shape[0] // ids.shape[0], architecture)


def _backward_triton(dout, ids, length, architecture):
    return _take_rows(dout, slots(ids, length), ids.shape[1], architecture)


def _forward_torch(x, ids):
    return x.index_select(0, flat_rows(ids, x.shape[0] // ids.shape[0]))


def _backward_torch(dout, ids, length):
    dx = dout.new_zeros(ids.shape[0] * length, dout.shape[1])
    dx[flat_rows(ids, length)] = dout
    return dx


# -------------------------------------------------------------------------------------------------- torch operators


_forward = register(
    "gather_tokens",
    "(Tensor x, Tensor ids) -> Tensor",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=lambda x, ids: x.new_empty(ids.shape[0] * ids.shape[1], x.shape[1]),
)
put_tokens = register(
    "gather_tokens_backward",
    "(Tensor dout, Tensor ids, SymInt length) -> Tensor",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=lambda dout, ids, length: dout.new_empty(ids.shape[0] * length, dout.shape[1]),
)
"""Rows `[B * M, D]` of the tokens `ids [B, M]` at their places among rows of zeros -> `[B * length, D]`. It is for backward
passes: autograd does not see it."""


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids):
        ctx.save_for_backward(ids)
        ctx.length = x.shape[0] // ids.shape[0]
        return _forward(x, ids)

    @staticmethod
    def backward(ctx, dout):
        return put_tokens(dout.contiguous(), ctx.saved_tensors[0], ctx.length), None


def check_ids(name: str, ids: Tensor, batch: int | None = None) -> None:
    """Raises unless `ids` is an int64 `[B, M]` tensor of at least one sample and one token (and of `batch` samples)."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} is {ids.dtype}; it must be torch.int64")
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 1 or (batch is not None and ids.shape[0] != batch):
        wanted = f"[{'samples' if batch is None else batch}, tokens]"
        raise ValueError(f"{name} has shape {list(ids.shape)}; it must be {wanted} with at least one of each")


def check_rows(name: str, x: Tensor, batch: int) -> None:
    """Raises unless `x` is a floating-point `[rows, width]` tensor with the same number of rows for each sample."""
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; it must be floating-point")
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[0] % batch or x.shape[1] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{batch} * tokens, width]")


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens `ids` of every sample.

    x `[B * L, D]`, ids `[B, M]` int64 in 0..L-1, unique in each sample (neither is checked: that would wait for the
    device) -> `[B * M, D]`. Raises ValueError or TypeError when a shape or dtype does not fit.
    """
    check_ids("ids", ids)
    check_rows("x", x, ids.shape[0])
    return _GatherTokens.apply(x.contiguous(), ids.contiguous())


def gather_origin(origin: Origin, ids: Tensor) -> Origin:
    """How `gather_tokens(x, ids)` is formed again from what x is."""
    return Origin(partial(_form, origin.form), (*origin.tensors, ids))


def _form(form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    *of_x, ids = tensors
    return _forward(form(*of_x), ids)
