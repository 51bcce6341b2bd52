"""What a model can be asked, whatever its family: what it embeds, and what it fills in. Evaluation knows models by these.

Modalities are called 'a', sound, and 'v', pictures.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec


class Embeds:
    """A model that embeds each of its modalities, seen alone. `check_inputs(a=..., v=...)`, which all models have from their
    parameters, raises TypeError or ValueError for inputs that do not fit."""

    modalities: str
    "'av', 'a' or 'v'."
    clip_spec: ClipSpec
    config: dict[str, Any]

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens by modality, as `features` gives them."""
        raise NotImplementedError

    def features(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unmasked inputs by modality -> the normed tokens `[B, L, D]` of each, seen alone."""
        raise NotImplementedError

    def embeddings(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unmasked inputs by modality -> what is compared of each, `[B, D]` in float32 (float64 for a model in float64), not
        of length 1: the mean token, which a contrastive loss contrasts."""
        return {m: tokens.mean(dim=1, dtype=_exact(tokens)) for m, tokens in self.features(inputs).items()}


class Prediction(NamedTuple):
    """What a model predicts of one modality of masked clips: `patches [B, L, pixels]`, all of them, and the `mask [B, L]`, 1
    where a patch was removed."""

    patches: Tensor
    mask: Tensor


class FillsIn:
    """A model with a decoder, which predicts removed patches."""

    modalities: str
    norm_pix_loss: bool
    usual_mask_ratio: ClassVar[float]
    "Share of the patches that is removed, as published."
    mask_modes: ClassVar[tuple[str, ...]] = ("unstructured",)
    "How patches of sound can be chosen."

    def fill_in(self, inputs: dict[str, Tensor], mask_ratio: float, mask_mode: str) -> dict[str, Prediction]:
        """Inputs by modality, all that the model has -> the same, masked and predicted. ValueError for a ratio that removes
        nothing or all."""
        raise NotImplementedError

    def to_patches(self, m: str, x: Tensor) -> Tensor:
        """The input of modality `m` as patches `[B, L, pixels]`, as they are predicted."""
        raise NotImplementedError

    def to_images(self, m: str, patches: Tensor) -> Tensor:
        """The inverse, as images: pictures `[B, 3, H, W]`, or `[B, 3, F, H, W]` of several per clip; spectrograms
        `[B, 1, mel_bins, T]`."""
        raise NotImplementedError


def _exact(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)
