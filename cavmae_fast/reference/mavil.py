"""MAViL in plain PyTorch (Huang et al., NeurIPS 2023), written from the paper's description, to be read beside it.

Every view of every modality is encoded by itself, every patch is decoded: what the fast model does at once or leaves out is
written out here. The parameters are in `reference.mavil_parameters`, which the fast models share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.reference import operators
from cavmae_fast.reference.blocks import block
from cavmae_fast.reference.mae import decode, encode, reconstruction_loss
from cavmae_fast.reference.mae_parameters import check_mode
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.mavil_encoder import MAViLEncoderParameters
from cavmae_fast.reference.mavil_parameters import MAViLFTParameters, MAViLParameters
from cavmae_fast.reference.outputs import FeatureOutput, InpaintOutput, MAViLOutput


class Encoder(MAViLEncoderParameters):
    """`attention`: 'eager', scores written out, or PyTorch's 'sdpa'."""

    attentions = ("eager", "sdpa")

    def encode(self, m: str, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Input of modality `m` -> its tokens `[B, 1 + K, D]`, the class token's first, not yet normed."""
        tower = self.audio if m == "a" else self.video
        return encode(tower, x, ids_keep, self.clip_spec, self.attention)

    def fuse(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of both modalities -> the same tokens, fused and normed."""
        fusion, length = self.fusion, a.shape[1]
        if fusion.form == "joint":
            joint = torch.cat([a, v], dim=1)
            for parameters in fusion.blocks:
                joint = block(parameters, joint, self.attention)
            joint = fusion.norm(joint)
            return joint[:, :length], joint[:, length:]
        shared = fusion.bottleneck.expand(len(a), -1, -1)
        for block_a, block_v in zip(fusion.blocks_a, fusion.blocks_v):
            with_a = block(block_a, torch.cat([a, shared], dim=1), self.attention)
            with_v = block(block_v, torch.cat([v, shared], dim=1), self.attention)
            a, v = with_a[:, :length], with_v[:, : v.shape[1]]
            shared = (with_a[:, length:] + with_v[:, v.shape[1] :]) / 2
        return fusion.norm(a), fusion.norm(v)

    def fused(self, audio: Tensor, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Whole clips -> the fused tokens of all patches, audio `[B, La, D]` and video `[B, Lv, D]`."""
        a, v = self.fuse(self.encode("a", audio), self.encode("v", imgs))
        return a[:, 1:], v[:, 1:]


class MAViL(Encoder, MAViLParameters):
    """The pretraining model of both stages. Arguments as in `MAViLParameters`."""

    def forward(
        self,
        audio: Tensor,
        imgs: Tensor,
        targets: FeatureOutput | None = None,
        mask_ratio_a: float = 0.8,
        mask_ratio_v: float = 0.8,
        raw_loss_weight: float = 1.0,
        inter_loss_weight: float = 0.1,
        intra_loss_weight: float = 0.01,
        regression_loss_weight: float = 0.0,
    ) -> MAViLOutput:
        """One pretraining pass; `targets`: a teacher's tokens of the same clips, in stage 2."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_losses(raw_loss_weight, inter_loss_weight, intra_loss_weight, regression_loss_weight)
        # With nothing to reconstruct there is nothing to regress either: a loss of 0, which is right and not an error.
        if raw_loss_weight != 0 or (regression_loss_weight != 0 and (mask_ratio_a, mask_ratio_v) != (0, 0)):
            self.check_removed(mask_ratio_a, mask_ratio_v)
        if regression_loss_weight != 0:
            self.check_targets(targets, len(audio))
        views = 2 if intra_loss_weight != 0 else 1
        masking_a, masking_v = self.draw_masks(len(audio), views, audio.device, mask_ratio_a, mask_ratio_v)
        masks_a, masks_v = view_by_view(masking_a, views), view_by_view(masking_v, views)
        tokens_a = [self.encode("a", audio, masking.ids_keep) for masking in masks_a]
        tokens_v = [self.encode("v", imgs, masking.ids_keep) for masking in masks_v]
        zero = torch.zeros((), device=audio.device)
        raw_a = raw_v = inter = intra = regression = c_acc = zero
        if raw_loss_weight != 0 or regression_loss_weight != 0:
            a, v = self.fuse(tokens_a[0], tokens_v[0])
            a = decode(self.audio, a, masks_a[0], self.attention)
            v = decode(self.video, v, masks_v[0], self.attention)
        if raw_loss_weight != 0:
            raw_a = self.raw_loss("a", audio, self.audio.decoder_pred(a), masks_a[0])
            raw_v = self.raw_loss("v", imgs, self.video.decoder_pred(v), masks_v[0])
        if regression_loss_weight != 0:
            parts = ((a, masks_a[0], targets.audio, self.target_pred_a), (v, masks_v[0], targets.video, self.target_pred_v))
            regression = sum(self.regression_loss(*part) for part in parts)
        means_a = [self.pool(self.audio.norm(tokens)) for tokens in tokens_a]
        means_v = [self.pool(self.video.norm(tokens)) for tokens in tokens_v]
        if inter_loss_weight != 0:
            inter, c_acc = operators.contrastive_loss(means_a[0], means_v[0], self.inter_temperature, bidirectional=True)
        if intra_loss_weight != 0:
            each = [
                operators.contrastive_loss(*m, self.intra_temperature, bidirectional=True)[0] for m in (means_a, means_v)
            ]
            intra = (each[0] + each[1]) / 2
        raw = raw_loss_weight * (raw_a + raw_v)
        inter, intra = inter_loss_weight * inter, intra_loss_weight * intra
        regression = regression_loss_weight * regression
        loss = raw + inter + intra + regression
        masks = masks_a[0].mask, masks_v[0].mask
        return MAViLOutput(loss, raw, raw_a, raw_v, inter, intra, regression, *masks, c_acc)

    def pool(self, tokens: Tensor) -> Tensor:
        """Normed tokens `[B, 1 + K, D]` of one modality -> their mean."""
        return (tokens if self.pool_class_token else tokens[:, 1:]).mean(dim=1)

    def raw_loss(self, m: str, x: Tensor, pred: Tensor, masking: Masking) -> Tensor:
        """Mean squared error on the removed patches of modality `m`."""
        tower = self.audio if m == "a" else self.video
        return reconstruction_loss(tower, x, pred, masking, self.norm_pix_loss, self.clip_spec)

    def regression_loss(self, decoded: Tensor, masking: Masking, targets: Tensor, head: torch.nn.Linear) -> Tensor:
        """Mean squared error between `head` of the decoded tokens and the teacher's tokens at the removed places; 0 where
        nothing is removed."""
        want = operators.take_tokens(targets, masking.ids_removed).to(decoded.dtype)
        if self.normalize_targets:
            want = F.layer_norm(want, want.shape[-1:], eps=1e-6)
        errors = head(operators.take_tokens(decoded, masking.ids_removed)) - want
        return errors.square().sum() / max(1, errors.numel())

    @torch.no_grad()
    def targets(self, audio: Tensor, imgs: Tensor) -> FeatureOutput:
        """What a student regresses when this model is its teacher: the fused tokens of all patches of whole clips."""
        self.check_inputs(audio=audio, imgs=imgs)
        return FeatureOutput(*self.fused(audio, imgs))

    def forward_inpaint(
        self, audio: Tensor, imgs: Tensor, mask_ratio_a: float = 0.8, mask_ratio_v: float = 0.8
    ) -> InpaintOutput:
        """Predictions for every patch of masked clips."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(len(audio), 1, audio.device, mask_ratio_a, mask_ratio_v)
        a, v = self.fuse(self.encode("a", audio, masking_a.ids_keep), self.encode("v", imgs, masking_v.ids_keep))
        pred_a = self.audio.decoder_pred(decode(self.audio, a, masking_a, self.attention))
        pred_v = self.video.decoder_pred(decode(self.video, v, masking_v, self.attention))
        loss_a, loss_v = self.raw_loss("a", audio, pred_a, masking_a), self.raw_loss("v", imgs, pred_v, masking_v)
        return InpaintOutput(pred_a, pred_v, masking_a.mask, masking_v.mask, loss_a, loss_v)

    def forward_feat(self, a: Tensor, v: Tensor) -> FeatureOutput:
        """Whole clips -> normed tokens of all patches of each modality seen alone, `[B, La, D]` and `[B, Lv, D]`."""
        self.check_inputs(a=a, v=v)
        tokens_a, tokens_v = self.audio.norm(self.encode("a", a)), self.video.norm(self.encode("v", v))
        return FeatureOutput(tokens_a[:, 1:], tokens_v[:, 1:])


class MAViLFT(Encoder, MAViLFTParameters):
    """The audio-visual classifier."""

    def forward(self, a: Tensor, v: Tensor, mode: str = "multimodal") -> Tensor:
        """Logits `[B, label_dim]`."""
        check_mode(self, mode)
        self.check_inputs(a=a, v=v)
        means = [tokens.mean(dim=1) for tokens in self.fused(a, v)]
        return self.mlp_head(torch.cat(means, dim=1))


def view_by_view(masking: Masking, views: int) -> list[Masking]:
    """The masks of each of `views` views, which lie one after the other."""
    return [Masking(*parts) for parts in zip(*(tensor.chunk(views) for tensor in masking))]
