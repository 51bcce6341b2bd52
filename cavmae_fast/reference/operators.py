"""Every operator as a short function of plain, differentiable PyTorch: the specification and the tests' oracle.

All of them work in any floating dtype (float64 for oracles) and on any device.
`rows` lists how many rows of a packed `[rows, width]` buffer belong to each token stream, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.clip import IMAGE_MEAN, IMAGE_STD


def stream_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[int],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`x + delta`, and its LayerNorm with each stream's own weight and bias. x, delta `[R, D]`; weights, biases `[D]`."""
    if delta is not None:
        x = x + delta
    parts = [F.layer_norm(part, part.shape[-1:], w, b, eps) for part, w, b in zip(x.split(list(rows)), weights, biases)]
    return x, torch.cat(parts)


def stream_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """`x W^T + b` with one weight for all rows, or one for each stream. x `[R, K]`, weights `[N, K]` -> `[R, N]`."""
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0])
    return torch.cat([F.linear(part, w, b) for part, w, b in zip(x.split(list(rows)), weights, biases)])


def linear_gelu(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """`gelu(x W^T + b)` with the exact (erf) GELU; arguments as in `stream_linear`."""
    return F.gelu(stream_linear(x, weights, biases, rows))


def hidden_gradient(dout: Tensor, pre: Tensor, weights: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the layer `gelu(pre) W^T` hands back to pre, dout `[R, M]`, weights `[M, N]`, one or one for each stream -> (dpre
    `[R, N]`, its sums over each stream's rows `[streams, N]`)."""
    ranges = list(rows) if len(weights) > 1 else [len(dout)]
    dy = torch.cat([part @ w for part, w in zip(dout.split(ranges), weights)])
    slope = 0.5 * (1 + torch.erf(pre / 2**0.5)) + pre * torch.exp(-pre * pre / 2) / (2 * torch.pi) ** 0.5
    dpre = dy * slope
    return dpre, torch.stack([part.sum(0) for part in dpre.split(ranges)])


def weight_gradient(dout: Tensor, x: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `stream_linear` hands back to its weights and biases, dout `[R, N]`, x `[R, K]` -> (`[streams, N, K]`, `[streams,
    N]`)."""
    parts = list(zip(dout.split(list(rows)), x.split(list(rows))))
    return torch.stack([d.t() @ part for d, part in parts]), torch.stack([d.sum(0) for d, _ in parts])


def fp8_rows(x: Tensor, *, gradients: bool = False) -> Tensor:
    """x `[R, K]` as e4m3 holds it: each row over the least power of two that brings it to at most 448 = 1.75 * 2^8, rounded
    to steps of an eighth of the power of two below each number (and of 2^-6 at least). `gradients`: as e5m2 does, of at most
    1.75 * 2^15, to steps of a quarter (and of 2^-14 at least)."""
    exponent, least, mantissa = (15, -14, 2) if gradients else (8, -6, 3)
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, (largest / (1.75 * 2**exponent)).log2().ceil().exp2(), 1.0)
    scaled = x / scale
    step = (scaled.abs().log2().floor().clamp(min=least) - mantissa).exp2()
    return (scaled / step).round() * step * scale


def attention(q: Tensor, k: Tensor, v: Tensor, implementation: str = "eager") -> Tensor:
    """`softmax(q k^T / sqrt(width)) v` for q `[..., Lq, width]`, k and v `[..., Lk, width]`.

    `implementation`: 'eager' forms the matrix of probabilities, as the published code does; 'sdpa' calls PyTorch's
    `scaled_dot_product_attention`.
    """
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v


def packed_attention(q: Tensor, kv: Tensor, batch: int, q_lengths: Sequence[int], lengths: Sequence[int], heads: int):
    """Multi-head attention of packed streams, each sample of each stream on its own.

    q `[batch * sum(q_lengths), D]`, kv `[batch * sum(lengths), 2 D]` (keys, then values) -> `[batch * sum(q_lengths), D]`.
    """
    width = q.shape[-1] // heads
    outputs = []
    q_parts = q.split([batch * n for n in q_lengths])
    kv_parts = kv.split([batch * n for n in lengths])
    for q_part, kv_part, q_length, length in zip(q_parts, kv_parts, q_lengths, lengths):
        qs = q_part.reshape(batch, q_length, heads, width).transpose(1, 2)
        ks, vs = kv_part.reshape(batch, length, 2, heads, width).permute(2, 0, 3, 1, 4)
        outputs.append(attention(qs, ks, vs).transpose(1, 2).reshape(batch * q_length, heads * width))
    return torch.cat(outputs)


def normalize_images(
    images: Tensor, dtype: torch.dtype, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD
) -> Tensor:
    """uint8 RGB images `[B, 3, ..., H, W]` -> `(x / 255 - mean) / std` by color, computed in float32 (float64 for float64)
    and rounded to `dtype`. Images of any other dtype are returned as they are."""
    if images.dtype != torch.uint8:
        return images
    exact = torch.promote_types(dtype, torch.float32)
    means, stds = (
        torch.tensor(v, dtype=exact, device=images.device).view(3, *[1] * (images.dim() - 2)) for v in (mean, std)
    )
    return ((images.to(exact) / 255 - means) / stds).to(dtype)


def patchify(images: Tensor, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """images `[B, C, H, W]` -> patches `[B, (H/p) * (W/p), p * p * C]`, each patch in (row, column, channel) order; clips
    `[B, C, F, H, W]` -> `[B, (F/t) * (H/p) * (W/p), t * p * p * C]`, in (frame, row, column, channel) order."""
    batch, channels, *frames, height, width = images.shape
    p, t = patch_size, tubelet_size
    grid = images.reshape(batch, channels, *([frames[0] // t, t] if frames else [1, 1]), height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, -1, t * p * p * channels)


def unpatchify(patches: Tensor, channels: int, grid_height: int, grid_width: int, patch_size: int) -> Tensor:
    """The inverse of `patchify` for images: `[B, grid_height * grid_width, p * p * C]` -> `[B, C, H, W]`."""
    return unpatchify_clips(patches, channels, (1, grid_height, grid_width), patch_size, 1).squeeze(2)


def unpatchify_clips(
    patches: Tensor, channels: int, grid: tuple[int, int, int], patch_size: int, tubelet_size: int
) -> Tensor:
    """The inverse of `patchify` for clips of `grid` patches (along frames, rows, columns): -> `[B, C, F, H, W]`."""
    (f, h, w), p, t = grid, patch_size, tubelet_size
    pixels = patches.reshape(patches.shape[0], f, h, w, t, p, p, channels)
    return pixels.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(patches.shape[0], channels, f * t, h * p, w * p)


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x `[B, L, D]`, ids `[B, M]` -> `[B, M, D]`: token `ids[b, m]` of sample `b`."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


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

    images `[B, C, H, W]` (uint8: normalized first), ids_keep `[B, K]` (None: all, in order), weight `[D, C, p, p]`, bias
    and modality `[D]` (None: no modality), pos `[L, D]` -> `[B * K, D]`. Or clips `[B, C, F, H, W]`, weight
    `[D, C, t, p, p]`.
    """
    images = normalize_images(images, torch.promote_types(weight.dtype, torch.float32), image_mean, image_std)
    convolution = F.conv2d if weight.dim() == 4 else F.conv3d
    tokens = convolution(images.to(weight.dtype), weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = tokens + pos if modality is None else tokens + pos + modality
    if ids_keep is not None:
        tokens = take_tokens(tokens, ids_keep)
    return tokens.reshape(-1, tokens.shape[-1])


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x `[B * L, D]`, ids `[B, M]` -> `[B * M, D]`: row `ids[b, m]` of each sample."""
    return take_tokens(x.unflatten(0, (ids.shape[0], -1)), ids).flatten(0, 1)


def scatter_tokens(x: Tensor, places: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Kept tokens at their places, the mask token elsewhere, + position.

    x `[B * K, D]`, places `[B, L]` (which of the sample's K tokens stands at place l; negative: none),
    mask_token `[D]`, pos `[L, D]` -> `[B * L, D]`.
    """
    tokens = take_tokens(x.unflatten(0, (places.shape[0], -1)), places.clamp(min=0))
    tokens = torch.where((places >= 0).unsqueeze(-1), tokens, mask_token.to(tokens.dtype))
    return (tokens + pos).flatten(0, 1)


def distinct_tokens(x: Tensor, ids: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Kept tokens at their positions, and behind them the mask token at every position.

    x `[B * K, D]`, ids `[B, K]` (at which place each token stands), mask_token `[D]`, pos `[L, D]` -> `[B * K + L, D]`.
    """
    return torch.cat([x + pos[ids.flatten()], mask_token + pos])


def scatter_distinct(x: Tensor, places: Tensor) -> Tensor:
    """Every sample's tokens from those that differ, which lie as `distinct_tokens` returns them.

    x `[B * K + L, D]`, places `[B, L]` (which of the sample's K tokens stands at place l; negative: the shared one)
    -> `[B * L, D]`.
    """
    batch, length = places.shape
    tokens = take_tokens(x[:-length].unflatten(0, (batch, -1)), places.clamp(min=0))
    return torch.where((places >= 0).unsqueeze(-1), tokens, x[-length:]).flatten(0, 1)


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
    """Mean squared error between predicted and true patches, over the removed patches alone; a scalar.

    pred `[B, M, p * p * C]` for the patches `ids_removed [B, M]` of images `[B, C, H, W]` (uint8: normalized first, as
    images); for clips `[B, C, F, H, W]` and patches of t = `tubelet_size` frames, `[B, M, t * p * p * C]`. With
    `norm_pix_loss` each true patch is normalized too: minus its mean, over the root of (its unbiased variance + 1e-6).
    """
    images = normalize_images(images, torch.promote_types(pred.dtype, torch.float32), image_mean, image_std)
    target = take_tokens(patchify(images, patch_size, tubelet_size), ids_removed)
    if norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (pred - target).square().mean()


def contrastive_loss(
    audio: Tensor, video: Tensor, temperature: float = 0.05, bidirectional: bool = False
) -> tuple[Tensor, Tensor]:
    """InfoNCE between matching rows of audio and video `[N, D]`, and the share of rows whose best match is their own.

    One direction, as published: for each video a softmax over the audios. `bidirectional` takes the mean of both.
    """
    similarity = F.normalize(audio, dim=-1) @ F.normalize(video, dim=-1).T / temperature  # [audio, video]
    own = torch.arange(similarity.shape[0], device=similarity.device)

    def one_way(scores: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(scores, own), (scores.argmax(dim=1) == own).to(torch.float32).mean()

    loss, accuracy = one_way(similarity.T)
    if bidirectional:
        other_loss, other_accuracy = one_way(similarity)
        loss, accuracy = (loss + other_loss) / 2, (accuracy + other_accuracy) / 2
    return loss, accuracy


def adam_update(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam (Kingma & Ba, 2015), number `step` (from 1) -> weight and both moments after it. `decoupled`: the
    weight decay of AdamW (Loshchilov & Hutter, 2019), else L2 regularization."""
    p = p * (1 - lr * weight_decay) if decoupled else p
    grad = grad if decoupled else grad + weight_decay * p
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    return p - lr * m / (1 - beta1**step) / denominator, m, v
