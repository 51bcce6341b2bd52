"""Launcher calls whose kernels are compiled ahead of time, on CPU tensors.

The shapes are the real ones (they decide how arguments are specialized), with a batch of 2 where the batch is an
argument, and once with everything that can be 1 equal to 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch

from cavmae_fast.clip import IMAGE_MEAN, IMAGE_STD
from cavmae_fast.ops import (
    attention_backward,
    attention_forward,
    attention_tiles,
    configuration,
    dgelu_bias,
    fp8,
    layer_norm_kernels,
    product_kernels,
)
from cavmae_fast.ops.pixels import scale_and_shift

# The files, not the public functions that `cavmae_fast.ops` has under the same names.
(
    adam_update,
    contrastive_loss,
    distinct_tokens,
    embed_kept_patches,
    gather_tokens,
    log_mel_fbank,
    masked_patch_mse,
    scatter_tokens,
    stream_tiles,
) = (
    importlib.import_module(f"cavmae_fast.ops.{name}")
    for name in (
        "adam_update",
        "contrastive_loss",
        "distinct_tokens",
        "embed_kept_patches",
        "gather_tokens",
        "log_mel_fbank",
        "masked_patch_mse",
        "scatter_tokens",
        "stream_tiles",
    )
)

CASES: dict[str, Callable[[str], object]] = {}
"Name -> a function of the architecture whose launch configurations are taken."
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _layer_norm(dtype: torch.dtype, width: int, lengths: list[int], delta: bool, architecture: str) -> None:
    rows = sum(lengths)
    x = torch.empty(rows, width)
    low = torch.empty(rows, width, dtype=dtype)
    weights = [torch.empty(width) for _ in lengths]
    stats = torch.empty(rows)
    update = low if delta else None
    for store in (True, False) if delta else (False,):
        layer_norm_kernels.forward_triton(x, update, weights, weights, lengths, 1e-5, dtype, store, architecture)
    updates = [low] * delta
    for kept in {None, update}:
        arguments = (low, x if delta else None, x, kept, stats, stats, weights, lengths)
        layer_norm_kernels.backward_triton(*arguments, x.dtype, dtype, len(updates), dtype, architecture)
    if delta:  # the residual stream's gradient in 16 bits; and a sum of many rows
        layer_norm_kernels.backward_triton(low, low, *arguments[2:], dtype, None, 1, dtype, architecture)
        stream_tiles.sum_of_streams(torch.empty(300, 3, width), [100] * 3, 3, architecture)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"stream_layer_norm-shared-{_name}"] = partial(_layer_norm, _dtype, 768, [128, 49, 177], True)
    CASES[f"stream_layer_norm-decoder-{_name}"] = partial(_layer_norm, _dtype, 512, [708], True)
    CASES[f"stream_layer_norm-ones-{_name}"] = partial(_layer_norm, _dtype, 768, [1], False)


def _dgelu_bias(dtype: torch.dtype, width: int, rows: list[int], architecture: str) -> None:
    x = torch.empty(sum(rows), width, dtype=dtype)
    dgelu_bias.dgelu_bias_triton(x, x, rows, dtype, architecture)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"dgelu_bias-encoder-{_name}"] = partial(_dgelu_bias, _dtype, 3072, [128, 49])
    CASES[f"dgelu_bias-decoder-{_name}"] = partial(_dgelu_bias, _dtype, 2048, [708])
    CASES[f"dgelu_bias-ones-{_name}"] = partial(_dgelu_bias, _dtype, 1, [1])


def _products(dtype: torch.dtype, k: int, n: int, rows: list[int], keep: bool, architecture: str) -> None:
    """fc1 of width k -> n with its GELU, and the gradient of fc2 n -> k through it."""
    x, pre = torch.empty(sum(rows), k, dtype=dtype), torch.empty(sum(rows), n, dtype=dtype)
    weights, biases = [torch.empty(n, k, dtype=dtype) for _ in rows], [torch.empty(n) for _ in rows]
    product_kernels.linear_gelu_product(x, weights, biases, rows, keep, architecture)
    back = [torch.empty(k, n, dtype=dtype) for _ in rows]
    product_kernels.hidden_gradient_product(x, pre, back, rows, torch.float32, architecture)


CASES["product-encoder-bf16"] = partial(_products, torch.bfloat16, 768, 3072, [128, 49], True)
CASES["product-decoder-bf16"] = partial(_products, torch.bfloat16, 512, 2048, [708], True)
CASES["product-inference-fp16"] = partial(_products, torch.float16, 512, 2048, [708], False)
CASES["product-odd-fp16"] = partial(_products, torch.float16, 33, 65, [3, 7, 10], True)
CASES["product-ones-bf16"] = partial(_products, torch.bfloat16, 1, 1, [1], True)


def _quantize(dtype: torch.dtype, width: int, rows: int, architecture: str) -> None:
    for to in (fp8.VALUES, fp8.GRADIENTS):
        fp8.quantize_triton(torch.empty(rows, width, dtype=dtype), to, architecture)


CASES["quantize-hidden-bf16"] = partial(_quantize, torch.bfloat16, 3072, 177)
CASES["quantize-encoder-bf16"] = partial(_quantize, torch.bfloat16, 768, 177)
CASES["quantize-ones-fp16"] = partial(_quantize, torch.float16, 1, 1)


def _fp8_passes(dtype: torch.dtype, width: int, hidden: int, rows: list[int], architecture: str) -> None:
    """What writes fp8 as it goes: LayerNorm and GELU, with and without their results beside, and the GELU's derivative."""
    x, low, pre = (torch.empty(sum(rows), n, dtype=t) for n, t in ((width, torch.float32), (width, dtype), (hidden, dtype)))
    weights, held = [torch.empty(width) for _ in rows], fp8.empty_quantized(x, fp8.VALUES)
    for keep in (True, False):
        layer_norm_kernels.forward_triton(x, low, weights, weights, rows, 1e-5, dtype, True, architecture, held, keep)
        fp8.gelu_triton(pre, keep, architecture)
    back, stats = fp8.empty_quantized(x, fp8.GRADIENTS), torch.empty(sum(rows))
    for y in (pre, None):
        dgelu_bias.dgelu_bias_quantized(pre, pre, rows, dtype, y, architecture)
    arguments = (low, x, x, None, stats, stats, weights, rows, x.dtype, dtype, 1, dtype, architecture)
    layer_norm_kernels.backward_triton(*arguments, back)


