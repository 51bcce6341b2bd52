"""Mean squared error between predicted and true patches, over the removed patches alone, straight from the pixels.

    t[b, m] = pixels of patch ids[b, m] in (frame, row, column, channel) order, normalized where they are uint8 RGB
    target  = (t - mean(t)) * rstd(t)  with rstd = 1 / sqrt(var(t) + 1e-6), var unbiased      (norm_pix_loss; else t)
    loss    = mean over all (b, m, pixel) of (pred - target)^2

Backward: dpred = 2 (pred - target) * dloss / count. Targets are never stored: backward reads the pixels again and uses
the saved mean and rstd. The sum is in two stages, a patch first, then all patches, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.clip import IMAGE_MEAN, IMAGE_STD
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.gather_tokens import check_ids
from cavmae_fast.ops.pixels import as_clips, check_images, load_pixels, patch_corner, scale_and_shift, take_patches

VARIANCE_EPS = 1e-6
NARROW = 1024
"Pixels of a patch, colors counted: wider ones have launches of their own."


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _pixels_of_patches(
    images, ids, row, rows, column, kept, grid_height, grid_width, stride_b, stride_c, stride_f, stride_h, stride_w,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    WIDTH: tl.constexpr, T: tl.constexpr, P: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Pixels [BLOCK_R, BLOCK_W] in fp32 of the patches of `row`, in (frame, row, column, channel) order."""
    patch = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    corner = patch_corner(patch, grid_height, grid_width, stride_f, stride_h, stride_w, T, P, DEEP)
    corner += (row // kept).to(tl.int64) * stride_b
    channel = column % C
    pixel = column // (P * P * C) % T * stride_f + column // (P * C) % P * stride_h + column // C % P * stride_w
    pixel += channel.to(tl.int64) * stride_c
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    value = load_pixels(
        images + corner[:, None] + pixel[None, :], valid, channel, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b
    )
    return value.to(tl.float32)


@triton.jit
def masked_patch_mse_forward_kernel(
    pred,  # [B * M, W]
    images,  # [B, C, F, H, W'], any strides, floating-point or uint8
    ids,  # [B * M]
    partial, mean, rstd,  # [B * M] fp32
    rows, kept, grid_height, grid_width, stride_b, stride_c, stride_f, stride_h, stride_w,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, eps,
    WIDTH: tl.constexpr, T: tl.constexpr, P: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_W)
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    target = _pixels_of_patches(
        images, ids, row, rows, column, kept, grid_height, grid_width, stride_b, stride_c, stride_f, stride_h, stride_w,
        scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, WIDTH, T, P, C, DEEP,
    )  # fmt: skip
    if NORM:
        mu = tl.sum(target, axis=1) / WIDTH
        centered = tl.where(valid, target - mu[:, None], 0.0)
        # Where pixels vary little, rstd is large and would magnify the rounding of the mean. So the mean of what is left
        # after subtracting it, which is its error, is subtracted too.
        rest = tl.sum(centered, axis=1) / WIDTH
        mu += rest
        centered = tl.where(valid, centered - rest[:, None], 0.0)
        r = tl.rsqrt(tl.sum(centered * centered, axis=1) / (WIDTH - 1) + eps)
        tl.store(mean + row, mu, mask=row < rows)
        tl.store(rstd + row, r, mask=row < rows)
        target = centered * r[:, None]
    value = tl.load(pred + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=valid, other=0.0).to(tl.float32)
    error = tl.where(valid, value - target, 0.0)
    tl.store(partial + row, tl.sum(error * error, axis=1) / WIDTH, mask=row < rows)


@triton.jit
def masked_patch_mse_backward_kernel(
    dloss,  # [] fp32
    pred, dpred,  # [B * M, W]
    images,  # [B, C, F, H, W'], any strides, floating-point or uint8
    ids,  # [B * M]
    mean, rstd,  # [B * M] fp32
    rows, kept, grid_height, grid_width, stride_b, stride_c, stride_f, stride_h, stride_w,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, scale,
    WIDTH: tl.constexpr, T: tl.constexpr, P: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_W)
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    target = _pixels_of_patches(
        images, ids, row, rows, column, kept, grid_height, grid_width, stride_b, stride_c, stride_f, stride_h, stride_w,
        scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, WIDTH, T, P, C, DEEP,
    )  # fmt: skip
    if NORM:
        mu = tl.load(mean + row, mask=row < rows, other=0.0)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        target = (target - mu[:, None]) * r[:, None]
    offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(pred + offset, mask=valid, other=0.0).to(tl.float32)
    result = (value - target) * (tl.load(dloss).to(tl.float32) * scale)
    tl.store(dpred + offset, result.to(dpred.dtype.element_ty), mask=valid)


# ------------------------------------------------------------------------------------------------------- launchers


def _launch(kernel, images, ids, patch_size, tubelet_size, colors, architecture):
    """Grid, arguments and options that both kernels share."""
    clips = as_clips(images)
    channels, frames, height, columns = clips.shape[1:]
    width = channels * tubelet_size * patch_size**2
    # Normalizing bytes takes more registers, and so more warps; of wide patches, fewer fit into them.
    key = f"{'bytes' if images.dtype == torch.uint8 else ''} {'wide' if width > NARROW else ''}".strip()
    options = launch(kernel, architecture, torch.float32, key)
    numbers = (ids.numel(), ids.shape[1], height // patch_size, columns // patch_size, *clips.stride(), *colors)
    sizes = {"WIDTH": width, "T": tubelet_size, "P": patch_size, "C": channels, "DEEP": frames > tubelet_size}
    blocks = {"BLOCK_W": triton.next_power_of_2(width), **options}
    return (triton.cdiv(ids.numel(), options["BLOCK_R"]),), numbers, sizes | blocks


def _forward_triton(pred, images, ids, patch_size, tubelet_size, norm_pix_loss, colors, architecture):
    partial = pred.new_empty(ids.numel(), dtype=torch.float32)
    mean, rstd = (pred.new_empty(ids.shape if norm_pix_loss else (0,), dtype=torch.float32) for _ in range(2))
    shape = (images, ids, patch_size, tubelet_size, colors, architecture)
    grid, numbers, options = _launch("masked_patch_mse_forward", *shape)
    masked_patch_mse_forward_kernel[grid](
        pred, images, ids, partial, mean, rstd, *numbers, VARIANCE_EPS, NORM=norm_pix_loss, **options
    )
    return partial.mean(), mean, rstd


def _backward_triton(dloss, pred, images, ids, mean, rstd, patch_size, tubelet_size, norm_pix_loss, colors, architecture):
    dpred = torch.empty_like(pred)
    shape = (images, ids, patch_size, tubelet_size, colors, architecture)
    grid, numbers, options = _launch("masked_patch_mse_backward", *shape)
    masked_patch_mse_backward_kernel[grid](
        dloss, pred, dpred, images, ids, mean, rstd, *numbers, 2 / pred.numel(), NORM=norm_pix_loss, **options
    )
    return dpred


def _pixels(images, ids, patch_size, tubelet_size, dtype, colors):
    """`[B, M, t * p * p * C]`, a new tensor."""
    return take_patches(images, ids, patch_size, dtype, colors, tubelet_size, channels_last=True).view(*ids.shape, -1)


def _forward_torch(pred, images, ids, patch_size, tubelet_size, norm_pix_loss, colors):
    statistics = torch.promote_types(pred.dtype, torch.float32)
    target = _pixels(images, ids, patch_size, tubelet_size, statistics, colors)
    if not norm_pix_loss:
        return (target - pred).square_().mean(), *(target.new_empty(0) for _ in range(2))
    # torch.var_mean is several times slower on the CPU. Where pixels vary little, rstd is large and would magnify the
    # rounding of the mean, so the mean of what is left after subtracting it, which is its error, is subtracted too.
    mean = target.mean(-1)
    rest = target.sub_(mean.unsqueeze(-1)).mean(-1)
    target.sub_(rest.unsqueeze(-1))
    mean += rest
    variance = torch.linalg.vector_norm(target, dim=-1).square_().div_(target.shape[-1] - 1)
    rstd = variance.add_(VARIANCE_EPS).rsqrt_()
    target.mul_(rstd.unsqueeze(-1))
    return target.sub_(pred).square_().mean(), mean, rstd


def _backward_torch(dloss, pred, images, ids, mean, rstd, patch_size, tubelet_size, norm_pix_loss, colors):
    target = _pixels(images, ids, patch_size, tubelet_size, torch.promote_types(pred.dtype, torch.float32), colors)
    if norm_pix_loss:
        target.sub_(mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))
    return target.sub_(pred).mul_(dloss * (-2 / pred.numel())).to(pred.dtype)


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(pred, images, ids, patch_size, tubelet_size, norm_pix_loss, colors):
    statistics = torch.promote_types(pred.dtype, torch.float32)
    shapes = ((), ids.shape, ids.shape) if norm_pix_loss else ((), (0,), (0,))
    return tuple(pred.new_empty(shape, dtype=statistics) for shape in shapes)


_forward = register(
    "masked_patch_mse",
    "(Tensor pred, Tensor images, Tensor ids, SymInt patch_size, SymInt tubelet_size, bool norm_pix_loss,"
    " float[] colors) -> (Tensor loss, Tensor mean, Tensor rstd)",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "masked_patch_mse_backward",
    "(Tensor dloss, Tensor pred, Tensor images, Tensor ids, Tensor mean, Tensor rstd, SymInt patch_size,"
    " SymInt tubelet_size, bool norm_pix_loss, float[] colors) -> Tensor",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=lambda dloss, pred, *_: torch.empty_like(pred),
)


class _MaskedPatchMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, images, ids, *options):
        loss, mean, rstd = _forward(pred, images, ids, *options)
        ctx.save_for_backward(pred, images, ids, mean, rstd)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dpred = _backward(dloss.contiguous(), *ctx.saved_tensors, *ctx.options)
        return dpred, None, None, *[None] * len(ctx.options)


def masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    ids_removed: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
    image_mean: Sequence[float] = IMAGE_MEAN,
    image_std: Sequence[float] = IMAGE_STD,
    tubelet_size: int = 1,
) -> Tensor:
    """Mean squared error between predicted and true patches, over the removed patches alone.

    pred `[B, M, t * p * p * C]` for the patches `ids_removed [B, M]` (int64 in 0..L-1; not checked: that would wait for the
    device), t = `tubelet_size` frames deep, of images `[B, C, H, W]` (t is 1) or clips `[B, C, F, H, W]` with any strides:
    floating-point, taken as they are, or uint8 RGB, which is normalized as `(x / 255 - image_mean) / image_std` by color
    -> a float32 scalar (float64 for a float64 pred). With `norm_pix_loss` each true patch is normalized: minus its mean,
    over the root of (its unbiased variance + 1e-6). There is no gradient to the images. Raises ValueError or TypeError when
    a shape or dtype does not fit.
    """
    check_images(images, patch_size, tubelet_size)
    check_ids("ids_removed", ids_removed, images.shape[0])
    if not pred.is_floating_point():
        raise TypeError(f"pred is {pred.dtype}; it must be floating-point")
    shape = (*ids_removed.shape, tubelet_size * patch_size**2 * images.shape[1])
    if pred.shape != shape:
        raise ValueError(f"pred has shape {list(pred.shape)}; images, ids_removed and patch_size need {list(shape)}")
    if images.requires_grad:
        raise ValueError("images requires a gradient, which masked_patch_mse does not compute; pass images.detach()")
    options = (patch_size, tubelet_size, norm_pix_loss, scale_and_shift(image_mean, image_std))
    return _MaskedPatchMSE.apply(pred.contiguous(), images, ids_removed.contiguous(), *options)
