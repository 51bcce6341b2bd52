"""The parameters of the CAV-MAE models (Gong et al., ICLR 2023): pretraining, fine-tuned and audio-only, without a forward.

Names and shapes are those of the published checkpoints. `reference.cavmae` computes with them in plain PyTorch,
`cavmae_fast.models` fast.
"""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.reference import operators
from cavmae_fast.reference.encoder_parameters import EncoderParameters, check_heads, constructor_arguments, positions
from cavmae_fast.reference.freezing import LossesInForce
from cavmae_fast.reference.layers import ModalityBlock, NormLayer
from cavmae_fast.reference.masking import Masking, kept_tokens, random_masking

MODES = {"multimodal": "av", "audioonly": "a", "videoonly": "v", "missingaudioonly": "a", "missingvideoonly": "v"}
"What a classifier is told to use of a clip, and the modalities that this is."
ONLY_RECONSTRUCTION = re.compile(r"decoder_|mask_token|norm\.|blocks_u\.\d+\.norm[12]\.")
"Names of the parameters that the reconstruction loss alone trains: the decoder, and the norms of the joint stream."
ONLY_CONTRAST = re.compile(r"norm_[av]\.|blocks_u\.\d+\.norm[12]_[av]\.")
"Names of the parameters that the contrastive loss alone trains: the norms of audio and video seen alone."
OF_MODALITY = {
    m: re.compile(rf"(patch_embed|modality|pos_embed|blocks|norm)_{m}(\.|$)|blocks_u\.\d+\.norm[12]_{m}\.") for m in "av"
}
"Names of the parameters that see one modality alone."
OF_JOINT = re.compile(r"norm\.|blocks_u\.\d+\.norm[12]\.")
"Names of the norms of the joint stream."


class CAVMAEParameters(LossesInForce, EncoderParameters):
    """The pretraining model: encoder, decoder, and which of their parameters are trained.

    Arguments and defaults are the published ones; `depth` (encoder blocks in all, 12 there), `attention`,
    `bidirect_contrast` (the mean of both directions in the contrastive loss), `clip` (what the inputs are normalized
    with, where it is not CAV-MAE's statistics) and `recompute` (what the backward pass forms again) are ours.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        audio_length: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        modality_specific_depth: int = 11,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = nn.LayerNorm,
        norm_pix_loss: bool = False,
        tr_pos: bool = False,
        *,
        depth: int = 12,
        attention: str | None = None,
        bidirect_contrast: bool = False,
        clip: ClipSpec | None = None,
        recompute: str = "none",
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__(
            img_size,
            audio_length,
            patch_size,
            in_chans,
            embed_dim,
            modality_specific_depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            tr_pos,
            depth,
            attention,
            clip,
            recompute,
        )
        check_heads("decoder_num_heads", decoder_num_heads, "decoder_embed_dim", decoder_embed_dim)
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth is {decoder_depth}; it must be at least 1")
        width = decoder_embed_dim
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_modality_a = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_modality_v = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_a = positions(width, self.patch_embed_a.grid, tr_pos)
        self.decoder_pos_embed_v = positions(width, self.patch_embed_v.grid, tr_pos)
        self.decoder_blocks = nn.ModuleList(
            ModalityBlock(width, decoder_num_heads, mlp_ratio, norm_layer) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(width)
        self.decoder_pred_a = nn.Linear(width, patch_size**2)
        self.decoder_pred_v = nn.Linear(width, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        self.bidirect_contrast = bidirect_contrast
        self.config = config | {"norm_eps": self.norm.eps}
        self.initialize_weights()
        self.freeze_modality_norms(self.blocks_a, self.blocks_v, self.decoder_blocks)

    def train_losses(self, *, reconstruction: bool, contrast: bool) -> None:
        """Says which losses are in force: what none of them reaches is frozen, and its gradient dropped.

        What that means for other calls: `freeze_unreached`. Call it before the optimizer is made and before the model is
        wrapped. A new model trains both losses.

        Raises ValueError when both are False.
        """
        patterns = [ONLY_RECONSTRUCTION] * (not reconstruction) + [ONLY_CONTRAST] * (not contrast)
        in_force = {"reconstruction": reconstruction, "contrast": contrast}
        self.put_in_force(in_force, lambda name: any(pattern.match(name) for pattern in patterns))

    def check_losses(self, mae_loss_weight: float, contrast_loss_weight: float) -> None:
        """ValueError when a training step would report a loss that `train_losses` took out of force."""
        self.check_in_force(
            reconstruction=("mae_loss_weight", mae_loss_weight), contrast=("contrast_loss_weight", contrast_loss_weight)
        )

    @staticmethod
    def patchify(imgs: Tensor, c: int, h: int, w: int, p: int = 16) -> Tensor:
        """imgs `[B, c, h*p, w*p]` -> patches `[B, h*w, p*p*c]`, each in (row, column, channel) order."""
        if tuple(imgs.shape[1:]) != (c, h * p, w * p):
            raise ValueError(f"imgs has shape {list(imgs.shape)}; c, h, w and p ask for [B, {c}, {h * p}, {w * p}]")
        return operators.patchify(imgs, p)

    @staticmethod
    def unpatchify(x: Tensor, c: int, h: int, w: int, p: int = 16) -> Tensor:
        """The inverse of `patchify`: x `[B, h*w, p*p*c]` -> `[B, c, h*p, w*p]`."""
        if tuple(x.shape[1:]) != (h * w, p * p * c):
            raise ValueError(f"x has shape {list(x.shape)}; c, h, w and p ask for [B, {h * w}, {p * p * c}]")
        return operators.unpatchify(x, c, h, w, p)

    def draw_masks(
        self, batch: int, device: torch.device, mask_ratio_a: float, mask_ratio_v: float, mask_mode: str
    ) -> tuple[Masking, Masking]:
        """The masks of audio and video. Audio's noise is drawn first; video is always masked without structure."""
        kept_tokens(self.patch_embed_v.num_patches, mask_ratio_v, "mask_ratio_v")  # raises before anything is drawn
        masking_a = random_masking(batch, self.patch_embed_a.grid, mask_ratio_a, device, mask_mode, "mask_ratio_a")
        masking_v = random_masking(batch, self.patch_embed_v.grid, mask_ratio_v, device, name="mask_ratio_v")
        return masking_a, masking_v

    def check_removed(self, mask_ratio_a: float, mask_ratio_v: float) -> None:
        """ValueError when nothing would be removed, so that there is nothing to reconstruct."""
        for m, ratio in (("a", mask_ratio_a), ("v", mask_ratio_v)):
            name, length = f"mask_ratio_{m}", getattr(self, f"patch_embed_{m}").num_patches
            if kept_tokens(length, ratio, name) == length:
                raise ValueError(f"{name} is {ratio}, which removes none of {length} patches; it must remove at least one")


