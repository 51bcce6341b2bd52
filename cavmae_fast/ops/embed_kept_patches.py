"""Patch projection of the kept patches alone, + bias + position + modality.

    patches[b, k] = pixels of patch ids[b, k] in (channel, frame, row, column) order   [B * K, C * t * p * p]
    out = patches weight^T + bias + modality + pos[ids]                                [B * K, D] in pos' dtype

Patches of images are one frame deep (t = 1), those of clips are tubelets of t frames. Three steps: a kernel gathers the
patches straight from the (strided) images into the weight's dtype, PyTorch's GEMM projects them, a kernel adds the
three terms. Pixels of uint8 RGB images are normalized where they are gathered, so that no
floating-point image is ever written. Backward, with slot[b, l] = the k for which ids[b, k] = l, or -1:

    dweight = dout^T patches   (GEMM in the weight's dtype),   dpos[l] = sum over b of dout[b, slot[b, l]],
    dbias = dmodality = sum over l of dpos[l]

One kernel, a program for each place and tile of columns, reads dout once, writes it in the weight's dtype for the GEMM
and sums over the batch in a fixed order, without atomics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.clip import IMAGE_MEAN, IMAGE_STD
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.ops.gather_tokens import check_ids, put_tokens, slots
from cavmae_fast.ops.pixels import as_clips, check_images, load_pixels, patch_corner, scale_and_shift, take_patches

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def take_patches_kernel(
    images,  # [B, C, F, H, W], any strides, floating-point or uint8
    ids,  # [B * K]
    patches,  # [B * K, C * T * P * P]
    rows, kept, grid_height, grid_width, stride_b, stride_c, stride_f, stride_h, stride_w,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    WIDTH: tl.constexpr, T: tl.constexpr, P: tl.constexpr, DEEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    sample = row // kept
    if HAS_IDS:
        patch = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    else:
        patch = (row - sample * kept).to(tl.int64)
    corner = patch_corner(patch, grid_height, grid_width, stride_f, stride_h, stride_w, T, P, DEEP)
    corner += sample.to(tl.int64) * stride_b
    channel = column // (T * P * P)
    pixel = channel.to(tl.int64) * stride_c + column // (P * P) % T * stride_f
    pixel += column // P % P * stride_h + column % P * stride_w
    value = load_pixels(
        images + corner[:, None] + pixel[None, :], valid, channel, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b
    )
    offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(patches + offset, value.to(patches.dtype.element_ty), mask=valid)


@triton.jit
def add_position_kernel(
    projected,  # [B * K, D]
    ids,  # [B * K]
    bias, modality,  # [D], or None
    pos,  # [L, D]
    out,  # [B * K, D]
    rows, kept,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = (row < rows)[:, None] & (column < D)[None, :]
    if HAS_IDS:
        patch = tl.load(ids + row, mask=row < rows, other=0)
    else:
        patch = row % kept
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(projected + offset, mask=valid, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_D], dtype=tl.float32)
    if bias is not None:
        shift += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    if modality is not None:
        shift += tl.load(modality + column, mask=column < D, other=0.0).to(tl.float32)
    value += tl.load(pos + patch[:, None] * D + column[None, :], mask=valid, other=0.0).to(tl.float32)
    tl.store(out + offset, (value + shift[None, :]).to(out.dtype.element_ty), mask=valid)


@triton.jit
def embed_kept_patches_backward_kernel(
    dout, low,  # [B * K, D]
    slot,  # [B * L]
    dpos,  # [L, D] fp32
    batch, kept, length,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, HAS_IDS: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Sums over the samples that kept the patch of this program; every row of dout belongs to one program. The rows of
    BLOCK_B samples are in flight at once."""
    patch = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for start in range(0, batch, BLOCK_B):
        sample = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        if HAS_IDS:
            place = tl.load(slot + sample * length + patch, mask=sample < batch, other=-1)
        else:
            place = tl.where(sample < batch, patch, -1)
        valid = (place >= 0)[:, None] & (column < D)[None, :]
        offset = (sample * kept + place)[:, None] * D + column[None, :]
        g = tl.load(dout + offset, mask=valid, other=0.0)
        if CAST:
            tl.store(low + offset, g.to(low.dtype.element_ty), mask=valid)
        total += g.to(tl.float32)
    tl.store(dpos + patch * D + column, tl.sum(total, axis=0), mask=column < D)


# ------------------------------------------------------------------------------------------------------- launchers


