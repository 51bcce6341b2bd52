"""Named systems of CAV-MAE's paper: how each differs in model and losses. How each is optimized: `training.recipes`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cavmae_fast.models.cavmae import CAVMAE
from cavmae_fast.models.mae import MAE
from cavmae_fast.models.mavil import MAViL
from cavmae_fast.models.mavil_presets import TOWER_PRESETS


@dataclass(frozen=True)
class Preset:
    """A system: constructor arguments of `CAVMAE`, the weights of its losses and the share of patches that it removes."""

    summary: str
    model: dict[str, Any] = field(default_factory=dict)
    mask_ratio: float = 0.75
    mae_loss_weight: float = 1.0
    contrast_loss_weight: float = 0.01

    def create(self, **overrides: Any) -> CAVMAE:
        """The model, training this system's losses; `overrides` change single constructor arguments."""
        model = CAVMAE(**{"norm_pix_loss": True, **self.model, **overrides})
        model.train_losses(reconstruction=self.mae_loss_weight != 0, contrast=self.contrast_loss_weight != 0)
        return model


PRESETS = {
    "small": Preset(
        "a small CAV-MAE for two-second clips and two CPU cores",
        model={
            "img_size": 96,
            "audio_length": 192,
            "embed_dim": 192,
            "num_heads": 3,
            "depth": 4,
            "modality_specific_depth": 3,
            "decoder_embed_dim": 96,
            "decoder_num_heads": 3,
            "decoder_depth": 1,
            "bidirect_contrast": True,
            "norm_pix_loss": False,
        },
        mask_ratio=0.5,
        contrast_loss_weight=1.0,
    ),
    "cav": Preset("contrastive learning alone: no decoder is run", mae_loss_weight=0.0),
    "vanilla-av-mae": Preset(
        "masked autoencoder with one joint encoder and no contrastive loss",
        model={"modality_specific_depth": 0},
        contrast_loss_weight=0.0,
    ),
    "av-mae": Preset("CAV-MAE without the contrastive loss", contrast_loss_weight=0.0),
    "cav-mae-base": Preset("CAV-MAE, batch 48"),
    "cav-mae-scale+": Preset("CAV-MAE, batch 120"),
    "cav-mae-scale++": Preset("CAV-MAE, batch 256"),
}


def create_model(name: str, **overrides: Any) -> CAVMAE | MAE | MAViL:
    """The model of the preset `name`, of CAV-MAE's paper or MAViL's, with single constructor arguments changed. ValueError
    for an unknown name."""
    presets = {**PRESETS, **TOWER_PRESETS}
    if name not in presets:
        raise ValueError(f"model is {name!r}; it must be one of {', '.join(presets)}")
    return presets[name].create(**overrides)
