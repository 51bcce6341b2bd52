"""Pixels and patches: what the operators that read images and clips straight from memory share.

A clip `[B, C, F, H, W]` is cut into patches of t frames by p x p pixels, an image `[B, C, H, W]` is the clip of one frame
(`as_clips`), whose patches are one frame deep. Patches are counted frame by frame, row by row, column by column.

Pixels are floating-point, or uint8 RGB. uint8 is normalized where it is read, (x / 255 - mean) / std = scale x + shift by
color, so that no floating-point image is ever written. The six numbers are arguments of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton


@triton.jit
def load_pixels(pointers, valid, channel, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b):
    """Pixels in their own dtype, or, of uint8 RGB images, normalized in fp32; 0 where not valid."""
    value = tl.load(pointers, mask=valid, other=0)
    if value.dtype == tl.uint8:
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
        value = tl.where(valid, value.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
    return value


@triton.jit
def patch_corner(
    patch, grid_height, grid_width, stride_f, stride_h, stride_w, T: tl.constexpr, P: tl.constexpr, DEEP: tl.constexpr
):
    """Offset of the first pixel of patch number `patch` in its clip. DEEP: clips are more than one patch deep."""
    y, x = patch // grid_width, patch % grid_width
    corner = x * P * stride_w
    if DEEP:
        corner += y // grid_height * T * stride_f
        y = y % grid_height
    return corner + y * P * stride_h


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """Three scales and three shifts that normalize red, green and blue of uint8 images. Raises ValueError unless mean and
    std hold three numbers each, those of std above 0."""
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} has {len(values)} numbers; it must have one each for red, green and blue")
    if not all(s > 0 for s in std):
        raise ValueError(f"image_std is {tuple(std)}; its numbers must be above 0")
    return [*(1 / (255 * s) for s in std), *(-m / s for m, s in zip(mean, std))]


@lru_cache(maxsize=16)
def _on_device(colors: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift `[3]` on `device`, kept: to copy them from the host for every batch would wait for the device."""
    scale, shift = (torch.tensor(values, dtype=dtype, device=device) for values in (colors[:3], colors[3:]))
    return scale, shift


def as_clips(images: Tensor) -> Tensor:
    """Images `[B, C, H, W]` as clips of one frame `[B, C, 1, H, W]`, a view; clips as they are."""
    return images.unsqueeze(2) if images.dim() == 4 else images


def patch_grid(images: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Images or clips -> a view `[B, F/t, H/p, W/p, C, t, p, p]`."""
    grid = as_clips(images).unfold(2, tubelet_size, tubelet_size)
    return grid.unfold(3, patch_size, patch_size).unfold(4, patch_size, patch_size).permute(0, 2, 3, 4, 1, 5, 6, 7)


def take_patches(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
    colors: Sequence[float],
    tubelet_size: int = 1,
    channels_last: bool = False,
) -> Tensor:
    """Patches `ids [B, K]` of each image or clip (None: all, in order) -> a new contiguous `[B * K, C * t * p * p]` in
    `dtype`.

    A patch is in (channel, frame, row, column) order, or in (frame, row, column, channel) order with `channels_last`.
    uint8 is normalized with `colors`, of `scale_and_shift`, in float32 (float64 for float64).
    """
    grid = patch_grid(images, patch_size, tubelet_size)
    if channels_last:
        grid = grid.permute(0, 1, 2, 3, 5, 6, 7, 4)
    if ids is not None:
        height, width = grid.shape[2:4]
        sample = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        row, column = ids // width, ids % width
        # An index less to follow where there is one place along the frames.
        grid = grid[:, 0][sample, row, column] if grid.shape[1] == 1 else grid[sample, row // height, row % height, column]
    pixels = tubelet_size * patch_size**2
    width = images.shape[1] * pixels
    if images.dtype == torch.uint8:
        exact = torch.promote_types(dtype, torch.float32)
        values = _on_device(tuple(colors), images.device, exact)
        scale, shift = (v.repeat(pixels) if channels_last else v.repeat_interleave(pixels) for v in values)
        return grid.reshape(-1, width).to(exact).mul_(scale).add_(shift).to(dtype)
    if ids is not None:  # a new tensor already
        return grid.to(dtype, memory_format=torch.contiguous_format).reshape(-1, width)
    return torch.empty(grid.shape, dtype=dtype, device=grid.device).copy_(grid).view(-1, width)


def check_images(images: Tensor, patch_size: int, tubelet_size: int = 1) -> int:
    """Raises unless `images` is a floating-point `[B, C, H, W]` or `[B, C, F, H, W]` tensor of whole patches, or one of
    uint8 with 3 channels -> patches per image or clip."""
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise TypeError(f"images is {images.dtype}; it must be floating-point, or uint8 RGB")
    if images.dim() not in (4, 5) or 0 in images.shape:
        raise ValueError(
            f"images has shape {list(images.shape)}; it must be [B, C, H, W], or [B, C, F, H, W] of F frames, none of them 0"
        )
    if images.dtype == torch.uint8 and images.shape[1] != 3:
        raise ValueError(f"images is torch.uint8 with {images.shape[1]} channels; uint8 is RGB, 3 channels")
    frames, height, width = as_clips(images).shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch size {patch_size} does not divide images of {height} x {width} pixels")
    if tubelet_size < 1 or frames % tubelet_size:
        raise ValueError(f"tubelet size {tubelet_size} does not divide clips of {frames} frames")
    return (frames // tubelet_size) * (height // patch_size) * (width // patch_size)
