"""The transformer block on packed streams: every stream of the batch in one buffer, one launch per operator.

A `State` is the residual stream with its last update not yet added: the addition happens inside the next LayerNorm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cavmae_fast.models.drop_path import on_path
from cavmae_fast.models.precision import in_fp8
from cavmae_fast.models.rounded import rounded
from cavmae_fast.ops.attention import attention, query_attention
from cavmae_fast.ops.distinct_tokens import Kept
from cavmae_fast.ops.fp8 import Handed, Quantized, new_handed
from cavmae_fast.ops.gather_tokens import gather_origin, gather_tokens
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.origin import Origin, origin_of_last
from cavmae_fast.ops.residual import Residual, as_tensor
from cavmae_fast.ops.scatter_tokens import scatter_distinct
from cavmae_fast.ops.stream_layer_norm import layer_norm_origin, quantized_layer_norm, stream_layer_norm
from cavmae_fast.ops.stream_linear import stream_linear, with_bias_gradients
from cavmae_fast.ops.stream_mlp import RECOMPUTE as MLP_RECOMPUTE
from cavmae_fast.ops.stream_mlp import stream_mlp
from cavmae_fast.reference.layers import Block

RECOMPUTE = (*MLP_RECOMPUTE, "block")
"""What the backward pass of a block forms again instead of keeping it, with the same gradients:

- 'none': nothing;
- 'elementwise': the results of LayerNorms and GELUs, in a pass over memory each and without a product;
- 'mlp': as well what GELUs take, by one more product;
- 'block': everything; the residual stream alone is kept, once per block.
"""


class State(NamedTuple):
    """`x + delta` is the residual stream `[R, D]` of the streams in `layout`; delta None means nothing to add.

    `owed`: the biases in delta whose gradients the next LayerNorm gives (`stream_layer_norm`). What uses delta in another
    way takes that of `settled`. `handed`: where that LayerNorm may leave what fp8 holds of delta's gradient.

    `kept`: an entry for each stream where x has only the tokens that differ (`ops/distinct_tokens.py`), as those of one
    sample; `layout` says so. A block makes every sample's tokens of them where tokens begin to differ: at its attention.
    """

    x: Tensor | Residual
    delta: Tensor | None
    layout: StreamLayout
    owed: Sequence[Tensor] = ()
    kept: Sequence[Kept] = ()
    handed: Handed | None = None

    def settled(self) -> State:
        """The same with ordinary tensors, which owe nothing."""
        delta = with_bias_gradients(self.delta, self.owed, self.layout) if self.owed else self.delta
        return self._replace(x=as_tensor(self.x), delta=delta, owed=())

    def value(self) -> Tensor:
        """The residual stream as one tensor."""
        x, delta, *_ = self.settled()
        return x if delta is None else x + delta


def normalize(state: State, norms: Sequence[nn.LayerNorm], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream with its update added, and its LayerNorm in `dtype`, one norm per stream."""
    return stream_layer_norm(state.x, state.delta, *_parameters(norms), state.layout, norms[0].eps, dtype, owed=state.owed)


def linear(x: Tensor, layers: Sequence[nn.Linear], layout: StreamLayout) -> Tensor:
    """One layer for all streams, or one per stream, computed in x's dtype."""
    return stream_linear(x, *_parameters(layers, x.dtype), layout)


class Normed(NamedTuple):
    """The residual stream `x` with its update added, its LayerNorm `y`, how y is formed again, where it is not kept, and
    what fp8 holds of y, where the next product takes that."""

    x: Tensor | Residual
    y: Tensor
    origin: Origin | None
    quantized: Quantized | None = None


def normalize_again(
    state: State,
    norms: Sequence[nn.LayerNorm],
    dtype: torch.dtype,
    recompute: str,
    x_is_kept: bool,
    fp8: bool = False,
) -> Normed:
    """As `normalize`, with what `recompute` keeps of it. `x_is_kept`: for the backward pass of something before. `fp8`: for
    an fp8 product; y has no values then unless the backward pass reads them."""
    weights, biases = _parameters(norms)
    arguments = (weights, biases, state.layout, norms[0].eps, dtype)
    options = {"keep_sum": recompute == "none" or not x_is_kept, "owed": state.owed}
    if fp8:
        kept = recompute == "none" and torch.is_grad_enabled()
        options |= {"values": kept, "handed": state.handed}
        x, y, quantized = quantized_layer_norm(state.x, state.delta, *arguments, **options)
    else:
        (x, y), quantized = stream_layer_norm(state.x, state.delta, *arguments, **options), None
    if recompute == "none":
        return Normed(x, y, None, quantized)
    kept = (_values(state.x), state.delta) if x_is_kept else (_values(x), None)
    return Normed(x, y, layer_norm_origin(*kept, *arguments), quantized)


