"""Calls of every operator at the models' shapes and in a training step's dtypes, with what each must move and multiply.

Bytes: every input read once, every output written once; in the backward pass also what forward must have kept.
Operations as in `flops`. The larger of bytes over copy bandwidth and operations over GEMM rate is the shortest time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import common  # noqa: F401  (puts the checkout on the path)
import torch
from torch import Tensor

from cavmae_fast.ops.attention import attention, query_attention
from cavmae_fast.ops.contrastive_loss import contrastive_loss
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.gather_tokens import gather_tokens
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.log_mel_fbank import log_mel_fbank, log_mel_features
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse
from cavmae_fast.ops.scatter_tokens import scatter_tokens
from cavmae_fast.ops.stream_layer_norm import stream_layer_norm
from cavmae_fast.ops.stream_linear import stream_linear
from cavmae_fast.reference import fbank
from cavmae_fast.reference import operators as reference


@dataclass(frozen=True)
class Sizes:
    """Token counts and widths: ViT-B at 75 % masking by default."""

    image: int = 224
    frames: int = 1024
    patch: int = 16
    width: int = 768
    heads: int = 12
    decoder_width: int = 512
    decoder_heads: int = 16
    seconds: float = 10.0

    @property
    def all_a(self) -> int:
        return self.frames * 128 // self.patch**2

    @property
    def all_v(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def kept_a(self) -> int:
        return self.all_a // 4

    @property
    def kept_v(self) -> int:
        return self.all_v // 4

    @property
    def total(self) -> int:
        return self.all_a + self.all_v

    @property
    def kept(self) -> int:
        return self.kept_a + self.kept_v


BASE = Sizes()
TINY = Sizes(image=64, frames=32, width=32, heads=2, decoder_width=32, decoder_heads=2, seconds=0.2)


@dataclass(frozen=True)
class Case:
    """One call. `ours` and `eager` (what one writes in plain PyTorch for the same result) take `inputs`."""

    operator: str
    name: str
    inputs: list
    ours: Callable
    eager: Callable
    forward_bytes: int
    backward_bytes: int
    forward_flops: float = 0.0
    attention_of: tuple = field(default=(), repr=False)
    "For attention: (query layout, layout, heads)."
    capture: bool = True
    "False: PyTorch's version copies from the host, which a CUDA graph cannot hold."

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in flatten(self.inputs) if isinstance(t, Tensor) and t.requires_grad]


def flatten(items: list | tuple) -> list:
    return [leaf for item in items for leaf in (flatten(item) if isinstance(item, list | tuple) else [item])]


def outputs_of(result: Tensor | tuple) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Draw:
    """Random tensors on `device` from one seed; `dtype` is that of the matrix products."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def fixed(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def leaf(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (self.fixed(*shape) * scale).to(dtype or self.dtype).requires_grad_()

    def full(self, *shape: int) -> Tensor:
        return self.leaf(*shape, dtype=torch.float32)

    def order(self, batch: int, length: int) -> Tensor:
        return torch.rand(batch, length, device=self.device, generator=self.generator).argsort(1)


# ------------------------------------------------------------------------------------------ one function an operator


def _layer_norm(d: Draw, name: str, layout: StreamLayout, width: int) -> Case:
    """The residual stream in float32, its update and the result in the products' dtype."""
    x, delta = d.full(layout.rows, width), d.leaf(layout.rows, width)
    weights, biases = ([d.full(width) for _ in layout.lengths] for _ in range(2))

    def eager(x, delta, weights, biases):
        x, y = reference.stream_layer_norm(x, delta, weights, biases, layout.rows_per_stream)
        return x, y.to(delta.dtype)

    return Case(
        "stream_layer_norm", name, [x, delta, weights, biases],
        lambda *args: stream_layer_norm(*args, layout, 1e-5, d.dtype), eager,
        forward_bytes=2 * size(x, delta),  # x and delta; the sum and its norm
        backward_bytes=3 * size(x) + 2 * size(delta),  # dy, the sum's gradient, the sum; dx, ddelta
    )  # fmt: skip


def _linear(d: Draw, name: str, layout: StreamLayout, k: int, n: int, weights: int, gelu: bool) -> Case:
    x = d.leaf(layout.rows, k)
    ws, bs = [d.leaf(n, k, scale=k**-0.5) for _ in range(weights)], [d.leaf(n) for _ in range(weights)]
    function, plain = (linear_gelu, reference.linear_gelu) if gelu else (stream_linear, reference.stream_linear)
    out = layout.rows * n * x.element_size()
    return Case(
        "linear_gelu" if gelu else "stream_linear", name, [x, ws, bs],
        lambda *args: function(*args, layout),
        lambda *args: plain(*args, layout.rows_per_stream),
        forward_bytes=size(x, *ws) + out * (2 if gelu else 1),
        backward_bytes=2 * size(x, *ws) + out * (2 if gelu else 1),
        forward_flops=2.0 * layout.rows * k * n,
    )  # fmt: skip


