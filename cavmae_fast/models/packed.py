"""The transformer block on packed streams: every stream of the batch in one buffer, one launch per operator.

A `State` is the residual stream with its last update not yet added: the addition happens inside the next LayerNorm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cavmae_fast.models.drop_path import on_path
from cavmae_fast.ops.attention import attention, query_attention
from cavmae_fast.ops.gather_tokens import gather_tokens
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.stream_layer_norm import stream_layer_norm
from cavmae_fast.ops.stream_linear import stream_linear
from cavmae_fast.reference.layers import Block


class State(NamedTuple):
    """`x + delta` is the residual stream `[R, D]` of the streams in `layout`; delta None means nothing to add."""

    x: Tensor
    delta: Tensor | None
    layout: StreamLayout

    def value(self) -> Tensor:
        return self.x if self.delta is None else self.x + self.delta


def normalize(state: State, norms: Sequence[nn.LayerNorm], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream with its update added, and its LayerNorm in `dtype`, one norm per stream."""
    weights, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
    return stream_layer_norm(state.x, state.delta, weights, biases, state.layout, norms[0].eps, dtype)


def linear(
    x: Tensor, layers: Sequence[nn.Linear], layout: StreamLayout, operator: Callable[..., Tensor] = stream_linear
) -> Tensor:
    """One layer for all streams, or one per stream, computed in x's dtype."""
    weights = [layer.weight.to(x.dtype) for layer in layers]
    biases = [layer.bias.to(x.dtype) for layer in layers]
    return operator(x, weights, biases, layout)


def block(
    state: State,
    blocks: Sequence[Block],
    modalities: Sequence[str | None],
    dtype: torch.dtype,
    backend: str,
    paths: Tensor | None = None,
) -> State:
    """One block: the same for all streams, or one per stream. `modalities` says whose norms each stream passes, `paths`
    `[2, streams, batch]` what the updates of attention and MLP are multiplied by (None: nothing)."""
    return _called(_block, blocks, state, blocks, modalities, dtype, backend, paths)


def _called(compute: Callable[..., State], blocks: Sequence[Block], *args: Any) -> State:
    """`compute(*args)` inside a call of each of `blocks`, whose parameters it uses (`Block.forward` says why)."""
    for one in blocks:
        compute = functools.partial(one, compute)
    return compute(*args)


def _block(
    state: State,
    blocks: Sequence[Block],
    modalities: Sequence[str | None],
    dtype: torch.dtype,
    backend: str,
    paths: Tensor | None,
) -> State:
    attention_path, mlp_path = (None, None) if paths is None else paths
    layout = state.layout
    norm1s, norm2s = _norms(blocks, modalities)
    x, h = normalize(state, norm1s, dtype)
    qkv = linear(h, [b.attn.qkv for b in blocks], layout)
    h = attention(qkv, layout, blocks[0].attn.num_heads, backend=backend)
    delta = on_path(linear(h, [b.attn.proj for b in blocks], layout), attention_path, layout)
    x, h = normalize(State(x, delta, layout), norm2s, dtype)
    return State(x, on_path(_mlp(h, blocks, layout), mlp_path, layout), layout)


def block_for_tokens(state: State, one: Block, ids: Tensor, dtype: torch.dtype, backend: str) -> State:
    """One block of a single stream, computed for the tokens `ids [B, M]` alone: the others serve as keys and values."""
    return _called(_block_for_tokens, [one], state, one, ids, dtype, backend)


def _block_for_tokens(state: State, one: Block, ids: Tensor, dtype: torch.dtype, backend: str) -> State:
    layout = state.layout
    wanted = StreamLayout(layout.batch, (ids.shape[1],))
    x, h = normalize(state, [one.norm1], dtype)
    qkv, width = one.attn.qkv, state.x.shape[1]
    weight, bias = qkv.weight.to(dtype), qkv.bias.to(dtype)
    kv = stream_linear(h, [weight[width:]], [bias[width:]], layout)
    q = stream_linear(gather_tokens(h, ids), [weight[:width]], [bias[:width]], wanted)
    h = query_attention(q, kv, wanted, layout, one.attn.num_heads, backend=backend)
    x, h = normalize(State(gather_tokens(x, ids), linear(h, [one.attn.proj], wanted), wanted), [one.norm2], dtype)
    return State(x, _mlp(h, [one], wanted), wanted)


def _mlp(h: Tensor, blocks: Sequence[Block], layout: StreamLayout) -> Tensor:
    h = linear(h, [b.mlp.fc1 for b in blocks], layout, linear_gelu)
    return linear(h, [b.mlp.fc2 for b in blocks], layout)


def _norms(blocks: Sequence[Block], modalities: Sequence[str | None]) -> tuple[list[nn.LayerNorm], list[nn.LayerNorm]]:
    """The first and the second norm of each stream."""
    each = blocks if len(blocks) == len(modalities) else [blocks[0]] * len(modalities)
    norms = [one.norms(modality) for one, modality in zip(each, modalities)]
    return [norm1 for norm1, _ in norms], [norm2 for _, norm2 in norms]