def _values(x: Tensor | Residual) -> Tensor:
    return x.value if isinstance(x, Residual) else x


def block(
    state: State,
    blocks: Sequence[Block],
    modalities: Sequence[str | None],
    dtype: torch.dtype,
    backend: str,
    paths: Tensor | None = None,
    recompute: str = "none",
) -> State:
    """One block: the same for all streams, or one per stream. `modalities` says whose norms each stream passes, `paths`
    `[2, streams, batch]` what the updates of attention and MLP are multiplied by (None: nothing), `recompute`, one of
    `RECOMPUTE`, what is formed again in the backward pass."""
    return _called(_block, blocks, state, recompute, blocks, modalities, dtype, backend, paths, in_fp8())


def _called(compute: Callable[..., State], blocks: Sequence[Block], state: State, recompute: str, *args: Any) -> State:
    """`compute(state, recompute, *args)` inside a call of each of `blocks`, whose parameters it uses (`Block.forward` says
    why)."""
    if recompute == "block":
        compute = functools.partial(_checkpointed, compute)
    for one in blocks:
        compute = functools.partial(one, compute)
    return compute(state, recompute, *args)


def _checkpointed(compute: Callable[..., State], state: State, recompute: str, *args: Any) -> State:
    """`compute` with nothing formed again within it, of which the residual stream alone, its update added, is kept for
    backward."""
    layout, kept = state.layout, state.kept

    def run(x: Tensor) -> State:
        return compute(State(x, None, layout, kept=kept), "none", *args)

    # Nothing in a block is drawn at random: paths were drawn before.
    return checkpoint(run, state.value(), use_reentrant=False, preserve_rng_state=False)


def _block(
    state: State,
    recompute: str,
    blocks: Sequence[Block],
    modalities: Sequence[str | None],
    dtype: torch.dtype,
    backend: str,
    paths: Tensor | None,
    fp8: bool,
) -> State:
    attention_path, mlp_path = (None, None) if paths is None else paths
    layout, kept = state.layout, state.kept
    norm1s, norm2s = _norms(blocks, modalities)
    x, h, origin, quantized = normalize_again(state, norm1s, dtype, recompute, x_is_kept=False, fp8=fp8)
    weights, biases = _parameters([b.attn.qkv for b in blocks], h.dtype)
    # Attention gives the biases' gradients, where it forms that of qkv; or the product does, where it has fewer rows.
    given, owed = (biases, ()) if kept else (_detached(biases), biases)
    qkv = stream_linear(h, weights, given, layout, origin=origin, fp8=fp8, quantized=quantized)
    if kept:
        x, qkv, layout = scatter_distinct(x, kept), scatter_distinct(qkv, kept), _of_every_sample(kept)
    h = attention(qkv, layout, blocks[0].attn.num_heads, backend=backend, owed=owed)
    # The first norm keeps x, unless it saw only the tokens that differ: with the update, half as wide in autocast, it gives
    # what the second one normalizes.
    updated = _updated(x, h, [b.attn.proj for b in blocks], layout, fp8, attention_path)
    normed = normalize_again(updated, norm2s, dtype, recompute, x_is_kept=not kept, fp8=fp8)
    return _mlp(normed, blocks, layout, recompute, fp8, mlp_path)


def _updated(
    x: Tensor | Residual, h: Tensor, layers: Sequence[nn.Linear], layout: StreamLayout, fp8: bool, path: Tensor | None = None
) -> State:
    """The residual stream with the update `layers(h)`, of which `path` leaves out some. With the whole update the biases'
    gradients are owed: the next LayerNorm gives them where the update's gradient passes anyway."""
    weights, biases = _parameters(layers, h.dtype)
    if path is not None:
        return State(x, on_path(stream_linear(h, weights, biases, layout, fp8=fp8), path, layout), layout)
    handed = new_handed() if fp8 else None
    delta = stream_linear(h, weights, _detached(biases), layout, fp8=fp8, handed=handed)
    return State(x, delta, layout, biases, handed=handed)


