"""What a pretrained model fills in, as a figure: spectrograms and pictures, masked and completed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.evaluation.drawing import mosaic, new_figure
from cavmae_fast.models.abilities import FillsIn

NAMES = {"a": "sound", "v": "picture"}


class Filled(NamedTuple):
    """One modality of some clips, as images `[B, C, H, W]` on the CPU; `[B, C, F, H, W]` of several pictures per clip."""

    true: Tensor
    masked: Tensor
    "Removed patches have the clip's lowest value."
    filled: Tensor
    "Removed patches as the model predicts them."
    hidden: Tensor
    "As the others, of one channel: 1 where a pixel was removed, else 0."


@torch.no_grad()
def fill_in(
    model: FillsIn, audio: Tensor | None, imgs: Tensor | None, mask_ratio: float, mask_mode: str = "unstructured"
) -> dict[str, Filled]:
    """Clips with a share `mask_ratio` of their patches removed and predicted, by the modalities of the model ('a' and 'v').

    audio `[B, T, 128]` and imgs as the model takes them, floating-point; what it does not take may be None. `mask_mode` is
    audio's. A model trained on normalized patches predicts them up to their mean and spread, which are taken from the true
    patch.
    """
    inputs = {m: x for m, x in (("a", audio), ("v", imgs)) if m in model.modalities}
    was_training = model.training
    model.eval()
    predictions = model.fill_in(inputs, mask_ratio, mask_mode)
    model.train(was_training)
    result = {}
    for m, (patches, mask) in predictions.items():
        true = model.to_patches(m, inputs[m]).float()
        filled = patches.float()
        if model.norm_pix_loss:
            variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
            filled = filled * (variance + 1e-6).sqrt() + mean
        hidden = mask.unsqueeze(-1)
        low = true.flatten(1).amin(dim=1).view(-1, 1, 1)
        views = (true, true * (1 - hidden) + low * hidden, true * (1 - hidden) + filled * hidden, hidden.expand_as(true))
        *images, pixels = (model.to_images(m, view).cpu() for view in views)
        result[m] = Filled(*images, pixels[:, :1])
    return result


def colors(image: Tensor, clip: ClipSpec) -> np.ndarray:
    """A normalized picture `[3, H, W]` or pictures `[3, F, H, W]` -> uint8 `[H, W, 3]` or `[F, H, W, 3]`."""
    mean, std = (torch.tensor(values).view(3, *[1] * (image.dim() - 1)) for values in (clip.image_mean, clip.image_std))
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


def draw_reconstructions(model: FillsIn, audio: Tensor | None, imgs: Tensor | None, mask_ratio: float, path: Path) -> None:
    """Draws a few clips, what the model has of them, as they are, masked and filled in, into the PNG `path`.

    audio and imgs as in `fill_in`, images normalized with the statistics of the model's clip specification. The pictures of
    a clip lie in a grid, row by row.
    """
    parts = fill_in(model, audio, imgs, mask_ratio)
    count = len(next(iter(parts.values())).true)
    several = "v" in parts and parts["v"].true.dim() == 5
    figure, axes = new_figure(count, 3 * len(parts), (7.0 * len(parts) * (1.4 if several else 1), 2.2 * count))
    note = ", each patch's mean and spread given" if model.norm_pix_loss else ""
    figure.suptitle(f"{mask_ratio:.0%} of the patches removed; filled in by the model{note}")
    for place, (m, filled) in enumerate(parts.items()):
        for column, (title, views) in enumerate(zip((NAMES[m], "masked", "filled in"), filled), start=3 * place):
            for axis, view, true in zip(axes[:, column], views, filled.true):
                if m == "a":
                    limits = {"vmin": float(true.min()), "vmax": float(true.max())}
                    axis.imshow(view[0].numpy(), origin="lower", aspect="auto", cmap="magma", **limits)
                else:
                    axis.imshow(mosaic(colors(view, model.clip_spec)))
            axes[0, column].set_title(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
