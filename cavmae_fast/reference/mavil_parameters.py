"""The parameters of MAViL (Huang et al., NeurIPS 2023), pretraining model and classifier, without a forward.

Its pretraining code was never published. How certain each number is stands beside it: *certain* was read in primary
material, *quoted* by others, *remembered* from the paper and not checked again, *ours* where nothing is known.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.reference.encoder_parameters import constructor_arguments
from cavmae_fast.reference.freezing import LossesInForce
from cavmae_fast.reference.layers import NormLayer, initialize_weights
from cavmae_fast.reference.mae_parameters import LAYER_NORM, SMALL_EMBEDDINGS, check_mode, head
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.mavil_encoder import MAViLEncoderParameters
from cavmae_fast.reference.outputs import FeatureOutput
from cavmae_fast.reference.tower import INPUTS, DecoderSizes

TRAINED_BY = (
    (re.compile(r"(audio|video)\.decoder_pred\."), {"raw"}),
    (re.compile(r"target_pred_"), {"regression"}),
    (re.compile(r"(audio|video)\.(decoder_|mask_token)|fusion\."), {"raw", "regression"}),
    (re.compile(r"(audio|video)\.norm\."), {"inter", "intra"}),
)
"Which losses alone train the parameters of these names; the first name that fits decides, all others train the rest."


class MAViLParameters(LossesInForce, MAViLEncoderParameters):
    """The pretraining model of both stages.

    Args:
        img_size, frames, tubelet_size, audio_length, patch_size: pictures of 224 x 224 pixels, 8 of them, in tubelets of
            2 x 16 x 16; 1024 frames of sound in patches of 16 x 16 (certain).
        embed_dim, depth, num_heads, mlp_ratio, norm_layer: of both encoders, a ViT-B each; LayerNorm's eps is 1e-6
            (certain).
        decoder_embed_dim, decoder_depth, decoder_num_heads: of both decoders: 512, 8, 16 (certain or quoted).
        norm_pix_loss: raw targets are normalized by patch (likely).
        fusion, fusion_depth: 'joint', plain blocks over all tokens, two of them at pretraining (certain); or 'bottleneck'
            (quoted as a variant).
        bottleneck_tokens: of the bottleneck form, 4 (that of its own paper; MAViL's is not known).
        inter_temperature, intra_temperature: of the contrastive losses: 0.1 and 1.0 (remembered).
        pool_class_token: whether the class token is counted in the mean that is contrasted (not known; ours: no, as in the
            published classifier's mean).
        normalize_targets: whether each token of the teacher is normalized over its channels, without weights, before it is
            regressed (not known; ours: no, they passed the final norm).
        clip: what the inputs are normalized with, and the frame rate, where they are not MAViL's (sound: certain;
            pictures: ImageNet's, not known; 2 pictures per second: certain).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        frames: int = 8,
        tubelet_size: int = 2,
        audio_length: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_layer: NormLayer = LAYER_NORM,
        norm_pix_loss: bool = True,
        fusion: str = "joint",
        fusion_depth: int = 2,
        bottleneck_tokens: int = 4,
        inter_temperature: float = 0.1,
        intra_temperature: float = 1.0,
        pool_class_token: bool = False,
        normalize_targets: bool = False,
        *,
        attention: str | None = None,
        clip: ClipSpec | None = None,
        recompute: str = "none",
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__(
            img_size,
            frames,
            tubelet_size,
            audio_length,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            fusion,
            fusion_depth,
            bottleneck_tokens,
            DecoderSizes(decoder_embed_dim, decoder_depth, decoder_num_heads),
            attention,
            clip,
            recompute,
        )
        for name, value in (("inter_temperature", inter_temperature), ("intra_temperature", intra_temperature)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for m in INPUTS:
            self.add_module(f"target_pred_{m}", nn.Linear(decoder_embed_dim, embed_dim))
        self.norm_pix_loss = norm_pix_loss
        self.inter_temperature, self.intra_temperature = inter_temperature, intra_temperature
        self.pool_class_token, self.normalize_targets = pool_class_token, normalize_targets
        self.config = config | {"norm_eps": self.fusion.norm.eps}
        initialize_weights(self, *SMALL_EMBEDDINGS)

    def train_losses(self, *, raw: bool, inter: bool, intra: bool, regression: bool) -> None:
        """Says which losses are in force: what none of them reaches is frozen, and its gradient dropped.

        Plain DistributedDataParallel would wait for the gradient of such a parameter. What an earlier call froze and a
        loss now reaches is trained again; what was frozen by anyone else stays as it is. Call it before the optimizer is
        made and before the model is wrapped. A new model trains all losses. Raises ValueError when all are False.
        """
        in_force = {"raw": raw, "inter": inter, "intra": intra, "regression": regression}
        trained = {loss for loss, is_trained in in_force.items() if is_trained}

        def lost(name: str) -> bool:
            return next((not losses & trained for names, losses in TRAINED_BY if names.match(name)), False)

        self.put_in_force(in_force, lost)

    def check_losses(self, raw: float, inter: float, intra: float, regression: float) -> None:
        """ValueError when a training step would report a loss that `train_losses` took out of force."""
        weights = {"raw": raw, "inter": inter, "intra": intra, "regression": regression}
        self.check_in_force(**{loss: (f"{loss}_loss_weight", weight) for loss, weight in weights.items()})

    def check_targets(self, targets: FeatureOutput | None, batch: int) -> None:
        """ValueError unless targets are a teacher's tokens for this model and `batch` clips."""
        if targets is None:
            raise ValueError("targets is None; regression_loss_weight is not 0, so it must hold a teacher's tokens")
        for tower, name, tokens in zip(self.towers, targets._fields, targets):
            shape = [batch, tower.num_patches, tower.norm.normalized_shape[0]]
            if list(tokens.shape) != shape:
                raise ValueError(
                    f"targets.{name} has shape {list(tokens.shape)}; this model regresses {shape}: the teacher must have "
                    "its width and its patches"
                )
            if tokens.requires_grad:
                raise ValueError(f"targets.{name} requires a gradient; a teacher gets none, so pass it detached")

    def draw_masks(
        self, batch: int, views: int, device: torch.device, mask_ratio_a: float, mask_ratio_v: float
    ) -> tuple[Masking, Masking]:
        """Masks of `views` independent views of `batch` clips, view after view. Audio's noise is drawn first in each view.

        A view is drawn by itself, so that a clip's masks depend neither on the number of views nor on that of ranks.
        """
        ratios = (("mask_ratio_a", mask_ratio_a), ("mask_ratio_v", mask_ratio_v))
        drawn = [
            [tower.draw_mask(batch, ratio, device, name) for tower, (name, ratio) in zip(self.towers, ratios)]
            for _ in range(views)
        ]
        a, v = (Masking(*(torch.cat(parts) for parts in zip(*of_tower))) for of_tower in zip(*drawn))
        return a, v

    def check_removed(self, mask_ratio_a: float, mask_ratio_v: float) -> None:
        """ValueError when nothing would be removed, so that there is nothing to reconstruct."""
        for tower, m, ratio in zip(self.towers, INPUTS, (mask_ratio_a, mask_ratio_v)):
            tower.check_removed(ratio, f"mask_ratio_{m}")


class MAViLFTParameters(MAViLEncoderParameters):
    """The audio-visual classifier: both encoders, the fusion encoder, and a head for `label_dim` classes on the mean tokens
    of both modalities, without class tokens, side by side (certain). The other arguments as in `MAViLParameters`."""

    modes = ("multimodal",)
    "The one input mode that it has: for one modality alone there is `MAEFT`."

    def __init__(
        self,
        label_dim: int,
        img_size: int | tuple[int, int] = 224,
        frames: int = 8,
        tubelet_size: int = 2,
        audio_length: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = LAYER_NORM,
        fusion: str = "joint",
        fusion_depth: int = 2,
        bottleneck_tokens: int = 4,
        *,
        attention: str | None = None,
        clip: ClipSpec | None = None,
        recompute: str = "none",
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__(
            img_size,
            frames,
            tubelet_size,
            audio_length,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            fusion,
            fusion_depth,
            bottleneck_tokens,
            None,
            attention,
            clip,
            recompute,
        )
        self.mlp_head = head(label_dim, 2 * embed_dim, norm_layer)
        self.config = config | {"norm_eps": self.fusion.norm.eps}
        for tower in self.towers:  # the modalities are fused before these
            tower.norm.requires_grad_(False)
        initialize_weights(self, *SMALL_EMBEDDINGS)

    def train_with(self, mode: str) -> None:
        """ValueError unless `mode` is 'multimodal'; there is nothing to freeze."""
        check_mode(self, mode)
