"""Mean squared error between predicted and true patches, over the removed patches alone, straight from the pixels.

    t[b, m] = pixels of patch ids[b, m] in (row, column, channel) order
    target  = (t - mean(t)) * rstd(t)  with rstd = 1 / sqrt(var(t) + 1e-6), var unbiased      (norm_pix_loss; else t)
    loss    = mean over all (b, m, pixel) of (pred - target)^2

Backward: dpred = 2 (pred - target) * dloss / count. Targets are never stored: backward reads the pixels again and uses the
saved mean and rstd. The sum is in two stages, a patch first, then all patches, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .embed_kept_patches import check_images, patch_grid
from .gather_tokens import check_ids
from .registry import register

BLOCK_R = 4
VARIANCE_EPS = 1e-6


# -------------------------------------------------------------------------------------------------------- launchers


def _pixels(images, ids, patch_size, dtype):
    """`[B, M, p * p * C]`, a new tensor."""
    grid = patch_grid(images, patch_size).permute(0, 1, 2, 4, 5, 3)  # [B, H/p, W/p, p, p, C]
    sample = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    return grid[sample, ids // grid.shape[2], ids % grid.shape[2]].to(dtype).reshape(*ids.shape, -1)


def _forward_torch(pred, images, ids, patch_size, norm_pix_loss):
    statistics = torch.promote_types(pred.dtype, torch.float32)
    target = _pixels(images, ids, patch_size, statistics)
    if not norm_pix_loss:
        return (target - pred).square_().mean(), *(target.new_empty(0) for _ in range(2))
    variance, mean = torch.var_mean(target, dim=-1)
    rstd = (variance + VARIANCE_EPS).rsqrt()
    target.sub_(mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))
    return target.sub_(pred).square_().mean(), mean, rstd


def _backward_torch(dloss, pred, images, ids, mean, rstd, patch_size, norm_pix_loss):
    target = _pixels(images, ids, patch_size, torch.promote_types(pred.dtype, torch.float32))
    if norm_pix_loss:
        target.sub_(mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))
    return target.sub_(pred).mul_(dloss * (-2 / pred.numel())).to(pred.dtype)


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(pred, images, ids, patch_size, norm_pix_loss):
    statistics = torch.promote_types(pred.dtype, torch.float32)
    shapes = ((), ids.shape, ids.shape) if norm_pix_loss else ((), (0,), (0,))
    return tuple(pred.new_empty(shape, dtype=statistics) for shape in shapes)


_forward = register(
    "masked_patch_mse",
    "(Tensor pred, Tensor images, Tensor ids, SymInt patch_size, bool norm_pix_loss)"
    " -> (Tensor loss, Tensor mean, Tensor rstd)",
    reference=_forward_torch, fake=_forward_fake,
)  # fmt: skip
_backward = register(
    "masked_patch_mse_backward",
    "(Tensor dloss, Tensor pred, Tensor images, Tensor ids, Tensor mean, Tensor rstd, SymInt patch_size,"
    " bool norm_pix_loss) -> Tensor",
    reference=_backward_torch,
    fake=lambda dloss, pred, *_: torch.empty_like(pred),
)  # fmt: skip


class _MaskedPatchMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, images, ids, patch_size, norm_pix_loss):
        loss, mean, rstd = _forward(pred, images, ids, patch_size, norm_pix_loss)
        ctx.save_for_backward(pred, images, ids, mean, rstd)
        ctx.options = patch_size, norm_pix_loss
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return _backward(dloss.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None


def masked_patch_mse(
    pred: Tensor, images: Tensor, ids_removed: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """Mean squared error between predicted and true patches, over the removed patches alone.

    pred `[B, M, p * p * C]` for the patches `ids_removed [B, M]` (int64 in 0..L-1; not checked: that would wait for the
    device) of images `[B, C, H, W]` with any strides -> a float32 scalar (float64 for a float64 pred). With
    `norm_pix_loss` each true patch is normalised: minus its mean, over the root of (its unbiased variance + 1e-6).
    There is no gradient to the images. Raises ValueError or TypeError when a shape or dtype does not fit.
    """
    check_images(images, patch_size)
    check_ids("ids_removed", ids_removed, images.shape[0])
    if not pred.is_floating_point():
        raise TypeError(f"pred is {pred.dtype}; it must be floating-point")
    shape = (*ids_removed.shape, patch_size**2 * images.shape[1])
    if pred.shape != shape:
        raise ValueError(f"pred has shape {list(pred.shape)}; images, ids_removed and patch_size need {list(shape)}")
    if images.requires_grad:
        raise ValueError("images requires a gradient, which masked_patch_mse does not compute; pass images.detach()")
    return _MaskedPatchMSE.apply(pred.contiguous(), images, ids_removed.contiguous(), patch_size, norm_pix_loss)
