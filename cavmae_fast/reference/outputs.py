"""What the models return: named, and in the order of the published tuples, so that `loss, *_ = model(...)` still works."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PretrainOutput(NamedTuple):
    """A pretraining pass. Losses are scalars; a loss whose weight is 0 is not computed and reported as 0."""

    loss: Tensor
    """`loss_mae + loss_c`: what is trained"""
    loss_mae: Tensor
    """the sum of both reconstruction losses, times its weight"""
    loss_mae_a: Tensor
    """mean squared error on the removed audio patches, not weighted"""
    loss_mae_v: Tensor
    """mean squared error on the removed video patches, not weighted"""
    loss_c: Tensor
    """the contrastive loss, times its weight"""
    mask_a: Tensor
    """`[B, La]` float32, 1 = removed"""
    mask_v: Tensor
    """`[B, Lv]` float32, 1 = removed"""
    c_acc: Tensor
    """scalar: the share of videos whose own audio ranks first among the audio of the batch"""


class PretrainParts(NamedTuple):
    """A pretraining pass over a part of a batch, before its clips are contrasted with those of the other parts."""

    loss_mae: Tensor
    """the sum of both reconstruction losses, times its weight"""
    loss_mae_a: Tensor
    """mean squared error on the removed audio patches, not weighted"""
    loss_mae_v: Tensor
    """mean squared error on the removed video patches, not weighted"""
    embeddings: tuple[Tensor, ...]
    """of audio and of video, `[B, D]`; empty when the contrastive loss has no weight"""


class InpaintOutput(NamedTuple):
    """Predictions for every patch of masked clips, patches of `p x p` pixels in `C` colors."""

    pred_a: Tensor
    """`[B, La, p*p]`"""
    pred_v: Tensor
    """`[B, Lv, p*p*C]`"""
    mask_a: Tensor
    """`[B, La]` float32, 1 = removed"""
    mask_v: Tensor
    """`[B, Lv]` float32, 1 = removed"""
    loss_a: Tensor
    """scalar: mean squared error on the removed audio patches"""
    loss_v: Tensor
    """scalar: mean squared error on the removed video patches"""


class FeatureOutput(NamedTuple):
    """Normed tokens of each modality, seen alone."""

    audio: Tensor
    """`[B, La, D]`"""
    video: Tensor
    """`[B, Lv, D]`"""
