"""Sample calls of every operator, at small awkward shapes and at the models' own: for the tests of registration, for
those on a GPU, and for the parity section of the GPU suite.

    for sample in samples("real"):
        sample.function(*sample.inputs(torch.bfloat16, "cuda"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
class Sample:
    operator: str
    "Its name in `dispatch.operators`."
    case: str
    function: Callable
    "The public function, of the tensors alone."
    reference: Callable
    "The same in plain PyTorch, in the dtype of its arguments."
    draw: Callable[[Draw], list]
    explicit: Callable | None = None
    "fp32 arithmetic, rounded where the operator hands a tensor on; None: its results alone are rounded."
    low_precision_result: bool = True
    "Whether the results have the inputs' dtype (a loss has float32)."
    differentiable: bool = True
    "Whether there are gradients (features need none)."

    def __str__(self) -> str:
        return f"{self.operator}-{self.case}"

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list:
        """Arguments (tensors, lists of tensors, None), the same numbers on every device. Activations, positions and the
        weights of products have `dtype`; images, norms' weights and other parameters float32."""
        return self.draw(Draw(dtype, torch.device(device)))

    def baseline(self, dtype: torch.dtype) -> Callable:
        """What an explicit low-precision implementation gives: the measure of the error allowed."""
        if self.explicit is not None:
            return self.explicit

        def rounded(*inputs):
            results = self.reference(*_float(inputs))
            results = results if isinstance(results, tuple) else (results,)
            return tuple(r.to(dtype) if self.low_precision_result else r for r in results)

        return rounded


def _float(item):
    if isinstance(item, Tensor):
        return item.float() if item.is_floating_point() else item
    return [_float(i) for i in item] if isinstance(item, list | tuple) else item


class Draw:
    """Random inputs from one seed, drawn on the CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def fixed(self, *size: int) -> Tensor:
        """float32, without a gradient."""
        return torch.randn(*size, generator=self.generator).to(self.device)

    def low(self, *size: int, scale: float = 1.0) -> Tensor:
        return (self.fixed(*size) * scale).to(self.dtype).requires_grad_()

    def parameter(self, *size: int, shift: float = 0.0) -> Tensor:
        return (self.fixed(*size) + shift).requires_grad_()

    def bytes(self, *size: int) -> Tensor:
        return torch.randint(256, size, generator=self.generator, dtype=torch.uint8).to(self.device)

    def order(self, batch: int, length: int) -> Tensor:
        """A permutation of 0..length-1 for each sample."""
        return torch.rand(batch, length, generator=self.generator).argsort(1).to(self.device)


# ------------------------------------------------------------------------------------------ one function an operator


def _layer_norm(case: str, layout: StreamLayout, width: int, delta: bool) -> Sample:
    def draw(d: Draw) -> list:
        streams = range(len(layout.lengths))
        return [
            d.low(layout.rows, width), d.low(layout.rows, width) if delta else None,
            [d.parameter(width, shift=1.0) for _ in streams], [d.parameter(width) for _ in streams],
        ]  # fmt: skip

    return Sample(
        "stream_layer_norm", case,
        lambda *args: stream_layer_norm(*args, layout),
        lambda *args: reference.stream_layer_norm(*args, layout.rows_per_stream),
        draw,
    )  # fmt: skip


def _linear(case: str, layout: StreamLayout, k: int, n: int, shared: bool, gelu: bool) -> Sample:
    function, plain = (linear_gelu, reference.linear_gelu) if gelu else (stream_linear, reference.stream_linear)

    def draw(d: Draw) -> list:
        count = 1 if shared else len(layout.lengths)
        weights = [d.low(n, k, scale=k**-0.5) for _ in range(count)]
        return [d.low(layout.rows, k), weights, [d.low(n) for _ in range(count)]]

    return Sample(
        "linear_gelu" if gelu else "stream_linear", case,
        lambda *args: function(*args, layout),
        lambda *args: plain(*args, layout.rows_per_stream),
        draw,
    )  # fmt: skip


def _attention(case: str, layout: StreamLayout, heads: int, width: int) -> Sample:
    d_model, batch, lengths = heads * width, layout.batch, layout.lengths
    return Sample(
        "attention", case,
        lambda qkv: attention(qkv, layout, heads),
        lambda qkv: reference.packed_attention(qkv[:, :d_model], qkv[:, d_model:], batch, lengths, lengths, heads),
        lambda d: [d.low(layout.rows, 3 * d_model)],
    )  # fmt: skip


def _query_attention(case: str, queries: StreamLayout, layout: StreamLayout, heads: int, width: int) -> Sample:
    d_model = heads * width
    return Sample(
        "attention", case,
        lambda q, kv: query_attention(q, kv, queries, layout, heads),
        lambda q, kv: reference.packed_attention(q, kv, layout.batch, queries.lengths, layout.lengths, heads),
        lambda d: [d.low(queries.rows, d_model), d.low(layout.rows, 2 * d_model)],
    )  # fmt: skip


def _gather(case: str, batch: int, length: int, taken: int, width: int) -> Sample:
    return Sample(
        "gather_tokens", case, gather_tokens, reference.gather_tokens,
        lambda d: [d.low(batch * length, width), d.order(batch, length)[:, :taken].contiguous()],
    )  # fmt: skip


def _scatter(case: str, batch: int, length: int, kept: int, width: int) -> Sample:
    def draw(d: Draw) -> list:
        order = d.order(batch, length)
        places = torch.where(order < kept, order, -1)
        return [d.low(batch * kept, width), places, d.parameter(width), d.low(length, width)]

    return Sample("scatter_tokens", case, scatter_tokens, reference.scatter_tokens, draw)


def _embed(
    case: str, images: tuple[int, int, int, int], p: int, kept: int | None, width: int, pixels: bool = False
) -> Sample:
    batch, channels, height, columns = images
    length = (height // p) * (columns // p)

    def draw(d: Draw) -> list:
        ids = None if kept is None else d.order(batch, length)[:, :kept].contiguous()
        weight = d.low(width, channels, p, p, scale=(channels * p * p) ** -0.5)
        drawn = d.bytes(*images) if pixels else d.fixed(*images)
        return [drawn, ids, weight, d.parameter(width), d.low(length, width), d.parameter(width)]

    def explicit(pixels, ids, weight, bias, pos, modality):
        """Pixels and projection are rounded to the weight's dtype."""
        dtype = weight.dtype
        pixels = reference.normalize_images(pixels, torch.float32)
        projected = F.conv2d(pixels.to(dtype).float(), weight.float(), stride=p).to(dtype).float()
        tokens = projected.flatten(2).transpose(1, 2) + pos.float() + bias + modality
        if ids is not None:
            tokens = reference.take_tokens(tokens, ids)
        return tokens.flatten(0, 1).to(pos.dtype)

    return Sample("embed_kept_patches", case, embed_kept_patches, reference.embed_kept_patches, draw, explicit)


