"""MAViL on packed streams: both stages of pretraining, and the audio-visual classifier.

Both views and both modalities pass the encoders together: a view is more samples of its stream, a modality a stream of its
own. The two decoders are one pass of two streams. What a loss of weight 0 needs is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.models import towers
from cavmae_fast.models.abilities import Prediction
from cavmae_fast.models.distributed import NEGATIVES, gather_rows
from cavmae_fast.models.drop_path import DropPath
from cavmae_fast.models.encoder import compute_dtype, mean_tokens
from cavmae_fast.models.packed import State, block, normalize
from cavmae_fast.models.packed_towers import PackedTowers, TowersFillIn
from cavmae_fast.models.weights import Pretrained
from cavmae_fast.ops.contrastive_loss import contrastive_loss
from cavmae_fast.reference.encoder_parameters import chosen
from cavmae_fast.reference.mae_parameters import check_mode
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.mavil_encoder import MAViLEncoderParameters
from cavmae_fast.reference.mavil_parameters import MAViLFTParameters, MAViLParameters
from cavmae_fast.reference.operators import take_tokens
from cavmae_fast.reference.outputs import FeatureOutput, InpaintOutput, MAViLOutput, MAViLParts


class PackedMAViL(PackedTowers, MAViLEncoderParameters):
    """The encoders and the fusion encoder on packed streams."""

    def fuse(self, a: Tensor, v: Tensor, dtype: torch.dtype, paths: Tensor | None = None) -> list[Tensor]:
        """Encoded tokens of audio and video, `[B, 1 + K, D]`, class tokens first -> the same tokens, fused and normed.
        `paths`: what the updates of each block are multiplied by, `[depth, 2, 3, B]`: audio, video, both (None: nothing)."""
        fuse = self._fuse_jointly if self.fusion.form == "joint" else self._fuse_by_bottleneck
        return fuse([a, v], dtype, [None] * self.fusion.depth if paths is None else list(paths))

    def _fuse_jointly(self, tokens: Sequence[Tensor], dtype: torch.dtype, paths: Sequence[Tensor | None]) -> list[Tensor]:
        state = towers.pack([torch.cat([*tokens], dim=1)])
        for one, path in zip(self.fusion.blocks, paths, strict=True):
            own = None if path is None else path[:, 2:]
            state = block(state, [one], [None], dtype, self.attention, own, self.recompute)
        (joint,) = state.layout.streams(normalize(state, [self.fusion.norm], dtype)[1])
        return list(joint.split([part.shape[1] for part in tokens], dim=1))

    def _fuse_by_bottleneck(
        self, tokens: Sequence[Tensor], dtype: torch.dtype, paths: Sequence[Tensor | None]
    ) -> list[Tensor]:
        count = self.fusion.bottleneck.shape[1]
        streams, shared = list(tokens), self.fusion.bottleneck.expand(len(tokens[0]), -1, -1)
        for *blocks, path in zip(self.fusion.blocks_a, self.fusion.blocks_v, paths, strict=True):
            state = towers.pack([torch.cat([stream, shared.to(stream.dtype)], dim=1) for stream in streams])
            own = None if path is None else path[:, :2]
            state = block(state, blocks, [None, None], dtype, self.attention, own, self.recompute)
            with_shared = state.layout.streams(state.value())
            streams = [stream[:, :-count] for stream in with_shared]
            shared = (with_shared[0][:, -count:] + with_shared[1][:, -count:]) / 2
        packed = towers.pack(streams)
        return packed.layout.streams(normalize(packed, [self.fusion.norm] * 2, dtype)[1])

    def fused(self, audio: Tensor, imgs: Tensor, paths: Tensor | None = None) -> FeatureOutput:
        """Whole clips -> the fused, normed tokens of all patches, audio `[B, La, D]` and video `[B, Lv, D]`. `paths`: of
        `DropPath.draw_paths`."""
        dtype = compute_dtype(self.fusion.norm.weight)
        alone = together = None
        if paths is not None:
            alone, together = paths[: -self.fusion.depth, :, :2], paths[-self.fusion.depth :]
        state = towers.whole(self.towers, [audio, imgs], self.clip_spec, dtype, self.attention, self.recompute, alone)
        a, v = self.fuse(*state.layout.streams(state.value()), dtype, together)
        return FeatureOutput(a[:, 1:], v[:, 1:])


class LossWeights(NamedTuple):
    """The weights of MAViL's four losses."""

    raw: float
    inter: float
    intra: float
    regression: float

    @property
    def in_force(self) -> dict[str, bool]:
        """Which losses have a weight, as `train_losses` takes it."""
        return {loss: weight != 0 for loss, weight in self._asdict().items()}


