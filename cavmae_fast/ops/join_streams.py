"""From the streams of single modalities to those of the shared blocks: the same tokens side by side, sample by sample.

    in   | audio, B x La | video, B x Lv |
    out  | audio, B x La | video, B x Lv | joint, B x (La + Lv) |        or the joint stream alone

Every stream is written where it belongs, once: nothing is concatenated. The update of the residual stream is added on the
way. Backward, the gradients of the two places of a row are added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cavmae_fast.ops.layout import StreamLayout


def _places(joint: Tensor, layout: StreamLayout) -> tuple[Tensor, ...]:
    """Views of the rows of each stream within those of the joint one, `[B, L, D]` each."""
    return joint.unflatten(0, (layout.batch, -1)).split(layout.lengths, dim=1)


class _JoinStreams(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, layout: StreamLayout, single: bool) -> Tensor:
        ctx.layout, ctx.single, ctx.delta_dtype = layout, single, None if delta is None else delta.dtype
        out = x.new_empty((1 + single) * len(x), x.shape[1])
        if single:
            out[: len(x)].copy_(x) if delta is None else torch.add(x, delta, out=out[: len(x)])
            x, delta = out[: len(x)], None
        deltas = [None] * len(layout.lengths) if delta is None else layout.streams(delta)
        for place, stream, update in zip(_places(out[-layout.rows :], layout), layout.streams(x), deltas, strict=True):
            place.copy_(stream)
            if update is not None:
                place.add_(update)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        layout = ctx.layout
        dx = gradient.new_empty(layout.rows, gradient.shape[1])
        places = _places(gradient[-layout.rows :], layout)
        alone = layout.streams(gradient[: layout.rows]) if ctx.single else [None] * len(places)
        for stream, place, own in zip(layout.streams(dx), places, alone, strict=True):
            stream.copy_(place) if own is None else torch.add(own, place, out=stream)
        return dx, None if ctx.delta_dtype is None else dx.to(ctx.delta_dtype), None, None


def join_streams(x: Tensor, delta: Tensor | None, layout: StreamLayout, *, single: bool) -> tuple[Tensor, StreamLayout]:
    """`x + delta` (None: x) of the streams in `layout`, `[R, D]`, with the joint stream behind them, or (without `single`)
    the joint stream alone; and its layout. The joint stream holds each sample's tokens of all streams, in their order."""
    lengths = (*(layout.lengths if single else ()), sum(layout.lengths))
    return _JoinStreams.apply(x, delta, layout, single), StreamLayout(layout.batch, lengths)