CASES["fp8-encoder-bf16"] = partial(_fp8_passes, torch.bfloat16, 768, 3072, [128, 49])
CASES["fp8-decoder-bf16"] = partial(_fp8_passes, torch.bfloat16, 512, 2048, [708])
CASES["fp8-odd-fp16"] = partial(_fp8_passes, torch.float16, 33, 65, [3, 7, 10])


def _fp8_products(k: int, n: int, rows: list[int], architecture: str) -> None:
    """Layers k -> n: a product of values and one of gradients, and the gradient of fc2 n -> k through the GELU."""
    values, gradients = (torch.empty(sum(rows), k, dtype=t) for t in (fp8.VALUES, fp8.GRADIENTS))
    weights, scales = [torch.empty(n, k, dtype=fp8.VALUES) for _ in rows], [torch.empty(n) for _ in rows]
    scale, pre = torch.empty(sum(rows), 1), torch.empty(sum(rows), n, dtype=torch.bfloat16)
    for x, biases in ((values, scales), (gradients, [])):
        product_kernels.fp8_product_triton(x, scale, weights, scales, biases, rows, torch.bfloat16, architecture)
    product_kernels.fp8_hidden_gradient_product(gradients, scale, pre, weights, scales, rows, torch.float32, architecture)


CASES["fp8_product-encoder-bf16"] = partial(_fp8_products, 768, 3072, [128, 49])
CASES["fp8_product-decoder-bf16"] = partial(_fp8_products, 512, 2048, [708])
CASES["fp8_product-least-bf16"] = partial(_fp8_products, 16, 16, [1])


def _attention(
    dtype: torch.dtype,
    width: int,
    heads: int,
    lengths: list[int],
    q_lengths: list[int] | None,
    architecture: str,
    kernels: tuple[str, ...] = ("attention_forward", "attention_backward"),
) -> None:
    queries, batch = q_lengths or lengths, 1 if lengths == [1] else 2
    q = torch.empty(batch * sum(queries), (1 if q_lengths else 3) * heads * width, dtype=dtype)
    kv = torch.empty(batch * sum(lengths), 2 * heads * width, dtype=dtype) if q_lengths else None
    out, lse = q.new_empty(len(q), heads * width), torch.empty(heads, len(q))
    if "attention_forward" in kernels:
        attention_forward.attention_forward_triton(q, kv, batch, queries, lengths, heads, architecture)
    if "attention_backward" in kernels:
        arguments = (out, q, kv, out, lse, batch, queries, lengths, heads, len(lengths), dtype, architecture)
        attention_backward.attention_backward_triton(*arguments)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"attention-shared-{_name}"] = partial(_attention, _dtype, 64, 12, [128, 49, 177], None)
    CASES[f"attention-decoder-{_name}"] = partial(_attention, _dtype, 32, 16, [708], None)
    CASES[f"attention-queries-{_name}"] = partial(_attention, _dtype, 32, 16, [708], [531])