def _forward_triton(images, ids, weight, bias, pos, modality, colors, architecture):
    clips, (t, p) = as_clips(images), patch_of(weight)
    batch, width, frames, height = clips.shape[0], weight.shape[0], *clips.shape[2:4]
    kept = pos.shape[0] if ids is None else ids.shape[1]
    rows, patch_width = batch * kept, weight[0].numel()
    patches = weight.new_empty(rows, patch_width)
    options = launch("take_patches", architecture, weight.dtype)
    take_patches_kernel[(triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(patch_width, options["BLOCK_C"]))](
        clips, ids, patches, rows, kept, height // p, clips.shape[4] // p, *clips.stride(), *colors,
        WIDTH=patch_width, T=t, P=p, DEEP=frames > t, HAS_IDS=ids is not None, **options,
    )  # fmt: skip
    projected = patches @ weight.flatten(1).t()
    out = pos.new_empty(rows, width)
    options = launch("add_position", architecture, pos.dtype)
    add_position_kernel[(triton.cdiv(rows, options["BLOCK_R"]), triton.cdiv(width, options["BLOCK_D"]))](
        projected, ids, bias, modality, pos, out, rows, kept, D=width, HAS_IDS=ids is not None, **options
    )
    return out, patches


def _backward_triton(dout, patches, ids, length, need_weight, need_pos, architecture):
    width = dout.shape[1]
    kept = length if ids is None else ids.shape[1]
    cast = need_weight and dout.dtype != patches.dtype
    low = torch.empty_like(dout, dtype=patches.dtype) if cast else dout
    dpos = dout.new_empty(length, width, dtype=torch.float32)
    options = launch("embed_kept_patches_backward", architecture, dout.dtype)
    embed_kept_patches_backward_kernel[(length, triton.cdiv(width, options["BLOCK_D"]))](
        dout, low, None if ids is None else slots(ids, length), dpos, dout.shape[0] // kept, kept, length,
        D=width, HAS_IDS=ids is not None, CAST=cast, **options,
    )  # fmt: skip
    dweight = low.t() @ patches if need_weight else patches.new_empty(0)
    return dweight, dpos.sum(0), dpos if need_pos else dpos.new_empty(0)


def _forward_torch(images, ids, weight, bias, pos, modality, colors):
    batch = images.shape[0]
    t, p = patch_of(weight)
    patches = take_patches(images, ids, p, weight.dtype, colors, t)
    table = pos + (bias if modality is None else bias + modality)
    out = table.to(pos.dtype).repeat(batch, 1) if ids is None else table.to(pos.dtype).index_select(0, ids.flatten())
    matrix = weight.flatten(1).t()
    if out.dtype == weight.dtype:
        out.addmm_(patches, matrix)
    else:
        out += patches @ matrix
    return out, patches


def _backward_torch(dout, patches, ids, length, need_weight, need_pos):
    statistics = torch.promote_types(dout.dtype, torch.float32)
    batch = dout.shape[0] // (length if ids is None else ids.shape[1])
    empty = dout.new_empty(0, dtype=statistics)
    dweight = dout.to(patches.dtype).t() @ patches if need_weight else patches.new_empty(0)
    exact = dout.to(statistics)
    if not need_pos:
        return dweight, exact.sum(0), empty
    if ids is not None:
        exact = put_tokens(exact, ids, length)
    dpos = exact.view(batch, length, -1).sum(0)
    return dweight, dpos.sum(0), dpos


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(images, ids, weight, bias, pos, modality, colors):
    rows = images.shape[0] * (pos.shape[0] if ids is None else ids.shape[1])
    return pos.new_empty(rows, pos.shape[1]), weight.new_empty(rows, weight[0].numel())


def _backward_fake(dout, patches, ids, length, need_weight, need_pos):
    width = dout.shape[1]
    statistics = torch.promote_types(dout.dtype, torch.float32)
    dweight = patches.new_empty((width, patches.shape[1]) if need_weight else (0,))
    dpos = dout.new_empty((length, width) if need_pos else (0,), dtype=statistics)
    return dweight, dout.new_empty(width, dtype=statistics), dpos


_forward = register(
    "embed_kept_patches",
    "(Tensor images, Tensor? ids, Tensor weight, Tensor bias, Tensor pos, Tensor? modality, float[] colors)"
    " -> (Tensor out, Tensor patches)",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "embed_kept_patches_backward",
    "(Tensor dout, Tensor patches, Tensor? ids, SymInt length, bool need_weight, bool need_pos)"
    " -> (Tensor dweight, Tensor dbias, Tensor dpos)",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=_backward_fake,
)


