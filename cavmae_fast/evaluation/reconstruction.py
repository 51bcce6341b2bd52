"""What a pretrained model fills in, as a figure: spectrograms and pictures, masked and completed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cavmae_fast.evaluation.drawing import new_figure
from cavmae_fast.models import CAVMAE


class Filled(NamedTuple):
    """One modality of some clips, as images `[B, C, H, W]` on the CPU."""

    true: Tensor
    masked: Tensor
    "Removed patches have the clip's lowest value."
    filled: Tensor
    "Removed patches as the model predicts them."
    hidden: Tensor
    "`[B, 1, H, W]`: 1 where a pixel was removed, else 0."


@torch.no_grad()
def fill_in(
    model: CAVMAE, audio: Tensor, imgs: Tensor, mask_ratio: float, mask_mode: str = "unstructured"
) -> dict[str, Filled]:
    """Clips with a share `mask_ratio` of their patches removed and predicted, by modality ('a' and 'v').

    audio `[B, T, 128]` and imgs `[B, 3, H, W]` as the model takes them; `mask_mode` is audio's. A model trained on
    normalized patches predicts them up to their mean and spread, which are taken from the true patch.
    """
    was_training = model.training
    model.eval()
    output = model.forward_inpaint(audio, imgs, mask_ratio, mask_ratio, mask_mode)
    model.train(was_training)
    pred_a, pred_v, mask_a, mask_v, _, _ = output
    result = {}
    for name, x, pred, mask in (("a", model.spectrogram(audio), pred_a, mask_a), ("v", imgs, pred_v, mask_v)):
        grid = getattr(model, f"patch_embed_{name}").grid
        true = model.patchify(x, x.shape[1], *grid, model.patch_size).float()
        filled = pred.float()
        if model.norm_pix_loss:
            variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
            filled = filled * (variance + 1e-6).sqrt() + mean
        hidden = mask.unsqueeze(-1)
        low = true.flatten(1).amin(dim=1).view(-1, 1, 1)
        patches = (true, true * (1 - hidden) + low * hidden, true * (1 - hidden) + filled * hidden)
        images = [model.unpatchify(t, x.shape[1], *grid, model.patch_size).cpu() for t in patches]
        pixels = hidden.expand(-1, -1, model.patch_size**2)
        result[name] = Filled(*images, model.unpatchify(pixels, 1, *grid, model.patch_size).cpu())
    return result


def draw_reconstructions(model: CAVMAE, audio: Tensor, imgs: Tensor, mask_ratio: float, path: Path) -> None:
    """Draws a few clips with their masked and filled-in spectrogram and picture into the PNG `path`.

    audio and imgs as in `fill_in`, images normalized with the statistics of the model's clip specification.
    """
    parts = fill_in(model, audio, imgs, mask_ratio)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.clip_spec.image_mean, model.clip_spec.image_std))
    count = len(audio)
    figure, axes = new_figure(count, 6, (14, 2.2 * count))
    note = ", each patch's mean and spread given" if model.norm_pix_loss else ""
    figure.suptitle(f"{mask_ratio:.0%} of the patches removed; filled in by the model{note}")
    for row in range(count):
        low, high = float(parts["a"].true[row].min()), float(parts["a"].true[row].max())
        for column, (title, spectrograms) in enumerate(zip(("sound", "masked", "filled in"), parts["a"])):
            axis = axes[row, column]
            axis.imshow(spectrograms[row, 0].numpy(), origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma")
            axis.set_title(title if row == 0 else "")
        for column, (title, images) in enumerate(zip(("picture", "masked", "filled in"), parts["v"])):
            axis = axes[row, 3 + column]
            axis.imshow((images[row] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_title(title if row == 0 else "")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