class MAViL(Pretrained, TowersFillIn, PackedMAViL, MAViLParameters):
    """MAViL for pretraining. Audio `[B, audio_length, 128]` log-mel, imgs `[B, frames, 3, H, W]`, floating-point or uint8
    RGB, which is normalized on the way with the statistics in `clip_spec`.

    Arguments as in `MAViLParameters`, which says how certain each default is, and two that are no property of the weights:
    `attention`, the back end, one of `cavmae_fast.ops.attention.BACKENDS` ('auto' takes the best that is proven here), and
    `recompute`, what the backward pass forms again instead of keeping it, one of `packed.RECOMPUTE`, as in `CAVMAE`.

    Stage 1 reconstructs the pixels of removed patches. In stage 2 a frozen model of stage 1, or of an earlier round of
    stage 2, is the teacher: `teacher.targets(audio, imgs)` are its fused tokens of the whole clip, and the student
    regresses them at the removed places. `train_losses` says which losses are in force, and so what is trained.

    Under autocast the matrix products run in autocast's dtype; the residual stream, statistics and losses in float32.
    """

    negatives = "all"
    "'all': contrast with the clips of every rank, with gradient; 'rank': with this rank's alone."

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
        *,
        parts: bool = False,
    ) -> MAViLOutput | MAViLParts:
        """One pretraining pass.

        Args:
            audio, imgs: the clips.
            targets: what a teacher's `targets` gave for the same clips; needed where they are regressed.
            mask_ratio_a, mask_ratio_v: share of the patches that is removed, 0.8 each (certain).
            raw_loss_weight, inter_loss_weight, intra_loss_weight: of the reconstruction of pixels, of the contrast between
                audio and video and of that between two masked views of each: 1, 0.1 and 0.01 (remembered).
            regression_loss_weight: of the regression of a teacher's tokens. Stage 2 takes 1 and 0 for raw_loss_weight (the
                scheme is certain, the 1 remembered).
            parts: return the embeddings in place of the contrastive losses, which ask for the clips of the whole batch:
                `contrast` computes these from the embeddings of all parts of a batch.

        Raises TypeError or ValueError, naming the argument, for inputs and targets that do not fit, ratios that keep
        nothing or leave nothing to reconstruct, and in training for the weight of a loss that is out of force.
        """
        weights = LossWeights(raw_loss_weight, inter_loss_weight, intra_loss_weight, regression_loss_weight)
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_losses(*weights)
        # With nothing to reconstruct there is nothing to regress either: a loss of 0, which is right and not an error.
        if weights.raw != 0 or (weights.regression != 0 and (mask_ratio_a, mask_ratio_v) != (0, 0)):
            self.check_removed(mask_ratio_a, mask_ratio_v)
        if weights.regression != 0:
            self.check_targets(targets, len(audio))
        views = 2 if weights.intra != 0 else 1
        maskings = self.draw_masks(len(audio), views, audio.device, mask_ratio_a, mask_ratio_v)
        zero = torch.zeros((), device=audio.device)
        raws, regressions, embeddings = (zero, zero), (zero, zero), ()
        if any(weight != 0 for weight in weights):
            raw, inter, intra, regression = (weight != 0 for weight in weights)
            raws, regressions, embeddings = self.compute(
                audio, imgs, targets, maskings, raw=raw, contrast=inter or intra, regression=regression
            )
        loss_raw, loss_regression = weights.raw * sum(raws), weights.regression * sum(regressions)
        if parts:
            return MAViLParts(loss_raw, *raws, loss_regression, embeddings)
        inter, intra, c_acc = self.contrast(embeddings, weights) if embeddings else (zero, zero, zero)
        loss_inter, loss_intra = weights.inter * inter, weights.intra * intra
        masks = [masking.mask[: len(audio)] for masking in maskings]
        loss = loss_raw + loss_inter + loss_intra + loss_regression
        return MAViLOutput(loss, loss_raw, *raws, loss_inter, loss_intra, loss_regression, *masks, c_acc)

    def compute(
        self,
        audio: Tensor,
        imgs: Tensor,
        targets: FeatureOutput | None,
        maskings: Sequence[Masking],
        *,
        raw: bool,
        contrast: bool,
        regression: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """All of a pass that is heavy, and neither draws nor checks anything -> the errors of reconstruction and those of
        regression, of audio and of video, and the embeddings, as `contrast` takes them; zeros, and an empty tuple, for what
        is not asked for."""
        dtype = compute_dtype(self.fusion.norm.weight)
        zero = torch.zeros((), device=audio.device)
        raws, regressions, embeddings = (zero, zero), (zero, zero), ()
        ids_keep = [masking.ids_keep for masking in maskings]
        state = towers.encode(self.towers, [audio, imgs], ids_keep, self.clip_spec, dtype, self.attention, self.recompute)
        if contrast:
            x, tokens = towers.normed(self.towers, state, dtype)
            embeddings = self.pool(tokens, len(audio))
            state = State(x, None, state.layout)
        if raw or regression:
            first = [Masking(*(part[: len(audio)] for part in masking)) for masking in maskings]
            encoded = [stream[: len(audio)] for stream in state.layout.streams(state.value())]
            decoded = self.decode_removed(encoded, first, dtype)
            if raw:
                raws = self.raw_losses([audio, imgs], decoded, first)
            if regression:
                regressions = self.regression_losses(decoded, targets, first)
        return raws, regressions, embeddings

    def decode_removed(self, encoded: Sequence[Tensor], maskings: Sequence[Masking], dtype: torch.dtype) -> list[Tensor]:
        """Encoded tokens `[B, 1 + K, D]` -> what the decoders make of them for the removed patches, `[B, M, width]`; nothing
        where nothing is removed."""
        if all(masking.ids_removed.shape[1] == 0 for masking in maskings):
            return []
        return towers.decode_removed(
            self.towers, self.fuse(*encoded, dtype), maskings, dtype, self.attention, self.recompute
        )

    def raw_losses(
        self, inputs: Sequence[Tensor], decoded: Sequence[Tensor], maskings: Sequence[Masking]
    ) -> tuple[Tensor, Tensor]:
        """The mean squared errors on the removed patches of audio and of video."""
        losses = []
        for tower, x, tokens, masking in zip(self.towers, inputs, decoded, maskings):
            pred = towers.predict(tower.decoder_pred, tokens)
            losses.append(towers.removed_loss(tower, x, pred, masking, self.norm_pix_loss, self.clip_spec))
        return losses[0], losses[1]

    def regression_losses(
        self, decoded: Sequence[Tensor], targets: FeatureOutput, maskings: Sequence[Masking]
    ) -> tuple[Tensor, Tensor]:
        """The mean squared errors, of audio and of video, against the teacher's tokens at the removed places; 0 where
        nothing is removed."""
        losses = [torch.zeros((), device=targets.audio.device)] * 2
        heads = self.target_pred_a, self.target_pred_v
        for number, (tokens, target, masking, head) in enumerate(zip(decoded, targets, maskings, heads)):
            pred = towers.predict(head, tokens)
            exact = torch.promote_types(pred.dtype, torch.float32)
            want = take_tokens(target, masking.ids_removed).to(exact)
            if self.normalize_targets:
                want = F.layer_norm(want, want.shape[-1:], eps=1e-6)
            losses[number] = F.mse_loss(pred.to(exact), want)
        return losses[0], losses[1]

    def pool(self, tokens: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
        """Normed tokens `[views * batch, 1 + K, D]` of audio and of video -> the mean token `[batch, D]` of each view of
        audio, then of each of video."""
        first = 0 if self.pool_class_token else 1
        means = [mean_tokens(part[:, first:], self.fusion.norm.weight) for part in tokens]
        return tuple(view for mean in means for view in mean.split(batch))

    def contrast(self, embeddings: Sequence[Tensor], weights: LossWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings `[B, D]` of each view of audio, then of each of video -> the inter-modal and the intra-modal
        contrastive loss, and the inter-modal accuracy, of all ranks or one; 0 for a loss whose weight is 0."""
        chosen("negatives", self.negatives, NEGATIVES)
        pooled = torch.cat([*embeddings], dim=1)  # one exchange for all of them
        if self.negatives == "all":
            pooled = gather_rows(pooled)
        width = embeddings[0].shape[1]
        audio, video = (part.split(width, dim=1) for part in pooled.chunk(2, dim=1))
        inter = intra = accuracy = torch.zeros((), device=pooled.device)
        if weights.inter != 0:
            inter, accuracy = contrastive_loss(audio[0], video[0], self.inter_temperature, bidirectional=True)
        if weights.intra != 0:
            both = [contrastive_loss(*pair, self.intra_temperature, bidirectional=True)[0] for pair in (audio, video)]
            intra = (both[0] + both[1]) / 2
        return inter, intra, accuracy

    @torch.no_grad()
    def targets(self, audio: Tensor, imgs: Tensor) -> FeatureOutput:
        """What a student regresses when this model is its teacher: the fused tokens of all patches of whole clips, audio
        `[B, La, D]` and video `[B, Lv, D]`, without gradient. No decoder is run."""
        self.check_inputs(audio=audio, imgs=imgs)
        return self.fused(audio, imgs)

    def forward_inpaint(
        self, audio: Tensor, imgs: Tensor, mask_ratio_a: float = 0.8, mask_ratio_v: float = 0.8
    ) -> InpaintOutput:
        """Predictions for every patch of masked clips. Raises as `forward` does for what does not fit."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_removed(mask_ratio_a, mask_ratio_v)
        maskings = self.draw_masks(len(audio), 1, audio.device, mask_ratio_a, mask_ratio_v)
        dtype = compute_dtype(self.fusion.norm.weight)
        ids_keep = [masking.ids_keep for masking in maskings]
        state = towers.encode(self.towers, [audio, imgs], ids_keep, self.clip_spec, dtype, self.attention, self.recompute)
        tokens = self.fuse(*state.layout.streams(state.value()), dtype)
        decoded = towers.decode(self.towers, tokens, maskings, dtype, self.attention, self.recompute)
        pred = [towers.predict(tower.decoder_pred, part) for tower, part in zip(self.towers, decoded)]
        losses = []
        for tower, x, part, masking in zip(self.towers, (audio, imgs), pred, maskings):
            removed = take_tokens(part, masking.ids_removed)
            losses.append(towers.removed_loss(tower, x, removed, masking, self.norm_pix_loss, self.clip_spec))
        return InpaintOutput(*pred, *(masking.mask for masking in maskings), *losses)

    def fill_in(
        self, inputs: dict[str, Tensor], mask_ratio: float, mask_mode: str = "unstructured"
    ) -> dict[str, Prediction]:
        """As in `FillsIn`."""
        output = self.forward_inpaint(inputs["a"], inputs["v"], mask_ratio, mask_ratio)
        return {"a": Prediction(output.pred_a, output.mask_a), "v": Prediction(output.pred_v, output.mask_v)}

    def forward_feat(self, a: Tensor, v: Tensor) -> FeatureOutput:
        """Whole clips -> normed tokens of all patches of each modality seen alone, `[B, La, D]` and `[B, Lv, D]`."""
        self.check_inputs(a=a, v=v)
        tokens = self.features({"a": a, "v": v})
        return FeatureOutput(tokens["a"], tokens["v"])


class MAViLFT(Pretrained, DropPath, PackedMAViL, MAViLFTParameters):
    """The audio-visual classifier: both encoders, the fusion encoder, and a head on the mean tokens of both modalities.

    Arguments as in `MAViL`, with `label_dim` classes and no decoder, and the attribute `drop_path` as in `CAVMAEFT`. For one
    modality alone: `MAEFT`.
    """

    def forward(self, a: Tensor, v: Tensor, mode: str = "multimodal") -> Tensor:
        """Logits `[B, label_dim]` from sound and pictures. Raises TypeError or ValueError, naming the argument, for inputs
        that do not fit, and for another mode."""
        check_mode(self, mode)
        self.check_inputs(a=a, v=v)
        return self.compute(a, v, self.draw_paths(len(a), a.device))

    def compute(self, a: Tensor, v: Tensor, paths: Tensor | None) -> Tensor:
        """All of a pass that is heavy, and neither draws nor checks anything -> logits `[B, label_dim]`."""
        means = [mean_tokens(tokens, self.fusion.norm.weight) for tokens in self.fused(a, v, paths)]
        return self.mlp_head(torch.cat(means, dim=1).to(self.fusion.norm.weight.dtype))

    @property
    def depth(self) -> int:
        """Blocks that a token passes."""
        return len(self.audio.blocks) + self.fusion.depth
