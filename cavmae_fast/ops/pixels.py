"""Pixels and patches: what the operators that read images straight from memory share.

Images are floating-point, or uint8 RGB. uint8 is normalized where it is read, (x / 255 - mean) / std = scale x + shift by
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


def patch_grid(images: Tensor, patch_size: int) -> Tensor:
    """images `[B, C, H, W]` -> a view `[B, H/p, W/p, C, p, p]`."""
    return images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size).permute(0, 2, 3, 1, 4, 5)


def take_patches(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int,
    dtype: torch.dtype,
    colors: Sequence[float],
    channels_last: bool = False,
) -> Tensor:
    """Patches `ids [B, K]` of each image (None: all, in order) -> a new contiguous `[B * K, C * p * p]` in `dtype`.

    A patch is in (channel, row, column) order, or in (row, column, channel) order with `channels_last`. uint8 is
    normalized with `colors`, of `scale_and_shift`, in float32 (float64 for float64).
    """
    grid = patch_grid(images, patch_size)
    if channels_last:
        grid = grid.permute(0, 1, 2, 4, 5, 3)
    if ids is not None:
        sample = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        grid = grid[sample, ids // grid.shape[2], ids % grid.shape[2]]
    pixels = patch_size**2
    width = images.shape[1] * pixels
    if images.dtype == torch.uint8:
        exact = torch.promote_types(dtype, torch.float32)
        values = _on_device(tuple(colors), images.device, exact)
        scale, shift = (v.repeat(pixels) if channels_last else v.repeat_interleave(pixels) for v in values)
        return grid.reshape(-1, width).to(exact).mul_(scale).add_(shift).to(dtype)
    if ids is not None:  # a new tensor already
        return grid.to(dtype, memory_format=torch.contiguous_format).reshape(-1, width)
    return torch.empty(grid.shape, dtype=dtype, device=grid.device).copy_(grid).view(-1, width)


def check_images(images: Tensor, patch_size: int) -> int:
    """Raises unless `images` is a floating-point `[B, C, H, W]` or uint8 `[B, 3, H, W]` tensor of whole patches
    -> patches per image."""
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise TypeError(f"images is {images.dtype}; it must be floating-point, or uint8 RGB")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images has shape {list(images.shape)}; it must be [B, C, H, W], none of them 0")
    if images.dtype == torch.uint8 and images.shape[1] != 3:
        raise ValueError(f"images is torch.uint8 with {images.shape[1]} channels; uint8 is RGB, 3 channels")
    height, width = images.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch size {patch_size} does not divide images of {height} x {width} pixels")
    return (height // patch_size) * (width // patch_size)