def _attention_candidates(
    kernels: tuple[str, ...], words: set[str], width: int, heads: int, lengths: list[int], architecture: str
) -> None:
    """The launches of `kernels` that the tuner tries in bfloat16 on the architecture, of those that have an option in
    `words` (none: all)."""
    key = attention_tiles.launch_key(lengths, width)
    for kernel in kernels:
        for options in configuration.alternatives(kernel, architecture, torch.bfloat16, key):
            content = {"implementations": {}, "launches": {kernel: {f"bfloat16 {key}": options}}}
            if not words or words & set(options):
                with configuration.trial(content):
                    _attention(torch.bfloat16, width, heads, lengths, None, architecture, kernels=(kernel,))


_BOTH = ("attention_forward", "attention_backward")
for _name, _sizes in {
    "decoder": (32, 16, [708]),
    "shared": (64, 12, [128, 49, 177]),
    "encoders": (64, 12, [128, 49]),
}.items():
    CASES[f"attention-{_name}-one-pass-bf16"] = partial(_attention_candidates, _BOTH[1:], {"ONE_PASS"}, *_sizes)
    CASES[f"offered-attention-{_name}-bf16"] = partial(_attention_candidates, _BOTH, set(), *_sizes)
CASES["attention-decoder-registers-bf16"] = partial(_attention_candidates, _BOTH[:1], {"maxnreg", "ON_FMA"}, 32, 16, [708])


def _attention_sums(architecture: str) -> None:
    """The one-pass backward of the decoder that also adds up columns, by the first of its launches that the tuner tries."""
    found = configuration.alternatives("attention_backward", architecture, torch.bfloat16, "long 32")
    options = next(options for options in found if "SUMS" in options)
    with configuration.trial({"implementations": {}, "launches": {"attention_backward": {"bfloat16 long 32": options}}}):
        _attention(torch.bfloat16, 32, 16, [708], None, architecture, kernels=_BOTH[1:])


CASES["attention-decoder-sums-bf16"] = _attention_sums
CASES["attention-long-bf16"] = partial(_attention, torch.bfloat16, 64, 12, [708], None)
CASES["attention-wide-bf16"] = partial(_attention, torch.bfloat16, 128, 8, [177], None)
CASES["attention-wide-long-bf16"] = partial(_attention, torch.bfloat16, 128, 8, [708], None)
CASES["attention-ones-fp16"] = partial(_attention, torch.float16, 16, 1, [1], None)
CASES["attention-odd-fp16"] = partial(_attention, torch.float16, 24, 3, [300], None)
CASES["attention-fp32"] = partial(_attention, torch.float32, 64, 12, [708], None)


def _tokens(dtype: torch.dtype, length: int, kept: int, width: int, architecture: str) -> None:
    batch = 1 if length == 1 else 2
    ids = torch.zeros(batch, kept, dtype=torch.int64)
    places = torch.zeros(batch, length, dtype=torch.int64)
    x, whole = (torch.empty(batch * n, width, dtype=dtype) for n in (kept, length))
    gather_tokens._forward_triton(whole, ids, architecture)
    gather_tokens._backward_triton(x, ids, length, architecture)
    for pos_dtype in {dtype, torch.float32}:
        pos = torch.empty(length, width, dtype=pos_dtype)
        few = distinct_tokens._forward_triton(x, ids, torch.empty(width), pos, architecture)
        distinct_tokens._backward_triton(few, ids, places, dtype, True, architecture)
        every = scatter_tokens._forward_triton(few, [ids], [places], architecture)
        scatter_tokens._backward_triton(every, [ids], [places], architecture)