class _EmbedKeptPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, ids, weight, bias, pos, modality, colors):
        out, patches = _forward(images, ids, weight, bias, pos, modality, colors)
        need_images = images.requires_grad
        ctx.save_for_backward(patches, ids, weight if need_images else None)
        ctx.images, ctx.weight_shape = (images.shape, images.dtype), weight.shape
        ctx.length, ctx.dtypes = pos.shape[0], (bias.dtype, pos.dtype, None if modality is None else modality.dtype)
        return out

    @staticmethod
    def backward(ctx, dout):
        patches, ids, weight = ctx.saved_tensors
        need_images, _, need_weight, need_bias, need_pos, need_modality, _ = ctx.needs_input_grad
        bias_dtype, pos_dtype, modality_dtype = ctx.dtypes
        dout = dout.contiguous()
        dweight, dbias, dpos = _backward(dout, patches, ids, ctx.length, need_weight, need_pos)
        return (
            _images_gradient(dout, ids, weight, ctx.length, *ctx.images) if need_images else None,
            None,
            dweight.view(ctx.weight_shape) if need_weight else None,
            dbias.to(bias_dtype) if need_bias else None,
            dpos.to(pos_dtype) if need_pos else None,
            dbias.to(modality_dtype) if need_modality else None,
            None,
        )


def _images_gradient(dout, ids, weight, length, shape, dtype):
    """`[B, C, H, W]` or `[B, C, F, H, W]`: rarely wanted (adversarial examples, saliency), so in PyTorch's own operators."""
    batch, channels, *frames, height, width = shape
    t, p = patch_of(weight)
    dpatches = dout.to(weight.dtype) @ weight.flatten(1)
    if ids is not None:
        dpatches = put_tokens(dpatches, ids, length)
    grid = dpatches.view(batch, math.prod(frames) // t, height // p, width // p, channels, t, p, p)
    return grid.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape).to(dtype)


def patch_of(weight: Tensor) -> tuple[int, int]:
    """The patch that a kernel `[D, C, p, p]` or `[D, C, t, p, p]` projects: frames and pixels along each edge."""
    return (1 if weight.dim() == 4 else weight.shape[2]), weight.shape[-1]


def embed_kept_patches(
    images: Tensor,
    ids_keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    modality: Tensor | None,
    image_mean: Sequence[float] = IMAGE_MEAN,
    image_std: Sequence[float] = IMAGE_STD,
) -> Tensor:
    """Patch projection (a convolution whose stride is its kernel) + position + modality, for the kept patches.

    images `[B, C, H, W]`, or clips `[B, C, F, H, W]`, with any strides: floating-point, taken as they are, or uint8 RGB,
    which is normalized as `(x / 255 - image_mean) / image_std` by color (in float32, then rounded to the weight's dtype);
    ids_keep `[B, K]` int64 in 0..L-1, unique in each sample (neither is checked: that would wait for the device), or None
    for all L patches in order; weight `[D, C, p, p]`, or for clips `[D, C, t, p, p]`; bias and modality `[D]` (None: there
    is no modality), pos `[L, D]` -> `[B * K, D]` in pos' dtype. The projection runs in the weight's dtype. Raises
    ValueError or TypeError when a shape or dtype does not fit.
    """
    if weight.dim() not in (4, 5) or weight.shape[-2] != weight.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [D, C, p, p], or [D, C, t, p, p] for clips")
    if weight.dim() != images.dim() and images.dim() in (4, 5):
        raise ValueError(
            f"weight has shape {list(weight.shape)} and images {list(images.shape)}; [D, C, p, p] takes images"
            " [B, C, H, W], [D, C, t, p, p] clips [B, C, F, H, W]"
        )
    t, p = patch_of(weight)
    length = check_images(images, p, t)
    width, channels = weight.shape[:2]
    if images.shape[1] != channels:
        raise ValueError(f"images has {images.shape[1]} channels; weight takes {channels}")
    parameters = {"bias": (bias, (width,)), "pos": (pos, (length, width)), "modality": (modality, (width,))}
    for name, (value, shape) in parameters.items():
        if value is None and name == "modality":
            continue
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; images and weight need {list(shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}; it must be floating-point")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}; it must be floating-point")
    if ids_keep is not None:
        check_ids("ids_keep", ids_keep, images.shape[0])
        ids_keep = ids_keep.contiguous()
    modality = None if modality is None else modality.contiguous()
    parameters = (weight.contiguous(), bias.contiguous(), pos.contiguous(), modality)
    return _EmbedKeptPatches.apply(images, ids_keep, *parameters, scale_and_shift(image_mean, image_std))
