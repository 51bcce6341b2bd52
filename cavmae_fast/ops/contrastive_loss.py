"""InfoNCE between matching rows of audio and video, and how often the best match is the own one.

    s[i, j] = a_i . v_j / (|a_i| |v_j| temperature)            a, v [N, D]; norms at least 1e-12
    loss    = mean over j of logsumexp_i s[i, j] - s[j, j]     for each video a softmax over the audios, as published
    accuracy = share of j with argmax_i s[i, j] = j            (bidirectional: the means of both directions)

Backward, with p[i, j] = exp(s[i, j] - logsumexp_i s[i, j]) (bidirectional: the mean of both softmaxes):

    ds = (p - identity) * dloss / N,   d(a / |a|) = ds (v / |v|) / temperature,   and likewise for v

No kernel keeps the N x N matrix: forward writes, for each tile of it, what the softmax needs of it (maximum, sum, argmax) and
a second kernel combines these in a fixed order; backward forms the tiles again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import register

NORM_EPS = 1e-12
"As in torch.nn.functional.normalize."


# -------------------------------------------------------------------------------------------------------- launchers


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
    axes = (0, 1) if bidirectional else (0,)
    lse = torch.stack([scores.logsumexp(axis) for axis in axes])
    right = torch.stack([scores.argmax(axis) == own for axis in axes])
    return (lse - scores.diagonal()).mean(), right.to(torch.float32).mean(), inverse_a, inverse_v, lse


def _backward_torch(dloss, audio, video, inverse_a, inverse_v, lse, temperature):
    a, v, scores = _similarity(audio, video, inverse_a, inverse_v, temperature)
    if lse.shape[0] == 1:
        ds = scores.sub_(lse[0]).exp_()
    else:
        ds = (scores - lse[0]).exp_().add_(scores.sub_(lse[1].unsqueeze(1)).exp_()).mul_(0.5)
    ds.diagonal().sub_(1)
    ds.mul_(dloss / (audio.shape[0] * temperature))
    return _normalise_backward(a, inverse_a, ds @ v, audio.dtype), _normalise_backward(v, inverse_v, ds.t() @ a, video.dtype)


def _normalise_backward(unit, inverse, dunit, dtype):
    """Gradient of `x * inverse`; a row shorter than NORM_EPS is only scaled."""
    along = (unit * dunit).sum(1, keepdim=True).masked_fill_((inverse >= 1 / NORM_EPS).unsqueeze(1), 0)
    return (dunit - unit * along).mul_(inverse.unsqueeze(1)).to(dtype)


# -------------------------------------------------------------------------------------------------- torch operators


def _forward_fake(audio, video, temperature, bidirectional):
    count, statistics = audio.shape[0], torch.promote_types(audio.dtype, torch.float32)
    shapes = ((count,), (count,), (2 if bidirectional else 1, count))
    loss, accuracy = audio.new_empty((), dtype=statistics), audio.new_empty((), dtype=torch.float32)
    return loss, accuracy, *(audio.new_empty(shape, dtype=statistics) for shape in shapes)


_forward = register(
    "contrastive_loss",
    "(Tensor audio, Tensor video, float temperature, bool bidirectional)"
    " -> (Tensor loss, Tensor accuracy, Tensor inverse_a, Tensor inverse_v, Tensor lse)",
    reference=_forward_torch, fake=_forward_fake,
)  # fmt: skip
_backward = register(
    "contrastive_loss_backward",
    "(Tensor dloss, Tensor audio, Tensor video, Tensor inverse_a, Tensor inverse_v, Tensor lse, float temperature)"
    " -> (Tensor daudio, Tensor dvideo)",
    reference=_backward_torch,
    fake=lambda dloss, audio, video, *_: (torch.empty_like(audio), torch.empty_like(video)),
)  # fmt: skip


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
    equal similarities the first counts, as in torch.argmax. Raises ValueError or TypeError when an argument does not fit.
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
