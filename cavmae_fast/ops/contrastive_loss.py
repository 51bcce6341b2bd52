"""InfoNCE between matching rows of audio and video, and how often the best match is the own one.

    s[i, j] = a_i . v_j / (|a_i| |v_j| temperature)            a, v [N, D]; norms at least 1e-12
    loss    = mean over j of logsumexp_i s[i, j] - s[j, j]     for each video a softmax over the audios, as published
    accuracy = share of j with argmax_i s[i, j] = j            (bidirectional: the means of both directions)

Backward, with p[i, j] = exp(s[i, j] - logsumexp_i s[i, j]) (bidirectional: the mean of both softmaxes):

    ds = (p - identity) * dloss / N,   d(a / |a|) = ds (v / |v|) / temperature,   and likewise for v

No kernel keeps the N x N matrix: forward writes what the softmax needs of each tile of it (maximum, sum, argmax) and a
second kernel combines these in a fixed order; backward forms the tiles again. The matching pair's gradient is p - 1. Near
p = 1, where training ends, this subtraction would lose precision, so forward stores it as minus the sum of the other
probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register

NORM_EPS = 1e-12
"As in torch.nn.functional.normalize."


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _scores(
    x, y,  # [N, D]
    inverse_x, inverse_y,  # [N] fp32
    row, column, count, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_N, BLOCK_N] of similarities over temperature: rows of x against rows `column` of y."""
    x_start = x + row.to(tl.int64)[:, None] * D
    y_start = y + column.to(tl.int64)[None, :] * D
    total = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(x_start + k[None, :], mask=(row < count)[:, None] & (k < D)[None, :], other=0.0)
        right = tl.load(y_start + k[:, None], mask=(column < count)[None, :] & (k < D)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    scale_x = tl.load(inverse_x + row, mask=row < count, other=0.0) * inverse_temperature
    scale_y = tl.load(inverse_y + column, mask=column < count, other=0.0)
    return total * scale_x[:, None] * scale_y[None, :]


@triton.jit
def inverse_norm_kernel(
    x,  # [N, D]
    inverse,  # [N] fp32
    count, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(x + offset, mask=(row < count)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(value * value, axis=1))
    tl.store(inverse + row, 1.0 / tl.where(norm < eps, eps, norm), mask=row < count)


@triton.jit
def contrastive_tile_kernel(
    audio, video,  # [N, D]
    inverse_a, inverse_v,  # [N] fp32
    peak, total,  # [directions, tiles, N] fp32
    best,  # [directions, tiles, N] int32
    own,  # [N] fp32
    count, tiles, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Of a tile, along the audios (and the videos): maximum, its index, sum of exponentials without the own pair."""
    tile_a, tile_v = tl.program_id(0), tl.program_id(1)
    row = tile_a * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile_v * BLOCK_N + tl.arange(0, BLOCK_N)
    s = _scores(audio, video, inverse_a, inverse_v, row, column, count, inverse_temperature, D, BLOCK_N, BLOCK_K, PRECISION)
    if tile_a == tile_v:
        diagonal = tl.sum(tl.where(row[:, None] == column[None, :], s, 0.0), axis=0)
        tl.store(own + column, diagonal, mask=column < count)
    # NaN ranks first, as in torch.argmax, and makes the sum NaN.
    ranked = tl.where(s == s, s, float("inf"))
    top, index = tl.max(tl.where((row < count)[:, None], ranked, float("-inf")), axis=0, return_indices=True)
    offset = tile_a.to(tl.int64) * count + column
    other = row[:, None] != column[None, :]
    exponentials = tl.where((row < count)[:, None] & other, tl.exp(s - top[None, :]), 0.0)
    tl.store(peak + offset, top, mask=column < count)
    tl.store(total + offset, tl.sum(exponentials, axis=0), mask=column < count)
    tl.store(best + offset, tile_a * BLOCK_N + index, mask=column < count)
    if BOTH:
        top, index = tl.max(tl.where((column < count)[None, :], ranked, float("-inf")), axis=1, return_indices=True)
        offset = (tiles + tile_v).to(tl.int64) * count + row
        exponentials = tl.where((column < count)[None, :] & other, tl.exp(s - top[:, None]), 0.0)
        tl.store(peak + offset, top, mask=row < count)
        tl.store(total + offset, tl.sum(exponentials, axis=1), mask=row < count)
        tl.store(best + offset, tile_v * BLOCK_N + index, mask=row < count)


@triton.jit
def contrastive_combine_kernel(
    peak, total,  # [directions, tiles, N] fp32
    best,  # [directions, tiles, N] int32
    own,  # [N] fp32
    softmax,  # [directions, 3, N] fp32: maximum, log of the sum, own probability - 1
    row_loss, right,  # [directions, N] fp32
    count, tiles,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Combines what the tiles found, in the order of the tiles; of equal maxima the first counts."""
    direction = tl.program_id(1)
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < count
    top = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    place = tl.zeros([BLOCK_N], dtype=tl.int32)
    for tile in range(tiles):
        offset = (direction * tiles + tile).to(tl.int64) * count + index
        tile_top = tl.load(peak + offset, mask=inside, other=0.0)
        tile_sum = tl.load(total + offset, mask=inside, other=1.0)
        tile_place = tl.load(best + offset, mask=inside, other=0)
        new_top = tl.maximum(top, tile_top)
        sums = sums * tl.exp(top - new_top) + tile_sum * tl.exp(tile_top - new_top)
        place = tl.where(tile_top > top, tile_place, place)
        top = new_top
    own_score = tl.load(own + index, mask=inside, other=0.0)
    whole = sums + tl.exp(own_score - top)
    log_sum = tl.log(whole)
    saved = softmax + 3 * direction * count + index
    tl.store(saved, top, mask=inside)
    tl.store(saved + count, log_sum, mask=inside)
    tl.store(saved + 2 * count, -sums / whole, mask=inside)
    offset = direction * count + index
    tl.store(row_loss + offset, top - own_score + log_sum, mask=inside)
    tl.store(right + offset, (place == index).to(tl.float32), mask=inside)


@triton.jit
def contrastive_backward_kernel(
    dloss,  # [] fp32
    x, y,  # [N, D]
    inverse_x, inverse_y,  # [N] fp32
    softmax_x, softmax_y,  # [3, N] fp32
    dunit,  # [N, D] fp32
    count, inverse_temperature,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    PER_X: tl.constexpr, PER_Y: tl.constexpr,
):  # fmt: skip
    """Gradient to the normalized rows of x; PER_X, PER_Y: whose softmaxes (over the other side) are in the loss.

    A program owns BLOCK_D columns of the gradient, and forms the similarities of its rows again for them."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    result = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start in range(0, count, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s = _scores(x, y, inverse_x, inverse_y, row, column, count, inverse_temperature, D, BLOCK_N, BLOCK_K, PRECISION)
        is_own = row[:, None] == column[None, :]
        p = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)  # minus 1 for the own pair
        if PER_X:
            top = tl.load(softmax_x + row, mask=row < count, other=0.0)
            log_sum = tl.load(softmax_x + count + row, mask=row < count, other=0.0)
            own = tl.load(softmax_x + 2 * count + row, mask=row < count, other=0.0)
            # Columns past the end have s = 0, which can lie so far above `top` that the exponential is infinite; the
            # product with their zero rows would then be NaN.
            others = tl.where((column < count)[None, :], s - top[:, None] - log_sum[:, None], float("-inf"))
            p += tl.where(is_own, own[:, None], tl.exp(others))
        if PER_Y:
            top = tl.load(softmax_y + column, mask=column < count, other=0.0)
            log_sum = tl.load(softmax_y + count + column, mask=column < count, other=0.0)
            own = tl.load(softmax_y + 2 * count + column, mask=column < count, other=0.0)
            p += tl.where(is_own, own[None, :], tl.exp(s - top[None, :] - log_sum[None, :]))
        if PER_X and PER_Y:
            p *= 0.5
        valid = (column < count)[:, None] & (width < D)[None, :]
        other = tl.load(y + column.to(tl.int64)[:, None] * D + width[None, :], mask=valid, other=0.0)
        unit = other.to(tl.float32) * tl.load(inverse_y + column, mask=column < count, other=0.0)[:, None]
        # p lies in [-1, 1] and so does unit: both keep their bits in fp16; the small factor comes after the sum.
        result = tl.dot(p.to(y.dtype.element_ty), unit.to(y.dtype.element_ty), result, input_precision=PRECISION)
    scale = tl.load(dloss).to(tl.float32) * inverse_temperature / count
    valid = (row < count)[:, None] & (width < D)[None, :]
    tl.store(dunit + row.to(tl.int64)[:, None] * D + width[None, :], result * scale, mask=valid)


@triton.jit
def normalize_backward_kernel(
    x,  # [N, D]
    inverse,  # [N] fp32
    dunit,  # [N, D] fp32
    dx,  # [N, D]
    count, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    valid = (row < count)[:, None] & (column < D)[None, :]
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    r = tl.load(inverse + row, mask=row < count, other=0.0)[:, None]
    unit = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32) * r
    g = tl.load(dunit + offset, mask=valid, other=0.0)
    along = tl.sum(unit * g, axis=1)[:, None]
    # A row shorter than eps is only scaled.
    along = tl.where(r < 1.0 / eps, along, 0.0)  # the same division as in inverse_norm_kernel, whose result it is
    tl.store(dx + offset, ((g - unit * along) * r).to(dx.dtype.element_ty), mask=valid)


# ------------------------------------------------------------------------------------------------------- launchers


def _forward_triton(audio, video, temperature, bidirectional, architecture):
    (count, width), directions = audio.shape, 2 if bidirectional else 1
    norm, tile, combine = (
        launch(kernel, architecture, audio.dtype) for kernel in ("inverse_norm", "contrastive_tile", "contrastive_combine")
    )
    tiles = triton.cdiv(count, tile["BLOCK_N"])

    def new(*shape, dtype=torch.float32):
        return audio.new_empty(shape, dtype=dtype)

    inverse_a, inverse_v, own = new(count), new(count), new(count)
    for x, inverse in ((audio, inverse_a), (video, inverse_v)):
        inverse_norm_kernel[(triton.cdiv(count, norm["BLOCK_R"]),)](
            x, inverse, count, NORM_EPS, D=width, BLOCK_D=triton.next_power_of_2(width), **norm
        )
    peak, total = new(directions, tiles, count), new(directions, tiles, count)
    best = new(directions, tiles, count, dtype=torch.int32)
    contrastive_tile_kernel[(tiles, tiles)](
        audio, video, inverse_a, inverse_v, peak, total, best, own, count, tiles, 1 / temperature,
        D=width, BOTH=bidirectional, PRECISION="ieee", **tile,
    )  # fmt: skip
    softmax, row_loss, right = new(directions, 3, count), new(directions, count), new(directions, count)
    contrastive_combine_kernel[(triton.cdiv(count, combine["BLOCK_N"]), directions)](
        peak, total, best, own, softmax, row_loss, right, count, tiles, **combine
    )
    return row_loss.mean(), right.mean(), inverse_a, inverse_v, softmax


def _backward_triton(dloss, audio, video, inverse_a, inverse_v, softmax, temperature, architecture):
    count, width = audio.shape
    per_video, per_audio = softmax[0], softmax[-1]
    both = softmax.shape[0] == 2
    tile, norm = (launch(kernel, architecture, audio.dtype) for kernel in ("contrastive_backward", "normalize_backward"))
    grid = (triton.cdiv(count, tile["BLOCK_N"]), triton.cdiv(width, tile["BLOCK_D"]))
    a, v = (audio, inverse_a, per_audio, both), (video, inverse_v, per_video, True)
    gradients = []
    for (x, inverse_x, softmax_x, per_x), (y, inverse_y, softmax_y, per_y) in ((a, v), (v, a)):
        dunit, dx = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x)
        contrastive_backward_kernel[grid](
            dloss, x, y, inverse_x, inverse_y, softmax_x, softmax_y, dunit, count, 1 / temperature,
            D=width, PER_X=per_x, PER_Y=per_y, PRECISION="ieee", **tile,
        )  # fmt: skip
        normalize_backward_kernel[(triton.cdiv(count, norm["BLOCK_R"]),)](
            x, inverse_x, dunit, dx, count, NORM_EPS, D=width, BLOCK_D=triton.next_power_of_2(width), **norm
        )
        gradients.append(dx)
    return tuple(gradients)


def _inverse_norm(x):
    return x.square().sum(1).sqrt_().clamp_(min=NORM_EPS).reciprocal_()


def _similarity(audio, video, inverse_a, inverse_v, temperature):
    statistics = inverse_a.dtype
    a, v = audio.to(statistics) * inverse_a.unsqueeze(1), video.to(statistics) * inverse_v.unsqueeze(1)
    return a, v, (a @ v.t()).div_(temperature)


def _forward_torch(audio, video, temperature, bidirectional):
    statistics = torch.promote_types(audio.dtype, torch.float32)
    inverse_a, inverse_v = (_inverse_norm(x.to(statistics)) for x in (audio, video))
    _, _, scores = _similarity(audio, video, inverse_a, inverse_v, temperature)
    own = torch.arange(audio.shape[0], device=audio.device)
    softmax, right = [], []
    for s in (scores.t(), scores) if bidirectional else (scores.t(),):
        top, best = s.max(1)
        exponentials = (s - top.unsqueeze(1)).exp_()
        others = exponentials.fill_diagonal_(0).sum(1)
        total = others + (scores.diagonal() - top).exp_()
        softmax.append(torch.stack([top, total.log(), -others / total]))
        right.append(best == own)
    softmax = torch.stack(softmax)
    loss = (softmax[:, 0] - scores.diagonal() + softmax[:, 1]).mean()
    return loss, torch.stack(right).to(torch.float32).mean(), inverse_a, inverse_v, softmax


def _backward_torch(dloss, audio, video, inverse_a, inverse_v, softmax, temperature):
    a, v, scores = _similarity(audio, video, inverse_a, inverse_v, temperature)
    ds = (scores - softmax[0, 0]).sub_(softmax[0, 1]).exp_()
    if softmax.shape[0] == 2:
        ds.add_(scores.sub_(softmax[1, 0].unsqueeze(1)).sub_(softmax[1, 1].unsqueeze(1)).exp_()).mul_(0.5)
    ds.diagonal().copy_(softmax[:, 2].mean(0))
    ds.mul_(dloss / (audio.shape[0] * temperature))
    daudio = _normalize_backward(a, inverse_a, ds @ v, audio.dtype)
    return daudio, _normalize_backward(v, inverse_v, ds.t() @ a, video.dtype)


def _normalize_backward(unit, inverse, dunit, dtype):
    """Gradient of `x * inverse`; a row shorter than NORM_EPS is only scaled."""
    along = (unit * dunit).sum(1, keepdim=True).masked_fill_((inverse >= 1 / NORM_EPS).unsqueeze(1), 0)
    return (dunit - unit * along).mul_(inverse.unsqueeze(1)).to(dtype)


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(audio, video, temperature, bidirectional):
    count, statistics = audio.shape[0], torch.promote_types(audio.dtype, torch.float32)
    shapes = ((count,), (count,), (2 if bidirectional else 1, 3, count))
    loss, accuracy = audio.new_empty((), dtype=statistics), audio.new_empty((), dtype=torch.float32)
    return loss, accuracy, *(audio.new_empty(shape, dtype=statistics) for shape in shapes)


_forward = register(
    "contrastive_loss",
    "(Tensor audio, Tensor video, float temperature, bool bidirectional)"
    " -> (Tensor loss, Tensor accuracy, Tensor inverse_a, Tensor inverse_v, Tensor softmax)",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=_forward_fake,
)
_backward = register(
    "contrastive_loss_backward",
    "(Tensor dloss, Tensor audio, Tensor video, Tensor inverse_a, Tensor inverse_v, Tensor softmax, float temperature)"
    " -> (Tensor daudio, Tensor dvideo)",
    torch=_backward_torch,
    triton=_backward_triton,
    fake=lambda dloss, audio, video, *_: (torch.empty_like(audio), torch.empty_like(video)),
)


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, video, temperature, bidirectional):
        loss, accuracy, *saved = _forward(audio, video, temperature, bidirectional)
        ctx.save_for_backward(audio, video, *saved)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx, dloss, _):
        return *_backward(dloss.contiguous(), *ctx.saved_tensors, ctx.temperature), None, None


def contrastive_loss(
    audio: Tensor, video: Tensor, temperature: float = 0.05, bidirectional: bool = False
) -> tuple[Tensor, Tensor]:
    """InfoNCE between matching rows of audio and video `[N, D]`, and the share of rows whose best match is their own.

    One direction, as published: for each video a softmax over the audios. `bidirectional` takes the mean of both.
    Returns `(loss, accuracy)`, float32 scalars (loss float64 for float64 inputs); accuracy carries no gradient, and of
    equal similarities the first counts, as in torch.argmax. Raises ValueError or TypeError when an argument does not
    fit.
    """
    for name, value in (("audio", audio), ("video", video)):
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}; it must be floating-point")
        if value.dim() != 2 or 0 in value.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be [N, D], neither of them 0")
    if audio.shape != video.shape:
        raise ValueError(f"video has shape {list(video.shape)}; audio has {list(audio.shape)}")
    if audio.dtype != video.dtype:
        raise TypeError(f"video is {video.dtype}; audio is {audio.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return _ContrastiveLoss.apply(audio.contiguous(), video.contiguous(), float(temperature), bidirectional)
