"""CAV-MAE pretraining model on packed streams: the published signature, names and numbers, computed fast.

Exact savings over the published forward: only kept patches are projected; the audio, video and joint passes of the shared
block are one pass; the first decoder block's LayerNorm and qkv see a masked token once per position, not once per clip; the
last decoder block runs for removed tokens alone; streams whose loss has weight 0 are not computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cavmae_fast.models.abilities import FillsIn, Prediction
from cavmae_fast.models.distributed import NEGATIVES, gather_rows
from cavmae_fast.models.encoder import PackedEncoder, compute_dtype
from cavmae_fast.models.packed import State, block, block_for_tokens, linear, normalize
from cavmae_fast.models.weights import Pretrained
from cavmae_fast.ops.contrastive_loss import contrastive_loss
from cavmae_fast.ops.distinct_tokens import distinct_tokens, kept_at
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse
from cavmae_fast.reference.cavmae_parameters import CAVMAEParameters
from cavmae_fast.reference.layers import Block
from cavmae_fast.reference.masking import MASK_MODES, Masking
from cavmae_fast.reference.operators import patchify, take_tokens, unpatchify
from cavmae_fast.reference.outputs import FeatureOutput, InpaintOutput, PretrainOutput, PretrainParts


class CAVMAE(Pretrained, FillsIn, PackedEncoder, CAVMAEParameters):
    """CAV-MAE for pretraining. Audio `[B, audio_length, 128]` log-mel, imgs `[B, in_chans, img_size, img_size]`.

    Images are floating-point, or uint8 RGB `[B, 3, img_size, img_size]` of any strides, in every forward function: uint8 RGB
    is normalized on the way into the patch projection and the loss, with the statistics in `clip_spec`.

    Positional arguments, defaults, what is returned and state-dict keys are the published ones. Ours, by keyword:

    - `depth`: encoder blocks in all (12), of which `modality_specific_depth` are per modality and the rest shared;
    - `attention`: back end, one of `cavmae_fast.ops.attention.BACKENDS` ('auto' takes the best that is proven here);
    - `bidirect_contrast`: the mean of both directions in the contrastive loss, instead of the published one;
    - `clip`: a `ClipSpec` with what the inputs are normalized with, where it is not CAV-MAE's;
    - `recompute`: what the backward pass forms again instead of keeping it, one of `packed.RECOMPUTE`. It is no property of
      the weights: `save_pretrained` does not note it, and it may be set at any time.

    `train_losses` says which of the two losses are in force, and so what is trained.

    Under autocast the matrix products run in autocast's dtype; the residual stream, statistics and losses in float32.
    """

    usual_mask_ratio = 0.75
    mask_modes = MASK_MODES
    negatives = "all"
    "'all': contrast with the clips of every rank, with gradient; 'rank': with this rank's alone, as published."

    def decoder_state(
        self, joint: Tensor, masking_a: Masking, masking_v: Masking, blocks: Iterable[Block], dtype: torch.dtype
    ) -> State:
        """Joint tokens `[B, K, D]` back to their places, mask tokens elsewhere, and `blocks` of the decoder over them."""
        batch, count, _ = joint.shape
        x = linear(joint.flatten(0, 1), [self.decoder_embed], StreamLayout(batch, (count,)))
        length_a = self.patch_embed_a.num_patches
        kept = kept_at(torch.cat([masking_a.ids_keep, masking_v.ids_keep + length_a], dim=1), sum(self.lengths.values()))
        positions = [getattr(self, f"decoder_pos_embed_{m}") + getattr(self, f"decoder_modality_{m}") for m in ("a", "v")]
        x = distinct_tokens(x, kept, self.mask_token.flatten(), torch.cat(positions, dim=1).squeeze(0))
        state = State(self.residual(x, dtype), None, StreamLayout(1, (len(x),)), kept=[kept])
        for one in blocks:
            state = block(state, [one], [None], dtype, self.attention, recompute=self.recompute)
        return state

    def predict(self, state: State, length_a: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The final norm and the two heads; the first `length_a` tokens of each sample are audio's."""
        (tokens,) = state.layout.streams(normalize(state, [self.decoder_norm], dtype)[1])
        predictions = []
        parts = tokens.split([length_a, tokens.shape[1] - length_a], dim=1)
        for head, part in zip((self.decoder_pred_a, self.decoder_pred_v), parts):
            layout = StreamLayout(part.shape[0], (part.shape[1],))
            predictions.append(linear(part.flatten(0, 1), [head], layout).unflatten(0, part.shape[:2]))
        return predictions[0], predictions[1]

    def decode(self, joint: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """Joint tokens `[B, K, D]` -> predictions for every patch, audio `[B, La, p*p]`, video `[B, Lv, p*p*C]`."""
        dtype = compute_dtype(self.norm.weight)
        state = self.decoder_state(joint, masking_a, masking_v, self.decoder_blocks, dtype)
        return self.predict(state, self.patch_embed_a.num_patches, dtype)

    def decode_removed(self, joint: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """As `decode`, for removed patches alone: audio `[B, Ma, p*p]`, video `[B, Mv, p*p*C]`, in `ids_removed` order."""
        dtype = compute_dtype(self.norm.weight)
        state = self.decoder_state(joint, masking_a, masking_v, self.decoder_blocks[:-1], dtype)
        removed = torch.cat([masking_a.ids_removed, masking_v.ids_removed + self.patch_embed_a.num_patches], dim=1)
        state = block_for_tokens(state, self.decoder_blocks[-1], removed, dtype, self.attention, recompute=self.recompute)
        return self.predict(state, masking_a.ids_removed.shape[1], dtype)

    def removed_loss(self, m: str, x: Tensor, pred: Tensor, masking: Masking) -> Tensor:
        """Mean squared error of `pred [B, M, p*p*C]`, the predictions for the removed patches of modality `m`."""
        return masked_patch_mse(
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
        *,
        parts: bool = False,
    ) -> PretrainOutput | PretrainParts:
        """One pretraining pass: what a loss of weight 0 needs is not computed.

        `parts`: return the embeddings in place of the contrastive loss, which asks for the clips of the whole batch:
        `contrast` computes it from the embeddings of all parts of a batch.

        Raises TypeError or ValueError, naming the argument, for inputs that do not fit, ratios that keep or remove nothing,
        and in training for the weight of a loss that `train_losses` took out of force.
        """
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_losses(mae_loss_weight, contrast_loss_weight)
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives is {self.negatives!r}; it must be one of {', '.join(NEGATIVES)}")
        reconstruct, contrast = mae_loss_weight != 0, contrast_loss_weight != 0
        if reconstruct:
            self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(audio.shape[0], audio.device, mask_ratio_a, mask_ratio_v, mask_mode)
        paths = self.draw_paths(audio.shape[0], audio.device)
        loss_mae = loss_mae_a = loss_mae_v = loss_c = c_acc = torch.zeros((), device=audio.device)
        losses, means = (), ()
        if reconstruct or contrast:
            losses, means = self.compute(audio, imgs, masking_a, masking_v, paths, reconstruct, contrast)
        if reconstruct:
            loss_mae_a, loss_mae_v = losses
            loss_mae = mae_loss_weight * (loss_mae_a + loss_mae_v)
        if parts:
            return PretrainParts(loss_mae, loss_mae_a, loss_mae_v, means)
        if contrast:
            nce, c_acc = self.contrast(*means)
            loss_c = contrast_loss_weight * nce
        loss = loss_mae + loss_c
        return PretrainOutput(loss, loss_mae, loss_mae_a, loss_mae_v, loss_c, masking_a.mask, masking_v.mask, c_acc)

    def compute(
        self,
        audio: Tensor,
        imgs: Tensor,
        masking_a: Masking,
        masking_v: Masking,
        paths: Tensor | None,
        reconstruct: bool,
        contrast: bool,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All of a pass that is heavy, and neither draws nor checks anything -> both reconstruction losses, and the mean
        token `[B, D]` of audio and of video seen alone; an empty tuple for what is not asked for."""
        ids_keep = {"a": masking_a.ids_keep, "v": masking_v.ids_keep}
        tokens = self.encode({"a": audio, "v": imgs}, ids_keep, single=contrast, joint=reconstruct, paths=paths)
        losses: tuple[Tensor, ...] = ()
        if reconstruct:
            pred_a, pred_v = self.decode_removed(tokens[None], masking_a, masking_v)
            losses = self.removed_loss("a", audio, pred_a, masking_a), self.removed_loss("v", imgs, pred_v, masking_v)
        return losses, tuple(self.mean_tokens(tokens[m]) for m in ("a", "v")) if contrast else ()

    def contrast(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, D]` of audio and video, mean tokens of each seen alone -> the contrastive loss and its accuracy,
        of all ranks or one."""
        means = [gather_rows(mean) if self.negatives == "all" else mean for mean in (a, v)]
        return contrastive_loss(*means, bidirectional=self.bidirect_contrast)

    def forward_inpaint(
        self,
        audio: Tensor,
        imgs: Tensor,
        mask_ratio_a: float = 0.75,
        mask_ratio_v: float = 0.75,
        mask_mode: str = "unstructured",
    ) -> InpaintOutput:
        """Predictions for every patch of masked clips. Raises as `forward` does for what does not fit."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(audio.shape[0], audio.device, mask_ratio_a, mask_ratio_v, mask_mode)
        ids_keep = {"a": masking_a.ids_keep, "v": masking_v.ids_keep}
        joint = self.encode({"a": audio, "v": imgs}, ids_keep, single=False, joint=True)[None]
        pred_a, pred_v = self.decode(joint, masking_a, masking_v)
        loss_a = self.removed_loss("a", audio, take_tokens(pred_a, masking_a.ids_removed), masking_a)
        loss_v = self.removed_loss("v", imgs, take_tokens(pred_v, masking_v.ids_removed), masking_v)
        return InpaintOutput(pred_a, pred_v, masking_a.mask, masking_v.mask, loss_a, loss_v)

    def fill_in(
        self, inputs: dict[str, Tensor], mask_ratio: float, mask_mode: str = "unstructured"
    ) -> dict[str, Prediction]:
        """As in `FillsIn`."""
        output = self.forward_inpaint(inputs["a"], inputs["v"], mask_ratio, mask_ratio, mask_mode)
        return {"a": Prediction(output.pred_a, output.mask_a), "v": Prediction(output.pred_v, output.mask_v)}

    def to_patches(self, m: str, x: Tensor) -> Tensor:
        """As in `FillsIn`: `[B, L, p * p * C]`."""
        return patchify(self.images(m, x), self.patch_size)

    def to_images(self, m: str, patches: Tensor) -> Tensor:
        """As in `FillsIn`."""
        channels = 1 if m == "a" else self.in_chans
        return unpatchify(patches, channels, *getattr(self, f"patch_embed_{m}").grid, self.patch_size)

    def forward_feat(self, a: Tensor, v: Tensor) -> FeatureOutput:
        """Unmasked inputs -> normed tokens of each stream seen alone, audio `[B, La, D]` and video `[B, Lv, D]`."""
        self.check_inputs(a=a, v=v)
        tokens = self.features({"a": a, "v": v})
        return FeatureOutput(tokens["a"], tokens["v"])
