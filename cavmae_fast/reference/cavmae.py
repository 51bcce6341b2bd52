"""CAV-MAE in plain PyTorch (Gong et al., ICLR 2023): the forward pass of the models, to be read beside the paper.

The parameters are in `reference.cavmae_parameters`, which the fast models of `cavmae_fast.models` share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast.reference import operators
from cavmae_fast.reference.blocks import block, embed_patches
from cavmae_fast.reference.cavmae_parameters import CAVMAEFTAudioParameters, CAVMAEFTParameters, CAVMAEParameters
from cavmae_fast.reference.encoder_parameters import EncoderParameters
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.outputs import FeatureOutput, InpaintOutput, PretrainOutput


class Encoder(EncoderParameters):
    """The encoder's parts. `attention`: 'eager', as the published code computes it, or PyTorch's 'sdpa'."""

    attentions = ("eager", "sdpa")

    def embed(self, m: str, x: Tensor) -> Tensor:
        """Input of modality `m` -> its tokens `[B, L, D]` with position and modality."""
        clip = self.clip_spec
        images = operators.normalize_images(self.images(m, x), self.norm.weight.dtype, clip.image_mean, clip.image_std)
        tokens = embed_patches(getattr(self, f"patch_embed_{m}"), images)
        return tokens + getattr(self, f"pos_embed_{m}") + getattr(self, f"modality_{m}")

    def specific(self, m: str, tokens: Tensor) -> Tensor:
        """The modality-specific blocks of `m`."""
        for parameters in getattr(self, f"blocks_{m}"):
            tokens = block(parameters, tokens, self.attention)
        return tokens

    def shared(self, tokens: Tensor, m: str | None = None) -> Tensor:
        """The shared blocks and the final norm: with the joint norms, or with those of modality `m`."""
        for parameters in self.blocks_u:
            tokens = block(parameters, tokens, self.attention, m)
        return getattr(self, f"norm_{m}" if m else "norm")(tokens)

    def features(self, m: str, x: Tensor) -> Tensor:
        """Unmasked input of modality `m` -> its normed tokens `[B, L, D]`, seen alone."""
        return self.shared(self.specific(m, self.embed(m, x)), m)


class CAVMAE(Encoder, CAVMAEParameters):
    """The pretraining model. Audio `[B, audio_length, 128]` log-mel, imgs `[B, in_chans, img_size, img_size]`.

    uint8 RGB is normalized on the way into the patch projection and the loss, with the statistics in `clip_spec`.
    Arguments as in `CAVMAEParameters`.
    """

    def encode_kept(self, audio: Tensor, imgs: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """The kept tokens `[B, K, D]` of audio and video after their modality-specific blocks."""
        a = self.specific("a", operators.take_tokens(self.embed("a", audio), masking_a.ids_keep))
        v = self.specific("v", operators.take_tokens(self.embed("v", imgs), masking_v.ids_keep))
        return a, v

    def decode(self, joint: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """Joint tokens `[B, K, D]` -> predictions for every patch, audio `[B, La, p*p]`, video `[B, Lv, p*p*C]`."""
        joint = self.decoder_embed(joint)
        batch, kept_a = joint.shape[0], masking_a.ids_keep.shape[1]
        streams = []
        for m, kept, masking in (("a", joint[:, :kept_a], masking_a), ("v", joint[:, kept_a:], masking_v)):
            removed = self.mask_token.expand(batch, masking.ids_removed.shape[1], -1).to(kept.dtype)
            tokens = operators.take_tokens(torch.cat([kept, removed], dim=1), masking.ids_restore)
            streams.append(tokens + getattr(self, f"decoder_pos_embed_{m}") + getattr(self, f"decoder_modality_{m}"))
        x = torch.cat(streams, dim=1)
        for parameters in self.decoder_blocks:
            x = block(parameters, x, self.attention)
        x = self.decoder_norm(x)
        length_a = self.patch_embed_a.num_patches
        return self.decoder_pred_a(x[:, :length_a]), self.decoder_pred_v(x[:, length_a:])

    def reconstruction_loss(self, m: str, x: Tensor, pred: Tensor, masking: Masking) -> Tensor:
        """Mean squared error on the removed patches of modality `m`, from predictions for every patch."""
        pred = operators.take_tokens(pred, masking.ids_removed)
        return operators.masked_patch_mse(
            pred,
            self.images(m, x),
            masking.ids_removed,
            self.patch_size,
            self.norm_pix_loss,
            self.clip_spec.image_mean,
            self.clip_spec.image_std,
        )

    def forward(
        self,
        audio: Tensor,
        imgs: Tensor,
        mask_ratio_a: float = 0.75,
        mask_ratio_v: float = 0.75,
        mae_loss_weight: float = 1.0,
        contrast_loss_weight: float = 0.01,
        mask_mode: str = "unstructured",
    ) -> PretrainOutput:
        """One pretraining pass."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_losses(mae_loss_weight, contrast_loss_weight)
        if mae_loss_weight != 0:
            self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(audio.shape[0], audio.device, mask_ratio_a, mask_ratio_v, mask_mode)
        a, v = self.encode_kept(audio, imgs, masking_a, masking_v)
        loss_mae = loss_mae_a = loss_mae_v = loss_c = c_acc = torch.zeros((), device=audio.device)
        if mae_loss_weight != 0:
            pred_a, pred_v = self.decode(self.shared(torch.cat([a, v], dim=1)), masking_a, masking_v)
            loss_mae_a = self.reconstruction_loss("a", audio, pred_a, masking_a)
            loss_mae_v = self.reconstruction_loss("v", imgs, pred_v, masking_v)
            loss_mae = mae_loss_weight * (loss_mae_a + loss_mae_v)
        if contrast_loss_weight != 0:
            means = self.shared(a, "a").mean(dim=1), self.shared(v, "v").mean(dim=1)
            nce, c_acc = operators.contrastive_loss(*means, bidirectional=self.bidirect_contrast)
            loss_c = contrast_loss_weight * nce
        loss = loss_mae + loss_c
        return PretrainOutput(loss, loss_mae, loss_mae_a, loss_mae_v, loss_c, masking_a.mask, masking_v.mask, c_acc)

    def forward_inpaint(
        self,
        audio: Tensor,
        imgs: Tensor,
        mask_ratio_a: float = 0.75,
        mask_ratio_v: float = 0.75,
        mask_mode: str = "unstructured",
    ) -> InpaintOutput:
        """Predictions for every patch of masked clips."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(audio.shape[0], audio.device, mask_ratio_a, mask_ratio_v, mask_mode)
        a, v = self.encode_kept(audio, imgs, masking_a, masking_v)
        pred_a, pred_v = self.decode(self.shared(torch.cat([a, v], dim=1)), masking_a, masking_v)
        loss_a = self.reconstruction_loss("a", audio, pred_a, masking_a)
        loss_v = self.reconstruction_loss("v", imgs, pred_v, masking_v)
        return InpaintOutput(pred_a, pred_v, masking_a.mask, masking_v.mask, loss_a, loss_v)

    def forward_feat(self, a: Tensor, v: Tensor) -> FeatureOutput:
        """Unmasked inputs -> normed tokens of each stream seen alone, audio `[B, La, D]` and video `[B, Lv, D]`."""
        self.check_inputs(a=a, v=v)
        return FeatureOutput(self.features("a", a), self.features("v", v))


class CAVMAEFT(Encoder, CAVMAEFTParameters):
    """The classifier: encoder and a head on the mean token. Arguments and inputs as in `CAVMAE`, with `label_dim` classes.

    `norm_pix_loss` is accepted, as in the published signature, and has no effect.
    """

    def forward(self, a: Tensor | None, v: Tensor | None, mode: str) -> Tensor:
        """Logits `[B, label_dim]`. `mode`: 'multimodal'; 'audioonly' or 'videoonly' (the modality's own norms);
        'missingaudioonly' or 'missingvideoonly' (only that modality is *there*: the mean of the joint-norm and the
        own-norm passes). The input that a mode does not use may be None."""
        inputs = self.classifier_inputs(a, v, mode)
        tokens = [self.specific(m, self.embed(m, x)) for m, x in inputs.items()]
        if mode == "multimodal":
            return self.mlp_head(self.shared(torch.cat(tokens, dim=1)).mean(dim=1))
        (m,) = inputs
        mean = self.shared(tokens[0], m).mean(dim=1)
        if mode.startswith("missing"):
            mean = (self.shared(tokens[0]).mean(dim=1) + mean) / 2
        return self.mlp_head(mean)

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "av") -> FeatureOutput | Tensor:
        """Normed tokens of each stream seen alone: both for mode 'av', audio's for 'a'."""
        features = [self.features(m, x) for m, x in self.feature_inputs(a, v, mode).items()]
        return FeatureOutput(*features) if mode == "av" else features[0]


class CAVMAEFTAudio(Encoder, CAVMAEFTAudioParameters):
    """The audio branch of a fine-tuned model alone. `forward(a)` gives tokens; `forward_pred` gives logits.

    `in_chans` and `norm_pix_loss` are accepted, as in the published signature, and have no effect.
    """

    def forward(self, a: Tensor) -> Tensor:
        """Audio `[B, audio_length, 128]` -> normed tokens `[B, La, D]`."""
        self.check_inputs(a=a)
        return self.features("a", a)

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "a") -> Tensor:
        """As `forward`; `v` and `mode` are there so that code for `CAVMAEFT` runs, and are not used."""
        return self(a)

    def forward_pred(self, a: Tensor, v: Tensor | None = None, mode: str = "audioonly") -> Tensor:
        """Logits `[B, label_dim]`; `v` and `mode` are not used, as in `forward_feat`."""
        return self.mlp_head(self(a).mean(dim=1))