class ClassifierParameters(EncoderParameters):
    """Encoder, and a head on the mean token for `label_dim` classes; the other arguments as in `CAVMAEParameters`.

    `norm_pix_loss` is accepted, as in the published signature, and has no effect.
    """

    modes: ClassVar[tuple[str, ...]] = tuple(MODES)
    "The input modes that the class has."

    def __init__(
        self,
        label_dim: int,
        img_size: int | tuple[int, int] = 224,
        audio_length: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        modality_specific_depth: int = 11,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = nn.LayerNorm,
        norm_pix_loss: bool = False,
        tr_pos: bool = True,
        *,
        depth: int = 12,
        attention: str | None = None,
        clip: ClipSpec | None = None,
        recompute: str = "none",
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__(
            img_size,
            audio_length,
            patch_size,
            in_chans,
            embed_dim,
            modality_specific_depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            tr_pos,
            depth,
            attention,
            clip,
            recompute,
        )
        if label_dim < 1:
            raise ValueError(f"label_dim is {label_dim}; it must be at least 1")
        self.mlp_head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, label_dim))
        self.config = config | {"norm_eps": self.norm.eps}
        self.initialize_weights()
        self.freeze_modality_norms(*(getattr(self, f"blocks_{m}") for m in self.modalities))

    def train_with(self, mode: str) -> None:
        """Says in which input mode the classifier is trained: what that does not reach is frozen, see `freeze_unreached`.

        Call it before the optimizer is made and before the model is wrapped. Raises ValueError for a mode that is not known,
        or that this class does not have.
        """
        if mode not in self.modes:
            raise ValueError(f"mode is {mode!r}; for {type(self).__name__} it must be one of {', '.join(self.modes)}")
        if mode == "multimodal":
            patterns = [ONLY_CONTRAST]
        else:
            patterns = [pattern for m, pattern in OF_MODALITY.items() if m != MODES[mode]]
            patterns += [OF_JOINT] * (not mode.startswith("missing"))
        self.freeze_unreached(lambda name: any(pattern.match(name) for pattern in patterns))


class CAVMAEFTParameters(ClassifierParameters):
    """The audio-visual classifier."""

    def classifier_inputs(self, a: Tensor | None, v: Tensor | None, mode: str) -> dict[str, Tensor]:
        """The inputs that `mode` uses, by modality. Raises ValueError or TypeError unless `mode` is known and they are
        there and fit."""
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        inputs = {m: x for m, x in (("a", a), ("v", v)) if m in MODES[mode]}
        for m, x in inputs.items():
            if x is None:
                raise ValueError(f"mode {mode!r} uses the input {m}, which is None")
        self.check_inputs(**inputs)
        return inputs

    def feature_inputs(self, a: Tensor, v: Tensor | None, mode: str) -> dict[str, Tensor]:
        """The inputs whose features `mode` asks for, by modality: both for 'av', audio for 'a'. Raises as above."""
        if mode not in ("av", "a"):
            raise ValueError(f"mode is {mode!r}; it must be 'av' or 'a'")
        inputs = {"a": a, "v": v} if mode == "av" else {"a": a}
        self.check_inputs(**inputs)
        return inputs


class CAVMAEFTAudioParameters(ClassifierParameters):
    """The audio branch of the classifier alone. `in_chans` is accepted too, and has no effect."""

    modalities = "a"
    modes = ("audioonly",)
