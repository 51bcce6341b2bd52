"""The forward pass of one or two towers on packed streams: a stream for each tower, all of them in one buffer.

`towers`, inputs, masks and what is returned are sequences of the same length, one entry for each tower; `recompute`, one of
`packed.RECOMPUTE`, is what blocks form again in the backward pass. Exact savings: only kept patches are projected, the first
decoder block's LayerNorm and qkv see a masked token once per position, and the last decoder block runs for removed patches
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.models.packed import State, block, block_for_tokens, linear, normalize
from cavmae_fast.models.rounded import rounded
from cavmae_fast.ops.distinct_tokens import distinct_tokens, kept_at
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.tower import Tower


def pack(streams: Sequence[Tensor]) -> State:
    """Token streams `[B, L, D]`, of one B -> one buffer, without a pending update."""
    layout = StreamLayout(len(streams[0]), tuple(stream.shape[1] for stream in streams))
    rows = [stream.flatten(0, 1) for stream in streams]
    return State(rows[0] if len(rows) == 1 else torch.cat(rows), None, layout)


def embed(tower: Tower, x: Tensor, ids_keep: Tensor | None, clip: ClipSpec, dtype: torch.dtype) -> Tensor:
    """One tower's input of B samples -> `[V * B, 1 + K, D]`, class token first, then the kept patches (None: all, V is 1).

    ids_keep `[V * B, K]`: V views of every sample, view after view; no pixel is copied for them.
    """
    images, projection, positions = tower.images(x), tower.patch_embed.proj, tower.pos_embed[0]
    first = (tower.cls_token + positions[:1]).expand(len(x), -1, -1)
    views = []
    for ids in [None] if ids_keep is None else ids_keep.split(len(x)):
        patches = embed_kept_patches(
            images,
            ids,
            rounded(projection.weight, dtype),
            projection.bias,
            positions[1:],
            None,
            clip.image_mean,
            clip.image_std,
        )
        views.append(torch.cat([first, patches.unflatten(0, (len(x), -1))], dim=1))
    return views[0] if len(views) == 1 else torch.cat(views)


def encode(
    towers: Sequence[Tower],
    inputs: Sequence[Tensor],
    ids_keep: Sequence[Tensor | None],
    clip: ClipSpec,
    dtype: torch.dtype,
    backend: str,
    recompute: str,
    paths: Tensor | None = None,
) -> State:
    """Inputs of all towers through all their blocks; class tokens included, not yet normed. `paths [depth, 2, towers, B]`:
    what the updates of each block are multiplied by (None: nothing)."""
    state = pack([embed(*each, clip, dtype) for each in zip(towers, inputs, ids_keep, strict=True)])
    for index, blocks in enumerate(zip(*(tower.blocks for tower in towers), strict=True)):
        own = None if paths is None else paths[index]
        state = block(state, blocks, [None] * len(towers), dtype, backend, own, recompute)
    return state


def whole(
    towers: Sequence[Tower],
    inputs: Sequence[Tensor],
    clip: ClipSpec,
    dtype: torch.dtype,
    backend: str,
    recompute: str,
    paths: Tensor | None = None,
) -> State:
    """As `encode`, of unmasked inputs."""
    return encode(towers, inputs, [None] * len(towers), clip, dtype, backend, recompute, paths)


def normed(towers: Sequence[Tower], state: State, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Encoded towers -> the residual stream `[R, D]`, and its norm by stream, `[B, 1 + K, D]` each."""
    x, tokens = normalize(state, [tower.norm for tower in towers], dtype)
    return x, state.layout.streams(tokens)


def _decoder_state(
    towers: Sequence[Tower],
    tokens: Sequence[Tensor],
    maskings: Sequence[Masking],
    leave_out: int,
    dtype: torch.dtype,
    backend: str,
    recompute: str,
) -> State:
    """Tokens at their places, mask tokens elsewhere, through all blocks of the decoders but the last `leave_out`."""
    packed = pack(tokens)
    embedded = packed.layout.streams(linear(packed.x, [tower.decoder_embed for tower in towers], packed.layout))
    kept, distinct = [], []
    for tower, x, masking in zip(towers, embedded, maskings, strict=True):
        ids = torch.cat([masking.ids_keep.new_zeros(len(x), 1), masking.ids_keep + 1], dim=1)  # class token first
        kept.append(kept_at(ids, 1 + tower.num_patches))
        distinct.append(distinct_tokens(x.flatten(0, 1), kept[-1], tower.mask_token.flatten(), tower.decoder_pos_embed[0]))
    state = pack([x.unsqueeze(0) for x in distinct])._replace(kept=kept)
    stacks = [tower.decoder_blocks[: len(tower.decoder_blocks) - leave_out] for tower in towers]
    for blocks in zip(*stacks, strict=True):
        state = block(state, blocks, [None] * len(towers), dtype, backend, recompute=recompute)
    return state


def decode(
    towers: Sequence[Tower],
    tokens: Sequence[Tensor],
    maskings: Sequence[Masking],
    dtype: torch.dtype,
    backend: str,
    recompute: str,
) -> list[Tensor]:
    """Normed tokens `[B, 1 + K, D]` -> the decoders' normed tokens of every patch, `[B, L, width]`."""
    state = _decoder_state(towers, tokens, maskings, 0, dtype, backend, recompute)
    _, h = normalize(state, [tower.decoder_norm for tower in towers], dtype)
    return [stream[:, 1:] for stream in state.layout.streams(h)]


def decode_removed(
    towers: Sequence[Tower],
    tokens: Sequence[Tensor],
    maskings: Sequence[Masking],
    dtype: torch.dtype,
    backend: str,
    recompute: str,
) -> list[Tensor]:
    """As `decode`, for removed patches alone: `[B, M, width]`, in `ids_removed` order. Something must be removed."""
    state = _decoder_state(towers, tokens, maskings, 1, dtype, backend, recompute)
    state, rows = state.settled(), state.layout.rows_per_stream
    deltas = [None] * len(towers) if state.delta is None else state.delta.split(rows)
    decoded = []
    kepts = [[one] for one in state.kept] or [()] * len(towers)
    parts = zip(towers, state.x.split(rows), deltas, state.layout.lengths, kepts, maskings)
    for tower, x, delta, length, kept, masking in parts:
        alone = State(x, delta, StreamLayout(state.layout.batch, (length,)), kept=kept)
        last = block_for_tokens(alone, tower.decoder_blocks[-1], masking.ids_removed + 1, dtype, backend, recompute)
        decoded += last.layout.streams(normalize(last, [tower.decoder_norm], dtype)[1])
    return decoded


def predict(head: torch.nn.Linear, tokens: Tensor) -> Tensor:
    """One linear head over tokens `[B, L, width]`."""
    batch, length, _ = tokens.shape
    return linear(tokens.flatten(0, 1), [head], StreamLayout(batch, (length,))).unflatten(0, (batch, length))


def removed_loss(tower: Tower, x: Tensor, pred: Tensor, masking: Masking, norm_pix_loss: bool, clip: ClipSpec) -> Tensor:
    """Mean squared error of `pred [B, M, pixels]`, the predictions for the removed patches of the tower's input x."""
    return masked_patch_mse(
        pred,
        tower.images(x),
        masking.ids_removed,
        tower.patch_size,
        norm_pix_loss,
        clip.image_mean,
        clip.image_std,
        tower.tubelet_size,
    )
