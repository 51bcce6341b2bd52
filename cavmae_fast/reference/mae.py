"""Single-modality masked autoencoders in plain PyTorch (He et al., CVPR 2022): the forward pass of towers and of MAE.

The parameters are in `reference.tower` and `reference.mae_parameters`, which the fast models share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.reference import operators
from cavmae_fast.reference.blocks import block, embed_patches
from cavmae_fast.reference.mae_parameters import MAEFTParameters, MAEParameters
from cavmae_fast.reference.masking import Masking
from cavmae_fast.reference.outputs import MAEInpaintOutput, MAEOutput
from cavmae_fast.reference.tower import Tower


def encode(tower: Tower, x: Tensor, ids_keep: Tensor | None, clip: ClipSpec, attention: str) -> Tensor:
    """The tower's input -> tokens `[B, 1 + K, D]` of the class token and the kept patches (None: all), not yet normed."""
    images = operators.normalize_images(tower.images(x), tower.norm.weight.dtype, clip.image_mean, clip.image_std)
    tokens = embed_patches(tower.patch_embed, images) + tower.pos_embed[:, 1:]
    if ids_keep is not None:
        tokens = operators.take_tokens(tokens, ids_keep)
    first = tower.cls_token + tower.pos_embed[:, :1]
    tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
    for parameters in tower.blocks:
        tokens = block(parameters, tokens, attention)
    return tokens


def decode(tower: Tower, tokens: Tensor, masking: Masking, attention: str) -> Tensor:
    """Normed tokens `[B, 1 + K, D]` -> the decoder's normed tokens of every patch, `[B, L, width]`."""
    x = tower.decoder_embed(tokens)
    removed = tower.mask_token.expand(len(x), masking.ids_removed.shape[1], -1)
    patches = operators.take_tokens(torch.cat([x[:, 1:], removed], dim=1), masking.ids_restore)
    x = torch.cat([x[:, :1], patches], dim=1) + tower.decoder_pos_embed
    for parameters in tower.decoder_blocks:
        x = block(parameters, x, attention)
    return tower.decoder_norm(x)[:, 1:]


def reconstruction_loss(
    tower: Tower, x: Tensor, pred: Tensor, masking: Masking, norm_pix_loss: bool, clip: ClipSpec
) -> Tensor:
    """Mean squared error on the removed patches, from predictions for every patch `[B, L, pixels]`."""
    return operators.masked_patch_mse(
        operators.take_tokens(pred, masking.ids_removed),
        tower.images(x),
        masking.ids_removed,
        tower.patch_size,
        norm_pix_loss,
        clip.image_mean,
        clip.image_std,
        tower.tubelet_size,
    )


class MAE(MAEParameters):
    """The pretraining model. Arguments as in `MAEParameters`; `attention`: 'eager' or PyTorch's 'sdpa'."""

    attentions = ("eager", "sdpa")

    def forward(self, x: Tensor, mask_ratio: float = 0.8) -> MAEOutput:
        """One pretraining pass over x, sound or pictures as `Tower` takes them."""
        output = self.forward_inpaint(x, mask_ratio)
        return MAEOutput(output.loss, output.mask)

    def forward_inpaint(self, x: Tensor, mask_ratio: float = 0.8) -> MAEInpaintOutput:
        """Predictions for every patch of masked inputs."""
        self.check_input("x", x)
        self.check_removed(mask_ratio, "mask_ratio")
        masking = self.draw_mask(len(x), mask_ratio, x.device, "mask_ratio")
        tokens = self.norm(encode(self, x, masking.ids_keep, self.clip_spec, self.attention))
        pred = self.decoder_pred(decode(self, tokens, masking, self.attention))
        loss = reconstruction_loss(self, x, pred, masking, self.norm_pix_loss, self.clip_spec)
        return MAEInpaintOutput(pred, masking.mask, loss)

    def forward_feat(self, x: Tensor) -> Tensor:
        """Unmasked inputs -> the normed tokens of all patches, `[B, L, D]`."""
        self.check_input("x", x)
        return self.norm(encode(self, x, None, self.clip_spec, self.attention))[:, 1:]


class MAEFT(MAEFTParameters):
    """The classifier of one modality."""

    attentions = ("eager", "sdpa")

    def forward_feat(self, x: Tensor) -> Tensor:
        """Inputs -> the normed tokens of all patches, `[B, L, D]`."""
        self.check_input("x", x)
        return self.norm(encode(self, x, None, self.clip_spec, self.attention))[:, 1:]

    def forward(self, a: Tensor | None = None, v: Tensor | None = None, mode: str | None = None) -> Tensor:
        """Logits `[B, label_dim]` from the mean token of the input that is of its modality."""
        return self.mlp_head(self.forward_feat(self.chosen_input(a, v, mode)).mean(dim=1))
