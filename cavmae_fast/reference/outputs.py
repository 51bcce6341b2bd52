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


class MAEOutput(NamedTuple):
    """A pretraining pass of a single-modality masked autoencoder."""

    loss: Tensor
    """mean squared error on the removed patches"""
    mask: Tensor
    """`[B, L]` float32, 1 = removed"""


class MAEInpaintOutput(NamedTuple):
    """Predictions for every patch of masked inputs."""

    pred: Tensor
    """`[B, L, pixels]`, patches in (frame, row, column, channel) order"""
    mask: Tensor
    """`[B, L]` float32, 1 = removed"""
    loss: Tensor
    """scalar: mean squared error on the removed patches"""


class MAViLOutput(NamedTuple):
    """A pretraining pass of MAViL. Losses are scalars; one whose weight is 0 is not computed and reported as 0."""

    loss: Tensor
    """`loss_raw + loss_inter + loss_intra + loss_regression`: what is trained"""
    loss_raw: Tensor
    """the sum of both reconstruction losses, times its weight"""
    loss_raw_a: Tensor
    """mean squared error on the removed audio patches, not weighted"""
    loss_raw_v: Tensor
    """mean squared error on the removed video patches, not weighted"""
    loss_inter: Tensor
    """the contrast between audio and video, times its weight"""
    loss_intra: Tensor
    """the contrast between two views of a modality, the mean of both modalities, times its weight"""
    loss_regression: Tensor
    """the sum of both modalities' mean squared errors against the teacher's tokens, times its weight"""
    mask_a: Tensor
    """`[B, La]` float32, 1 = removed; of the first view"""
    mask_v: Tensor
    """`[B, Lv]` float32, 1 = removed; of the first view"""
    c_acc: Tensor
    """scalar: the share of clips whose own sound ranks first, and whose own pictures do, the mean of both"""


class MAViLParts(NamedTuple):
    """A pretraining pass of MAViL over a part of a batch, before its clips are contrasted with those of the other parts."""

    loss_raw: Tensor
    """the sum of both reconstruction losses, times its weight"""
    loss_raw_a: Tensor
    """mean squared error on the removed audio patches, not weighted"""
    loss_raw_v: Tensor
    """mean squared error on the removed video patches, not weighted"""
    loss_regression: Tensor
    """the sum of both modalities' mean squared errors against the teacher's tokens, times its weight"""
    embeddings: tuple[Tensor, ...]
    """of each view of audio, then of each of video, `[B, D]`; empty when no contrastive loss has a weight"""
