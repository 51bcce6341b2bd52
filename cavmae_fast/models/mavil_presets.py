"""Named systems of the MAViL paper: MAViL, the single-modality autoencoders it is compared with, and its ablation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cavmae_fast.models.mae import MAE
from cavmae_fast.models.mavil import LossWeights, MAViL

STAGE_1 = LossWeights(raw=1.0, inter=0.1, intra=0.01, regression=0.0)
STAGE_2 = LossWeights(raw=0.0, inter=0.1, intra=0.01, regression=1.0)
"The contrastive weights are remembered from the paper; that regression takes the place of pixels is certain."
MASK_RATIO = 0.8
"Certain."
SMALL = {
    "img_size": 96,
    "audio_length": 192,
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 3,
    "decoder_embed_dim": 96,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
    "norm_pix_loss": False,
}
"Sizes for two CPU cores."


@dataclass(frozen=True)
class MAEPreset:
    """A single-modality autoencoder: constructor arguments of `MAE`, and the share of patches that it removes."""

    summary: str
    model: dict[str, Any]
    mask_ratio: float = MASK_RATIO

    def create(self, **overrides: Any) -> MAE:
        """The model; `overrides` change single constructor arguments."""
        return MAE(**{**self.model, **overrides})


@dataclass(frozen=True)
class MAViLPreset:
    """A system: constructor arguments of `MAViL`, the weights of its losses and the share of patches that it removes."""

    summary: str
    model: dict[str, Any] = field(default_factory=dict)
    mask_ratio: float = MASK_RATIO
    stage_1: LossWeights = STAGE_1
    stage_2: LossWeights = STAGE_2

    def weights(self, stage: int) -> LossWeights:
        """The weights of the losses in a stage, 1 or 2. ValueError for another."""
        if stage not in (1, 2):
            raise ValueError(f"stage is {stage}; it must be 1 or 2")
        return self.stage_1 if stage == 1 else self.stage_2

    def create(self, stage: int = 1, **overrides: Any) -> MAViL:
        """The model, training the losses of a stage; `overrides` change single constructor arguments."""
        in_force = self.weights(stage).in_force
        model = MAViL(**{**self.model, **overrides})
        model.train_losses(**in_force)
        return model


TOWER_PRESETS: dict[str, MAEPreset | MAViLPreset] = {
    "a-mae": MAEPreset("masked autoencoder of sound alone", {"modality": "a"}),
    "v-mae": MAEPreset("masked autoencoder of eight pictures alone", {"modality": "v"}),
    "mavil-av-mae": MAViLPreset(
        "MAViL without its contrastive losses: two encoders, fused",
        stage_1=STAGE_1._replace(inter=0.0, intra=0.0),
        stage_2=STAGE_2._replace(inter=0.0, intra=0.0),
    ),
    "mavil-inter": MAViLPreset(
        "MAViL without the contrast between two views",
        stage_1=STAGE_1._replace(intra=0.0),
        stage_2=STAGE_2._replace(intra=0.0),
    ),
    "mavil": MAViLPreset("MAViL: reconstruction, contrast between modalities and between views; then a teacher's tokens"),
    "a-mae-small": MAEPreset("a small a-mae for two CPU cores", {"modality": "a", **SMALL}),
    "v-mae-small": MAEPreset("a small v-mae for two CPU cores", {"modality": "v", **SMALL}),
    "mavil-small": MAViLPreset("a small MAViL for two CPU cores", {**SMALL, "fusion_depth": 1}),
}
