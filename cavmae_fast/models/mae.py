"""Single-modality masked autoencoders on packed streams: A-MAE and V-MAE, and the classifier that is made of one."""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast.models import towers
from cavmae_fast.models.abilities import Prediction
from cavmae_fast.models.drop_path import DropPath
from cavmae_fast.models.encoder import compute_dtype, mean_tokens
from cavmae_fast.models.packed_towers import PackedTowers, TowersFillIn
from cavmae_fast.models.weights import Pretrained
from cavmae_fast.reference.mae_parameters import MAEFTParameters, MAEParameters
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.operators import take_tokens
from cavmae_fast.reference.outputs import MAEInpaintOutput, MAEOutput
from cavmae_fast.reference.tower import Tower


class PackedTower(PackedTowers, Tower):
    """A tower by itself: one stream."""

    @property
    def towers(self) -> tuple[Tower]:
        return (self,)

    def forward_feat(self, x: Tensor) -> Tensor:
        """Unmasked inputs -> the normed tokens of all patches, `[B, L, D]`."""
        self.check_input("x", x)
        return self.features({self.modality: x})[self.modality]

    def check_inputs(self, **inputs: Tensor) -> None:
        """TypeError or ValueError, naming the argument, unless each of `inputs` is one of this tower."""
        for name, x in inputs.items():
            self.check_input(name, x)


class MAE(Pretrained, TowersFillIn, PackedTower, MAEParameters):
    """A masked autoencoder of one modality, for pretraining; state-dict keys are those of published image and audio MAEs.

    Args:
        modality: 'a': x is log-mel sound `[B, audio_length, 128]`. 'v': x is pictures `[B, frames, 3, H, W]`, floating-point
            or uint8 RGB, which is normalized on the way with the statistics in `clip_spec`; with `frames` 1, an image MAE of
            pictures `[B, 3, H, W]`.
        img_size, frames, tubelet_size, audio_length, patch_size: of the inputs and their patches.
        embed_dim, depth, num_heads, mlp_ratio, norm_layer: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        norm_pix_loss: true patches are normalized, each by itself.
        attention: back end, one of `cavmae_fast.ops.attention.BACKENDS` ('auto' takes the best that is proven here).
        clip: a `ClipSpec` with what the inputs are normalized with, where it is not MAViL's.
        recompute: what the backward pass forms again instead of keeping it, one of `packed.RECOMPUTE`, as in `CAVMAE`.

    Under autocast the matrix products run in autocast's dtype; the residual stream, statistics and losses in float32.
    """

    def forward(self, x: Tensor, mask_ratio: float = 0.8) -> MAEOutput:
        """One pretraining pass. Raises TypeError or ValueError for inputs that do not fit and ratios that keep or remove
        nothing."""
        self.check_input("x", x)
        self.check_removed(mask_ratio, "mask_ratio")
        masking = self.draw_mask(len(x), mask_ratio, x.device, "mask_ratio")
        return MAEOutput(self.compute(x, masking), masking.mask)

    def compute(self, x: Tensor, masking: Masking) -> Tensor:
        """All of a pass that is heavy, and neither draws nor checks anything: the loss."""
        dtype, tokens = self._encoded(x, masking)
        (decoded,) = towers.decode_removed([self], tokens, [masking], dtype, self.attention, self.recompute)
        pred = towers.predict(self.decoder_pred, decoded)
        return towers.removed_loss(self, x, pred, masking, self.norm_pix_loss, self.clip_spec)

    def _encoded(self, x: Tensor, masking: Masking) -> tuple[torch.dtype, list[Tensor]]:
        """The dtype of the products, and the normed tokens of the kept patches, class token first."""
        dtype = compute_dtype(self.norm.weight)
        state = towers.encode([self], [x], [masking.ids_keep], self.clip_spec, dtype, self.attention, self.recompute)
        return dtype, towers.normed([self], state, dtype)[1]

    def forward_inpaint(self, x: Tensor, mask_ratio: float = 0.8) -> MAEInpaintOutput:
        """Predictions for every patch of masked inputs. Raises as `forward` does."""
        self.check_input("x", x)
        self.check_removed(mask_ratio, "mask_ratio")
        masking = self.draw_mask(len(x), mask_ratio, x.device, "mask_ratio")
        dtype, tokens = self._encoded(x, masking)
        (decoded,) = towers.decode([self], tokens, [masking], dtype, self.attention, self.recompute)
        pred = towers.predict(self.decoder_pred, decoded)
        removed = take_tokens(pred, masking.ids_removed)
        loss = towers.removed_loss(self, x, removed, masking, self.norm_pix_loss, self.clip_spec)
        return MAEInpaintOutput(pred, masking.mask, loss)

    def fill_in(
        self, inputs: dict[str, Tensor], mask_ratio: float, mask_mode: str = "unstructured"
    ) -> dict[str, Prediction]:
        """As in `FillsIn`."""
        return {self.modality: Prediction(*self.forward_inpaint(inputs[self.modality], mask_ratio)[:2])}


class MAEFT(Pretrained, DropPath, PackedTower, MAEFTParameters):
    """The classifier of one modality: `forward(a, v)` gives logits, `forward_feat(x)` normed tokens.

    Arguments as in `MAE`, with `label_dim` classes and no decoder, and the attribute `drop_path` as in `CAVMAEFT`. It takes
    the encoder of an `MAE`, or one of the two of a `MAViL`.
    """

    def forward(self, a: Tensor | None = None, v: Tensor | None = None, mode: str | None = None) -> Tensor:
        """Logits `[B, label_dim]` from the mean of the patches' tokens. As all classifiers it is given sound, pictures and
        the input mode; what is not of its modality is not looked at and may be None."""
        x = self.chosen_input(a, v, mode)
        return self.compute(x, self.draw_paths(len(x), x.device))

    def compute(self, x: Tensor, paths: Tensor | None) -> Tensor:
        """All of a pass that is heavy, and neither draws nor checks anything -> logits `[B, label_dim]`."""
        own = None if paths is None else paths[:, :, :1]
        mean = mean_tokens(self.features({self.modality: x}, own)[self.modality], self.norm.weight)
        return self.mlp_head(mean.to(self.norm.weight.dtype))

    @property
    def depth(self) -> int:
        """Blocks that a token passes."""
        return len(self.blocks)
