"""Weights of single-modality autoencoders into models of towers, and of a tower into a model of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cavmae_fast.models.imagenet_mae import load_places
from cavmae_fast.models.weights import CheckpointError, LoadReport, load_checkpoint, state_of
from cavmae_fast.reference.mavil_encoder import MAViLEncoderParameters
from cavmae_fast.reference.tower import Tower

TOWERS_TO_FINE_TUNED = {
    "allow_missing": ("mlp_head.*",),
    "allow_unexpected": ("*decoder_*", "*mask_token", "target_pred_*"),
}
"Arguments of `load_checkpoint` that take an `MAE` into an `MAEFT`, and a `MAViL` into a `MAViLFT`."
NAMES = {"a": "audio", "v": "video"}
"Of the towers in MAViL."


def load_mae(
    model: Tower | MAViLEncoderParameters,
    source: str | os.PathLike | Mapping[str, Tensor],
    *,
    keep_sum: bool = False,
) -> LoadReport:
    """Initializes an `MAE`, an `MAEFT`, or both towers and the fusion encoder of a MAViL model from an image or audio MAE.

    An image MAE's projection is summed over colors for sound, and repeated over the frames of a tubelet for video: not
    divided by their number, as published (certain), or divided with `keep_sum`, so that a still clip gives what the image
    gave. Its positions are tiled over time; sound keeps its own, whose grid is another. The head of its decoder is repeated
    over frames too, and averaged over colors for sound. A decoder is taken only where all of it fits by name: Audio-MAE's,
    of shifted windows, is another. All blocks of the fusion encoder begin as copies of the last block, its norm as that of
    the encoder (certain).

    Returns which of the model's names kept their own values and which of the checkpoint's were not used. Raises
    CheckpointError when a shape does not fit or no block is found.
    """
    state, _ = state_of(source)
    whole = isinstance(model, MAViLEncoderParameters)
    towers = {f"{NAMES[tower.modality]}.": tower for tower in model.towers} if whole else {"": model}

    def places(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        for prefix, tower in towers.items():
            part = _part(tower, key, value, state, keep_sum)
            if part is not None:
                yield prefix + key, part
        if whole:
            yield from ((name, value) for name in _fusion_places(model, key))

    return load_places(model, source, f"{next(iter(towers))}blocks.", places)


def _part(tower: Tower, key: str, value: Tensor, state: Mapping[str, Tensor], keep_sum: bool) -> Tensor | None:
    """What of the checkpoint's tensor `key` the tower takes under the same name; None: nothing."""
    kernel = state.get("patch_embed.proj.weight")
    colors_to_sound = tower.modality == "a" and kernel is not None and kernel.dim() == 4 and kernel.shape[1] == 3
    still_to_clip = tower.frames > 1 and kernel is not None and kernel.dim() == 4
    if key.startswith(("decoder_", "mask_token")) and not _decoders_match(tower, state):
        return None
    if key == "patch_embed.proj.weight":
        value = value.sum(dim=1, keepdim=True) if colors_to_sound else value
        if still_to_clip:
            value = value.unsqueeze(2).repeat(1, 1, tower.tubelet_size, 1, 1)
            value = value / tower.tubelet_size if keep_sum else value
    elif key in ("pos_embed", "decoder_pos_embed"):
        if colors_to_sound:
            return None
        if still_to_clip:
            value = torch.cat([value[:, :1], value[:, 1:].repeat(1, tower.patch_embed.grid[0], 1)], dim=1)
    elif key.startswith("decoder_pred."):
        if colors_to_sound:
            value = value.unflatten(0, (-1, 3)).mean(dim=1)
        elif still_to_clip:
            value = torch.cat([value] * tower.tubelet_size)
    return value


def _decoders_match(tower: Tower, state: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint has a decoder with exactly the tower's names."""
    own, theirs = ({k for k in names if k.startswith(("decoder_", "mask_token"))} for names in (tower.state_dict(), state))
    return own == theirs


def _fusion_places(model: MAViLEncoderParameters, key: str) -> Iterator[str]:
    """Where a tensor of the encoder goes in the fusion encoder."""
    last = f"blocks.{len(model.audio.blocks) - 1}."
    if key.startswith("norm."):
        yield f"fusion.{key}"
    elif key.startswith(last):
        for stack in ("blocks", "blocks_a", "blocks_v"):
            for number in range(len(getattr(model.fusion, stack, ()))):
                yield f"fusion.{stack}.{number}.{key.removeprefix(last)}"


def load_tower(model: Tower, source: str | os.PathLike | Mapping[str, Tensor]) -> LoadReport:
    """Loads one of the two encoders of a MAViL checkpoint, pretrained or fine-tuned, into an `MAEFT` or `MAE` of its
    modality; the decoder too, where both have one.

    Returns what was missing and unexpected. Raises CheckpointError when it holds no such tower or a shape does not fit.
    """
    state, origin = state_of(source)
    tower = tower_state(state, model.modality)
    if not tower:
        raise CheckpointError(f"{origin} is no MAViL checkpoint: no name in it begins with {NAMES[model.modality]}.")
    return load_checkpoint(model, tower, **TOWERS_TO_FINE_TUNED)


def tower_state(state: Mapping[str, Tensor], modality: str) -> dict[str, Tensor]:
    """What of a MAViL's state dict belongs to the tower of a modality, under the names of a tower by itself."""
    prefix = f"{NAMES[modality]}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