def _of_every_sample(kept: Sequence[Kept]) -> StreamLayout:
    """Where the tokens lie that `scatter_distinct` makes."""
    return StreamLayout(len(kept[0].places), tuple(places.shape[1] for _, places in kept))


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def block_for_tokens(
    state: State, one: Block, ids: Tensor, dtype: torch.dtype, backend: str, recompute: str = "none"
) -> State:
    """One block of a single stream, computed for the tokens `ids [B, M]` alone: the others serve as keys and values. Where
    the state has only the tokens that differ, `ids` are masked ones."""
    return _called(_block_for_tokens, [one], state, recompute, one, ids, dtype, backend, in_fp8())


def _block_for_tokens(
    state: State, recompute: str, one: Block, ids: Tensor, dtype: torch.dtype, backend: str, fp8: bool
) -> State:
    layout, kept = state.layout, state.kept
    wanted = StreamLayout(len(ids), (ids.shape[1],))
    x, h, origin, _ = normalize_again(state, [one.norm1], dtype, recompute, x_is_kept=False)
    x = as_tensor(x)
    width, ((weights,), (biases,)) = h.shape[1], _parameters([one.attn.qkv], dtype)
    given, owed = (biases, ()) if kept else (biases.detach(), [biases])  # as in `_block`
    (weight, weight_kv), (bias, bias_kv) = (p.split([width, 2 * width]) for p in (weights, given))
    kv = stream_linear(h, [weight_kv], [bias_kv], layout, origin=origin, fp8=fp8)
    if kept:  # masked ones, whose rows are the last ones
        kv, layout = scatter_distinct(kv, kept), _of_every_sample(kept)
        (length,) = layout.lengths
        of_positions = None if origin is None else origin_of_last(origin, length)
        q = stream_linear(h[-length:], [weight], [bias], StreamLayout(1, (length,)), origin=of_positions, fp8=fp8)
        q, x = _at_positions(q, ids), _at_positions(x[-length:], ids)
    else:
        of_tokens = None if origin is None else gather_origin(origin, ids)
        q = stream_linear(gather_tokens(h, ids), [weight], [bias], wanted, origin=of_tokens, fp8=fp8)
        x = gather_tokens(x, ids)
    h = query_attention(q, kv, wanted, layout, one.attn.num_heads, backend=backend, owed=owed)
    updated = _updated(x, h, [one.attn.proj], wanted, fp8)
    normed = normalize_again(updated, [one.norm2], dtype, recompute, x_is_kept=False, fp8=fp8)
    return _mlp(normed, [one], wanted, recompute, fp8)


def _at_positions(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `[L, D]` that all samples share, at the positions `ids [B, M]` -> `[B * M, D]`."""
    return gather_tokens(x.expand(len(ids), -1, -1).flatten(0, 1), ids)


def _mlp(
    normed: Normed, blocks: Sequence[Block], layout: StreamLayout, recompute: str, fp8: bool, path: Tensor | None = None
) -> State:
    """The residual stream with the MLP's update; as in `_updated`."""
    fc1, (weights, biases) = (_parameters([getattr(b.mlp, name) for b in blocks], normed.y.dtype) for name in ("fc1", "fc2"))
    given, handed = (biases, None) if path is not None else (_detached(biases), new_handed() if fp8 else None)
    options = {"origin": normed.origin, "fp8": fp8, "quantized": normed.quantized, "handed": handed}
    delta = stream_mlp(normed.y, *fc1, weights, given, layout, recompute=recompute, **options)
    if path is not None:
        return State(normed.x, on_path(delta, path, layout), layout)
    return State(normed.x, delta, layout, biases, handed=handed)


def _parameters(layers: Sequence[nn.Module], dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and the biases of the layers, in `dtype` (None: their own)."""
    pairs = [(layer.weight, layer.bias) for layer in layers]
    weights, biases = ([tensor if dtype is None else rounded(tensor, dtype) for tensor in group] for group in zip(*pairs))
    return weights, biases


def _norms(blocks: Sequence[Block], modalities: Sequence[str | None]) -> tuple[list[nn.LayerNorm], list[nn.LayerNorm]]:
    """The first and the second norm of each stream."""
    each = blocks if len(blocks) == len(modalities) else [blocks[0]] * len(modalities)
    norms = [one.norms(modality) for one, modality in zip(each, modalities)]
    return [norm1 for norm1, _ in norms], [norm2 for _, norm2 in norms]