def _mse(
    case: str, images: tuple[int, int, int, int], p: int, removed: int, norm: bool, pixels: bool = False
) -> Sample:
    batch, channels, height, columns = images

    def draw(d: Draw) -> list:
        ids = d.order(batch, (height // p) * (columns // p))[:, :removed].contiguous()
        return [d.low(batch, removed, p * p * channels), d.bytes(*images) if pixels else d.fixed(*images), ids]

    return Sample(
        "masked_patch_mse", case,
        lambda *args: masked_patch_mse(*args, p, norm),
        lambda *args: reference.masked_patch_mse(*args, p, norm),
        draw, low_precision_result=False,
    )  # fmt: skip


def _contrastive(case: str, count: int, width: int, bidirectional: bool) -> Sample:
    def draw(d: Draw) -> list:
        audio = d.fixed(count, width)
        video = 0.1 * audio + d.fixed(count, width)
        return [x.to(d.dtype).requires_grad_() for x in (audio, video)]

    def explicit(audio, video):
        """The normalized rows are rounded to the inputs' dtype."""
        units = (F.normalize(x.float(), dim=-1).to(x.dtype).float() for x in (audio, video))
        return reference.contrastive_loss(*units, bidirectional=bidirectional)

    return Sample(
        "contrastive_loss", case,
        lambda *args: contrastive_loss(*args, bidirectional=bidirectional),
        lambda *args: reference.contrastive_loss(*args, bidirectional=bidirectional),
        draw, explicit, low_precision_result=False,
    )  # fmt: skip


def _log_mel(case: str, batch: int, samples: int) -> Sample:
    return Sample(
        "log_mel_fbank", case, log_mel_fbank, fbank.log_mel_fbank,
        lambda d: [0.1 * d.fixed(batch, samples)],
        low_precision_result=False, differentiable=False,
    )  # fmt: skip


def _log_mel_features(case: str, counts: list[int], length: int) -> Sample:
    """int16 sound of clips of different lengths."""

    def exact(waveform, num_samples):
        return fbank.log_mel_features(waveform.double() / 32768, num_samples, length, -5.081, 4.4849)

    def draw(d: Draw) -> list:
        waveform = (3000 * d.fixed(len(counts), max(counts))).round().to(torch.int16)
        return [waveform, torch.tensor(counts, device=d.device)]

    return Sample(
        "log_mel_fbank", case,
        lambda waveform, num_samples: log_mel_features(waveform, num_samples, length, -5.081, 4.4849), exact, draw,
        lambda *inputs: fbank.log_mel_features(*inputs, length, -5.081, 4.4849), differentiable=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the samples


def samples(size: str) -> list[Sample]:
    """Sample calls of every operator: 'small' (some milliseconds each) or 'real' (the shapes of ViT-B, 8 samples)."""
    return {"small": _small, "real": _real}[size]()


def _small() -> list[Sample]:
    three, two, one = StreamLayout(2, (3, 7, 10)), StreamLayout(3, (1, 5)), StreamLayout(2, (11,))
    return [
        _layer_norm("delta", three, 24, True),
        _layer_norm("alone", one, 33, False),
        _linear("shared", three, 24, 40, True, False),
        _linear("streams", two, 17, 33, False, False),
        _linear("shared", three, 24, 40, True, True),
        _linear("streams", two, 17, 33, False, True),
        _attention("packed", three, 2, 16),
        _query_attention("queries", StreamLayout(2, (5,)), one, 2, 16),
        _gather("some", 2, 11, 5, 24),
        _scatter("some", 2, 11, 5, 24),
        _embed("kept", (2, 3, 12, 8), 4, 3, 24),
        _embed("all", (2, 1, 8, 12), 4, None, 24),
        _embed("bytes", (2, 3, 8, 12), 4, 3, 24, pixels=True),
        _mse("normalized", (2, 3, 12, 8), 4, 4, True),
        _mse("plain", (2, 1, 8, 12), 4, 3, False),
        _mse("bytes", (2, 3, 8, 12), 4, 3, True, pixels=True),
        _contrastive("one-way", 33, 24, False),
        _contrastive("both-ways", 17, 33, True),
        _log_mel("waveform", 2, 1000),
        _log_mel_features("features", [800, 400, 1100], 6),
    ]


def _real() -> list[Sample]:
    shared, encoders, decoder = (StreamLayout(8, lengths) for lengths in ((128, 49, 177), (128, 49), (708,)))
    spectrogram, frame = (8, 1, 1024, 128), (8, 3, 224, 224)
    return [
        _layer_norm("shared", shared, 768, True),
        _layer_norm("decoder", decoder, 512, True),
        _layer_norm("alone", decoder, 512, False),
        _linear("shared-qkv", shared, 768, 2304, True, False),
        _linear("encoders-qkv", encoders, 768, 2304, False, False),
        _linear("decoder-fc2", decoder, 2048, 512, True, False),
        _linear("shared-fc1", shared, 768, 3072, True, True),
        _linear("encoders-fc1", encoders, 768, 3072, False, True),
        _linear("decoder-fc1", decoder, 512, 2048, True, True),
        _attention("shared", shared, 12, 64),
        _attention("encoders", encoders, 12, 64),
        _attention("decoder", decoder, 16, 32),
        _query_attention("decoder-last", StreamLayout(8, (531,)), decoder, 16, 32),
        _gather("decoder", 8, 708, 531, 512),
        _scatter("decoder", 8, 708, 177, 512),
        _embed("audio", spectrogram, 16, 128, 768),
        _embed("video", frame, 16, 49, 768),
        _embed("video-all", frame, 16, None, 768),
        _embed("video-bytes", frame, 16, 49, 768, pixels=True),
        _mse("audio", spectrogram, 16, 384, True),
        _mse("video", frame, 16, 147, True),
        _mse("video-plain", frame, 16, 147, False),
        _mse("video-bytes", frame, 16, 147, True, pixels=True),
        _contrastive("one-way", 256, 768, False),
        _contrastive("both-ways", 97, 768, True),
        _log_mel("waveform", 8, 163840),
        _log_mel_features("features", [163840, 160000, 48000, 400], 1024),
    ]