def _patches(dtype, channels: int, height: int, width: int, kept: int, dim: int, p: int, out_dtype, pixels, *more) -> None:
    """`more`: frames of a clip, and of a tubelet, where it is one; the architecture."""
    *clip, architecture = more
    frames, t = clip or (1, 1)
    colors = scale_and_shift(IMAGE_MEAN, IMAGE_STD)
    length = (frames // t) * (height // p) * (width // p)
    images = torch.empty(2, frames, width, height, channels, dtype=pixels).permute(0, 4, 1, 3, 2)
    ids, removed = (torch.zeros(2, n, dtype=torch.int64) for n in (kept, length - kept or 1))
    weight, bias, pos = torch.empty(dim, channels, t, p, p, dtype=dtype), torch.empty(dim), torch.empty(length, dim)
    for chosen in (ids, None):
        modality = bias if clip == [] else None
        inputs = (images, chosen, weight, bias, pos.to(out_dtype), modality, colors)
        out, patches = embed_kept_patches._forward_triton(*inputs, architecture)
        embed_kept_patches._backward_triton(out, patches, chosen, length, True, True, architecture)
    pred = torch.empty(2, removed.shape[1], t * p * p * channels, dtype=dtype)
    for norm in (True, False):
        options = (p, t, norm, colors, architecture)
        loss, mean, rstd = masked_patch_mse._forward_triton(pred, images, removed, *options)
        masked_patch_mse._backward_triton(loss, pred, images, removed, mean, rstd, *options)


def _contrastive(dtype: torch.dtype, count: int, width: int, both: bool, architecture: str) -> None:
    x = torch.empty(count, width, dtype=dtype)
    loss, _, *saved = contrastive_loss._forward_triton(x, x, 0.05, both, architecture)
    contrastive_loss._backward_triton(loss, x, x, *saved, 0.05, architecture)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"tokens-decoder-{_name}"] = partial(_tokens, _dtype, 708, 177, 512)
    CASES[f"tokens-ones-{_name}"] = partial(_tokens, _dtype, 1, 1, 1)
    CASES[f"patches-video-{_name}"] = partial(_patches, _dtype, 3, 224, 224, 49, 768, 16, torch.float32, torch.float32)
    CASES[f"patches-bytes-{_name}"] = partial(_patches, _dtype, 3, 224, 224, 49, 768, 16, torch.float32, torch.uint8)
    CASES[f"patches-bytes-odd-{_name}"] = partial(_patches, _dtype, 3, 28, 42, 5, 33, 14, _dtype, torch.uint8)
    CASES[f"patches-audio-{_name}"] = partial(_patches, _dtype, 1, 128, 1024, 128, 768, 16, torch.float32, torch.float32)
    CASES[f"patches-odd-{_name}"] = partial(_patches, _dtype, 3, 28, 42, 5, 33, 14, _dtype, torch.float32)
    for _kind, _pixels in (("clips", torch.float32), ("clips-bytes", torch.uint8)):
        CASES[f"patches-{_kind}-{_name}"] = partial(
            _patches, _dtype, 3, 224, 224, 156, 768, 16, torch.float32, _pixels, 8, 2
        )
    CASES[f"patches-ones-{_name}"] = partial(_patches, _dtype, 1, 2, 2, 1, 1, 2, _dtype, torch.float32)
    for _both in (False, True):
        CASES[f"contrastive-{1 + _both}-{_name}"] = partial(_contrastive, _dtype, 256, 768, _both)
    CASES[f"contrastive-odd-{_name}"] = partial(_contrastive, _dtype, 97, 33, True)
    CASES[f"contrastive-ones-{_name}"] = partial(_contrastive, _dtype, 1, 1, False)
CASES["contrastive-fp32"] = partial(_contrastive, torch.float32, 256, 768, True)


def _log_mel(dtype, batch: int, samples: int, counted: bool, rate: int, bins: int, length: int, architecture: str) -> None:
    waveform, count = torch.empty(batch, samples, dtype=dtype), torch.full((batch,), samples)
    counts = count if counted else None
    log_mel_fbank._forward_triton(waveform, counts, rate, bins, length, -5.081, 4.4849, architecture)


CASES["log_mel-int16"] = partial(_log_mel, torch.int16, 2, 163840, True, 16000, 128, 1024)
CASES["log_mel-float"] = partial(_log_mel, torch.float32, 2, 160000, False, 16000, 128, 998)
CASES["log_mel-odd"] = partial(_log_mel, torch.float32, 3, 30001, True, 22050, 97, 77)
CASES["log_mel-ones"] = partial(_log_mel, torch.int16, 1, 400, True, 16000, 1, 1)


def _adam(dtype: torch.dtype, low: torch.dtype | None, on_device: bool, architecture: str) -> None:
    """Tensors at whole multiples of 16 bytes, and one that is not. `on_device`: as in a CUDA graph, with a scaler."""
    buffers = [[torch.empty(48, dtype=t) for _ in range(2)] for t in (dtype, *[torch.float32] * 3)]
    groups = [[first, second[1:]] for first, second in buffers]
    rounded = [] if low is None else [p.to(low) for p in groups[1]]
    value = torch.ones(()) if on_device else None
    options = (value, 0.01, 0.9, 0.999, 1e-8, 0.1, not on_device, False, value, value, architecture)
    adam_update._update_triton(*groups, [torch.zeros(()) for _ in range(2)], rounded, *options)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"adam_update-{_name}"] = partial(_adam, _dtype, _dtype, False)
    CASES[f"adam_update-device-{_name}"] = partial(_adam, _dtype, _dtype, True)
CASES["adam_update-fp32"] = partial(_adam, torch.float32, None, True)