def _attention(d: Draw, name: str, queries: StreamLayout, layout: StreamLayout, width: int, heads: int) -> Case:
    """Packed qkv when the layouts are one, else queries on their own."""
    flops = sum(4.0 * layout.batch * a * b * width for a, b in zip(queries.lengths, layout.lengths))
    if queries == layout:
        inputs = [d.leaf(layout.rows, 3 * width)]

        def ours(qkv):
            return attention(qkv, layout, heads)

        def eager(qkv):
            lengths = layout.lengths
            return reference.packed_attention(qkv[:, :width], qkv[:, width:], layout.batch, lengths, lengths, heads)
    else:
        inputs = [d.leaf(queries.rows, width), d.leaf(layout.rows, 2 * width)]

        def ours(q, kv):
            return query_attention(q, kv, queries, layout, heads)

        def eager(q, kv):
            return reference.packed_attention(q, kv, layout.batch, queries.lengths, layout.lengths, heads)

    out = queries.rows * width * inputs[0].element_size()
    return Case(
        "attention", name, inputs, ours, eager,
        forward_bytes=size(*inputs) + out, backward_bytes=2 * size(*inputs) + 2 * out, forward_flops=flops,
        attention_of=(queries, layout, heads),
    )  # fmt: skip


def _gather(d: Draw, name: str, batch: int, length: int, taken: int, width: int) -> Case:
    x, ids = d.leaf(batch * length, width), d.order(batch, length)[:, :taken].contiguous()
    out = batch * taken * width * x.element_size()
    return Case(
        "gather_tokens", name, [x, ids], gather_tokens, reference.gather_tokens,
        forward_bytes=2 * out + size(ids), backward_bytes=out + size(x, ids),
    )  # fmt: skip


def _scatter(d: Draw, name: str, batch: int, length: int, kept: int, width: int) -> Case:
    order = d.order(batch, length)
    x, places = d.leaf(batch * kept, width), torch.where(order < kept, order, -1)
    mask_token, pos = d.full(width), d.full(length, width)
    out = batch * length * width * pos.element_size()
    return Case(
        "scatter_tokens", name, [x, places, mask_token, pos], scatter_tokens, reference.scatter_tokens,
        forward_bytes=size(x, places, pos) + out, backward_bytes=size(x, places, pos) + out,
    )  # fmt: skip


def _embed(d: Draw, name: str, images: Tensor, patch: int, length: int, kept: int, width: int) -> Case:
    batch, channels = images.shape[:2]
    ids = d.order(batch, length)[:, :kept].contiguous()
    weight = d.leaf(width, channels, patch, patch, scale=(channels * patch * patch) ** -0.5)
    bias, pos, modality = d.full(width), d.fixed(length, width), d.full(width)  # positions are fixed, as published
    pixels = size(images) * kept // length
    patches = batch * kept * channels * patch**2 * weight.element_size()
    out = batch * kept * width * pos.element_size()

    def eager(images, ids, weight, bias, pos, modality):
        return reference.embed_kept_patches(images, ids, weight, bias.to(weight.dtype), pos, modality)

    return Case(
        "embed_kept_patches", name, [images, ids, weight, bias, pos, modality], embed_kept_patches, eager,
        forward_bytes=pixels + patches + size(ids, weight, pos) + out, backward_bytes=patches + size(weight) + out,
        forward_flops=2.0 * batch * kept * weight.numel(),
    )  # fmt: skip


def _mse(d: Draw, name: str, images: Tensor, patch: int, length: int, removed: int) -> Case:
    batch, channels = images.shape[:2]
    ids = d.order(batch, length)[:, :removed].contiguous()
    pred = d.leaf(batch, removed, patch**2 * channels)
    pixels = size(images) * removed // length
    return Case(
        "masked_patch_mse", name, [pred, images, ids],
        lambda *args: masked_patch_mse(*args, patch, True),
        lambda *args: reference.masked_patch_mse(*args, patch, True),
        forward_bytes=size(pred, ids) + pixels, backward_bytes=2 * size(pred) + size(ids) + pixels,
    )  # fmt: skip


def _contrastive(d: Draw, name: str, batch: int, width: int) -> Case:
    audio, video = d.full(batch, width), d.full(batch, width)
    return Case(
        "contrastive_loss", name, [audio, video], contrastive_loss, reference.contrastive_loss,
        forward_bytes=size(audio, video), backward_bytes=2 * size(audio, video),
        forward_flops=2.0 * batch * batch * width,
    )  # fmt: skip


def _fbank(d: Draw, name: str, batch: int, seconds: float) -> Case:
    waveform = 0.1 * d.fixed(batch, int(16000 * seconds))
    out = batch * fbank.num_frames(waveform.shape[1]) * 128 * waveform.element_size()
    return Case(
        "log_mel_fbank", name, [waveform], log_mel_fbank, fbank.log_mel_fbank,
        forward_bytes=size(waveform) + out, backward_bytes=0, capture=False,
    )  # fmt: skip


