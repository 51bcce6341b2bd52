"""The two figures of a pretraining run: the losses over time, and what the model fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavmae_fast.reference.cavmae import CAVMAE


def _figure(rows: int, columns: int, size: tuple[float, float]):
    # The object interface: no window system, no state shared with the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots the training losses in `rows` (dicts with step, loss_mae_a, loss_mae_v, loss_c) into the PNG `path`."""
    figure, axes = _figure(1, 2, (10, 4))
    steps = [row["step"] for row in rows]
    marker = "o" if len(rows) < 10 else None
    panels = (
        (axes[0, 0], "reconstruction", {"audio": "loss_mae_a", "video": "loss_mae_v"}),
        (axes[0, 1], "contrastive (weighted)", {"audio-video": "loss_c"}),
    )
    for axis, title, series in panels:
        for label, key in series.items():
            axis.plot(steps, [row[key] for row in rows], label=label, linewidth=1, marker=marker)
        axis.set(title=f"{title} loss", xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def reconstructions(
    model: CAVMAE, audio: Tensor, imgs: Tensor, mask_ratio: float, image_mean: Tensor, image_std: Tensor, path: Path
) -> None:
    """Draws a few clips with their masked and filled-in spectrogram and picture into the PNG `path`.

    audio `[B, T, 128]` and imgs `[B, 3, H, W]` as the model takes them; image_mean and image_std `[3]` undo the image
    normalization. A model trained on normalized patches predicts them up to their mean and spread: these are taken from
    the true patch, and the title says so.
    """
    was_training = model.training
    model.eval()
    pred_a, pred_v, mask_a, mask_v, _, _ = model.forward_inpaint(audio, imgs, mask_ratio, mask_ratio)
    model.train(was_training)
    pictures: dict[str, list[Tensor]] = {}
    for name, x, pred, mask in (("a", model.spectrogram(audio), pred_a, mask_a), ("v", imgs, pred_v, mask_v)):
        grid = getattr(model, f"patch_embed_{name}").grid
        true = model.patchify(x, x.shape[1], *grid, model.patch_size).float()
        filled = pred.float()
        if model.norm_pix_loss:
            variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
            filled = filled * (variance + 1e-6).sqrt() + mean
        hidden = mask.unsqueeze(-1)
        low = true.flatten(1).amin(dim=1).view(-1, 1, 1)
        shown = [true, true * (1 - hidden) + low * hidden, true * (1 - hidden) + filled * hidden]
        pictures[name] = [model.unpatchify(t, x.shape[1], *grid, model.patch_size).cpu() for t in shown]
    count = len(audio)
    figure, axes = _figure(count, 6, (14, 2.2 * count))
    note = ", each patch's mean and spread given" if model.norm_pix_loss else ""
    figure.suptitle(f"{mask_ratio:.0%} of the patches removed; filled in by the model{note}")
    for row in range(count):
        low, high = float(pictures["a"][0][row].min()), float(pictures["a"][0][row].max())
        for column, title in enumerate(("sound", "masked", "filled in")):
            axis = axes[row, column]
            spectrogram = pictures["a"][column][row, 0].numpy()
            axis.imshow(spectrogram, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma")
            axis.set_title(title if row == 0 else "")
            axis.set(xticks=[], yticks=[])
        for column, title in enumerate(("picture", "masked", "filled in")):
            image = pictures["v"][column][row] * image_std.view(3, 1, 1).cpu() + image_mean.view(3, 1, 1).cpu()
            axis = axes[row, 3 + column]
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_title(title if row == 0 else "")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