def _features(d: Draw, name: str, batch: int, seconds: float) -> Case:
    """int16 sound to normalized features."""
    samples = int(16000 * seconds)
    waveform = (3000 * d.fixed(batch, samples)).to(torch.int16)
    length = fbank.num_frames(samples)
    options = torch.full((batch,), samples, device=d.device), length, -5.081, 4.4849
    return Case(
        "log_mel_fbank", name, [waveform],
        lambda waveform: log_mel_features(waveform, *options), lambda waveform: fbank.log_mel_features(waveform, *options),
        forward_bytes=size(waveform) + batch * length * 128 * 4, backward_bytes=0, capture=False,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the cases


def builders(batch: int, sizes: Sizes = BASE) -> dict[str, Callable[[Draw], Case]]:
    """Name -> a function that draws the call, for `batch` samples. Nothing is allocated before it is called."""
    s = sizes
    encoders = StreamLayout(batch, (s.kept_a, s.kept_v))
    shared = StreamLayout(batch, (s.kept_a, s.kept_v, s.kept))
    decoder, removed = StreamLayout(batch, (s.total,)), StreamLayout(batch, (s.total - s.kept,))
    dw, mel = s.decoder_width, (s.frames, 128)

    def spectrogram(d: Draw) -> Tensor:
        return d.fixed(batch, *mel).unsqueeze(1).transpose(2, 3)

    def frame(d: Draw) -> Tensor:
        return d.fixed(batch, 3, s.image, s.image)

    def pixels(d: Draw) -> Tensor:
        """uint8, channels last in memory, as decoders give them."""
        shape = batch, s.image, s.image, 3
        drawn = torch.randint(256, shape, dtype=torch.uint8, device=d.device, generator=d.generator)
        return drawn.permute(0, 3, 1, 2)

    return {
        "stream_layer_norm-encoders": lambda d: _layer_norm(d, "encoders", encoders, s.width),
        "stream_layer_norm-shared": lambda d: _layer_norm(d, "shared", shared, s.width),
        "stream_layer_norm-decoder": lambda d: _layer_norm(d, "decoder", decoder, dw),
        "stream_linear-encoders-qkv": lambda d: _linear(d, "encoders-qkv", encoders, s.width, 3 * s.width, 2, False),
        "stream_linear-decoder-fc2": lambda d: _linear(d, "decoder-fc2", decoder, 4 * dw, dw, 1, False),
        "linear_gelu-encoders-fc1": lambda d: _linear(d, "encoders-fc1", encoders, s.width, 4 * s.width, 2, True),
        "linear_gelu-decoder-fc1": lambda d: _linear(d, "decoder-fc1", decoder, dw, 4 * dw, 1, True),
        "attention-encoders": lambda d: _attention(d, "encoders", encoders, encoders, s.width, s.heads),
        "attention-shared": lambda d: _attention(d, "shared", shared, shared, s.width, s.heads),
        "attention-decoder": lambda d: _attention(d, "decoder", decoder, decoder, dw, s.decoder_heads),
        "attention-decoder-last": lambda d: _attention(d, "decoder-last", removed, decoder, dw, s.decoder_heads),
        "gather_tokens-decoder": lambda d: _gather(d, "decoder", batch, s.total, s.total - s.kept, dw),
        "scatter_tokens-decoder": lambda d: _scatter(d, "decoder", batch, s.total, s.kept, dw),
        "embed_kept_patches-audio": lambda d: _embed(d, "audio", spectrogram(d), s.patch, s.all_a, s.kept_a, s.width),
        "embed_kept_patches-video": lambda d: _embed(d, "video", frame(d), s.patch, s.all_v, s.kept_v, s.width),
        "embed_kept_patches-bytes": lambda d: _embed(d, "bytes", pixels(d), s.patch, s.all_v, s.kept_v, s.width),
        "masked_patch_mse-audio": lambda d: _mse(d, "audio", spectrogram(d), s.patch, s.all_a, s.all_a - s.kept_a),
        "masked_patch_mse-video": lambda d: _mse(d, "video", frame(d), s.patch, s.all_v, s.all_v - s.kept_v),
        "masked_patch_mse-bytes": lambda d: _mse(d, "bytes", pixels(d), s.patch, s.all_v, s.all_v - s.kept_v),
        "contrastive_loss-batch": lambda d: _contrastive(d, "batch", batch, s.width),
        "log_mel_fbank-clips": lambda d: _fbank(d, "clips", batch, s.seconds),
        "log_mel_fbank-features": lambda d: _features(d, "features", batch, s.seconds),
    }


def draw(name: str, batch: int, dtype: torch.dtype, device: torch.device, sizes: Sizes = BASE, seed: int = 0) -> Case:
    """The call `name` of `builders` for `batch` samples."""
    return builders(batch, sizes)[name](Draw(dtype, device, seed))
