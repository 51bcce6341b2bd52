"""How a case of each operator is made: one function for each kind of call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cavmae_fast.ops.adam_update import adam_update
from cavmae_fast.ops.attention import attention, query_attention
from cavmae_fast.ops.catalogue.case import LOW_AND_FULL, Case, Draw, in_float32, of_first, rounded, size
from cavmae_fast.ops.contrastive_loss import contrastive_loss
from cavmae_fast.ops.distinct_tokens import Kept, distinct_tokens, kept_at
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.gather_tokens import gather_tokens
from cavmae_fast.ops.hidden_gradient import hidden_gradient
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.log_mel_fbank import log_mel_fbank, log_mel_features
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse
from cavmae_fast.ops.scatter_tokens import scatter_distinct
from cavmae_fast.ops.stream_layer_norm import stream_layer_norm
from cavmae_fast.ops.stream_linear import stream_linear
from cavmae_fast.ops.weight_gradient import weight_gradient
from cavmae_fast.reference import fbank
from cavmae_fast.reference import operators as reference

AUDIO_MEAN, AUDIO_STD = -5.081, 4.4849
PIECE = 1 << 27
"Scores that the reference of attention forms at a time: 1 GiB in float64."


# ------------------------------------------------------------------------------------------------- norms and products


def layer_norm(name: str, layout: StreamLayout, width: int, *, delta: bool = True, full: bool = True, owed: int = 0) -> Case:
    """`full`: the residual stream is in float32, as in training. `delta`: an update is added to it first. `owed`: biases
    within it whose gradients are formed here, one for all streams or one for each."""

    def draw(d: Draw) -> list:
        stream = d.full if full else d.low
        weights, biases = ([d.full(width, shift=shift) for _ in layout.lengths] for shift in (1.0, 0.0))
        biases_within = [d.low(width) for _ in range(owed)]
        update = d.low(layout.rows, width) if delta else None
        return [stream(layout.rows, width), update, weights, biases, d.dtype, biases_within]

    def ours(x, delta, weights, biases, dtype, owed):
        return stream_layer_norm(x, delta, weights, biases, layout, 1e-5, dtype, owed=owed)

    def plain(x, delta, weights, biases, dtype, owed):
        if owed:
            each = owed * len(layout.lengths) if len(owed) == 1 else owed
            delta = torch.cat([part + (b - b.detach()) for part, b in zip(delta.split(layout.rows_per_stream), each)])
        x, y = reference.stream_layer_norm(x, delta, weights, biases, layout.rows_per_stream)
        return x, y if y.dtype == torch.float64 else y.to(dtype)

    def moved(x, delta, weights, biases, dtype, owed):
        y = x.numel() * dtype.itemsize
        forward = size(x, delta) + (size(x) if delta is not None else 0) + y
        return forward, 3 * size(x) + size(delta) + y  # dy, the sum's gradient, the sum; dx, ddelta

    return Case(
        "stream_layer_norm",
        name,
        ours=ours,
        reference=plain,
        baseline=rounded(plain, lambda x, delta, weights, biases, dtype, owed: [x.dtype, dtype]),
        draw=draw,
        moved=moved,
    )


def linear(name: str, layout: StreamLayout, k: int, n: int, *, shared: bool, gelu: bool) -> Case:
    """`shared`: one weight for all streams. `gelu`: the operator that applies it too."""
    function, plain = (linear_gelu, reference.linear_gelu) if gelu else (stream_linear, reference.stream_linear)

    def draw(d: Draw) -> list:
        count = 1 if shared else len(layout.lengths)
        weights = [d.low(n, k, scale=k**-0.5) for _ in range(count)]
        return [d.low(layout.rows, k), weights, [d.low(n) for _ in range(count)]]

    def unfused(x, weights, biases):
        return plain(x, weights, biases, layout.rows_per_stream)

    def moved(x, weights, biases):
        out = layout.rows * n * x.element_size() * (2 if gelu else 1)  # GELU's input is kept for its backward pass
        return size(x, *weights) + out, 2 * size(x, *weights) + out

    return Case(
        "linear_gelu" if gelu else "stream_linear",
        name,
        ours=lambda x, weights, biases: function(x, weights, biases, layout),
        reference=unfused,
        baseline=rounded(unfused, of_first),
        draw=draw,
        moved=moved,
        forward_flops=2.0 * layout.rows * k * n,
    )


def hidden(name: str, layout: StreamLayout, k: int, n: int, *, shared: bool) -> Case:
    """The backward pass of a GELU of width n and the layer n -> k behind it. `shared`: one weight for all streams."""
    count = 1 if shared else len(layout.lengths)
    rows = [layout.rows] if shared else layout.rows_per_stream

    def draw(d: Draw) -> list:
        weights = [(d.fixed(k, n) * k**-0.5).to(d.dtype) for _ in range(count)]
        return [d.fixed(layout.rows, k).to(d.dtype), d.fixed(layout.rows, n).to(d.dtype), weights]

    def ours(dout, pre, weights):
        return hidden_gradient(dout, pre, weights, rows, torch.float32)

    def moved(dout, pre, weights):
        return size(dout, *weights) + 2 * size(pre) + 4 * count * n, 0

    def plain(dout, pre, weights):
        dpre, db = reference.hidden_gradient(dout, pre, weights, rows)
        return dpre, db if db.dtype == torch.float64 else db.float()

    def in_two_passes(dout, pre, weights):
        # Two operators of the framework: the product hands its result on, rounded, to the GELU's derivative.
        parts = zip(dout.split(rows), weights, strict=True)
        dy = torch.cat([(part.float() @ w.float()).to(dout.dtype) for part, w in parts]).float()
        dpre = torch.ops.aten.gelu_backward(dy, pre.float())
        return dpre.to(pre.dtype), torch.stack([part.sum(0) for part in dpre.split(rows)])

    return Case(
        "hidden_gradient",
        name,
        ours=ours,
        reference=plain,
        baseline=in_two_passes,
        draw=draw,
        moved=moved,
        forward_flops=2.0 * layout.rows * k * n,
        differentiable=False,
    )


def gradient(name: str, layout: StreamLayout, k: int, n: int, *, shared: bool) -> Case:
    """The gradients of the weights and biases of a layer k -> n. `shared`: one weight for all streams."""
    rows = [layout.rows] if shared else layout.rows_per_stream

    def draw(d: Draw) -> list:
        return [d.fixed(layout.rows, n).to(d.dtype), d.fixed(layout.rows, k).to(d.dtype)]

    def moved(dout, x):
        return size(dout, x) + len(rows) * n * (k * x.element_size() + 4), 0

    def plain(dout, x):
        dw, db = reference.weight_gradient(dout, x, rows)
        return dw, db if db.dtype == torch.float64 else db.float()

    return Case(
        "weight_gradient",
        name,
        ours=lambda dout, x: weight_gradient(dout, x, rows, torch.float32),
        reference=plain,
        baseline=rounded(plain, lambda dout, *_: [dout.dtype, torch.float32]),
        draw=draw,
        moved=moved,
        forward_flops=2.0 * layout.rows * k * n,
        differentiable=False,
    )


# ---------------------------------------------------------------------------------------------------------- attention


def attend(name: str, queries: StreamLayout, layout: StreamLayout, width: int, heads: int, *, owed: int = 0) -> Case:
    """Queries, keys and values packed side by side when the layouts are one, else queries on their own. `owed`: biases
    within them whose gradients are formed here, one for all streams or one for each."""
    packed = queries == layout

    def draw(d: Draw) -> list:
        biases = [d.low(3 * width) for _ in range(owed)]
        if packed:
            return [d.low(layout.rows, 3 * width), biases]
        return [d.low(queries.rows, width), d.low(layout.rows, 2 * width), biases]

    def ours(*inputs):
        *inputs, biases = inputs
        if packed:
            return attention(*inputs, layout, heads, owed=biases)
        return query_attention(*inputs, queries, layout, heads, owed=biases)

    def with_gradient(x, biases, of):
        """x, with the gradients of the biases that are within it."""
        each = biases * len(of.lengths) if len(biases) == 1 else biases
        return torch.cat([part + (b - b.detach()) for part, b in zip(x.split(of.rows_per_stream), each)]) if biases else x

    def split(inputs):
        *inputs, biases = inputs
        q, kv = (inputs[0][:, :width], inputs[0][:, width:]) if packed else inputs
        return (
            with_gradient(q, [b[:width] for b in biases], queries),
            with_gradient(kv, [b[width:] for b in biases], layout),
        )

    def plain(*inputs):
        return reference.packed_attention(*split(inputs), layout.batch, queries.lengths, layout.lengths, heads)

    def in_pieces(*inputs):
        return attend_in_pieces(*split(inputs), queries, layout, heads)

    def moved(*inputs):
        *inputs, _ = inputs
        out = queries.rows * width * inputs[0].element_size()
        return size(*inputs) + out, 2 * size(*inputs) + 2 * out

    return Case(
        "attention",
        name,
        ours=ours,
        reference=in_pieces,
        baseline=rounded(in_pieces, of_first),
        draw=draw,
        moved=moved,
        plain=plain,
        forward_flops=sum(4.0 * layout.batch * a * b * width for a, b in zip(queries.lengths, layout.lengths)),
        attention_of=(queries, layout, heads),
        head_width=width // heads,
    )


def attend_in_pieces(q: Tensor, kv: Tensor, queries: StreamLayout, layout: StreamLayout, heads: int) -> Tensor:
    """`reference.packed_attention`, a few samples at a time, each recomputed in the backward pass: the scores of a whole
    batch of the decoder would take 16 GiB in float64, several times over."""
    outputs = []
    streams = zip(q.split(queries.rows_per_stream), kv.split(layout.rows_per_stream), queries.lengths, layout.lengths)
    for q_rows, kv_rows, q_length, length in streams:
        samples = max(1, min(layout.batch, PIECE // (heads * q_length * length)))
        for q_piece, kv_piece in zip(q_rows.split(samples * q_length), kv_rows.split(samples * length)):
            arguments = (q_piece, kv_piece, len(q_piece) // q_length, (q_length,), (length,), heads)
            if samples == layout.batch:
                outputs.append(reference.packed_attention(*arguments))
            else:
                outputs.append(checkpoint(reference.packed_attention, *arguments, use_reentrant=False))
    return torch.cat(outputs)


# ------------------------------------------------------------------------------------------------------------- tokens


def gather(name: str, batch: int, length: int, taken: int, width: int) -> Case:
    def moved(x, ids):
        out = batch * taken * width * x.element_size()
        return 2 * out + size(ids), out + size(x, ids)

    return Case(
        "gather_tokens",
        name,
        ours=gather_tokens,
        reference=reference.gather_tokens,
        baseline=rounded(reference.gather_tokens, of_first),
        draw=lambda d: [d.low(batch * length, width), d.order(batch, length)[:, :taken].contiguous()],
        moved=moved,
    )


def distinct(name: str, batch: int, length: int, kept: int, width: int, *, full: bool = True, trained: bool = True) -> Case:
    """`full`: positions in float32, as in training. `trained`: they have a gradient."""

    def draw(d: Draw) -> list:
        pos = (d.full if full else d.low)(length, width)
        ids = d.order(batch, length)[:, :kept].contiguous()
        return [d.low(batch * kept, width), ids, d.full(width), pos.requires_grad_(trained)]

    def moved(x, ids, mask_token, pos):
        least = size(x, ids, pos) + (batch * kept + length) * width * pos.element_size()
        return least, least

    return Case(
        "distinct_tokens",
        name,
        ours=lambda x, ids, mask_token, pos: distinct_tokens(x, kept_at(ids, length), mask_token, pos),
        reference=reference.distinct_tokens,
        baseline=rounded(reference.distinct_tokens, lambda x, ids, mask_token, pos: [pos.dtype]),
        draw=draw,
        moved=moved,
    )


def scatter(name: str, batch: int, lengths: Sequence[int], kept: Sequence[int], width: int, *, full: bool = False) -> Case:
    """Of streams of `lengths` tokens, of which `kept` are kept. `full`: in float32, as the residual stream is."""

    def draw(d: Draw) -> list:
        stream = d.full if full else d.low
        orders = [d.order(batch, length) for length in lengths]
        places = [torch.where(order < count, order, -1) for order, count in zip(orders, kept)]
        ids = [order.argsort(1)[:, :count].contiguous() for order, count in zip(orders, kept)]
        return [stream(batch * sum(kept) + sum(lengths), width), ids, places]

    def plain(x, ids, places):
        rows = [batch * count + length for count, length in zip(kept, lengths)]
        return torch.cat([reference.scatter_distinct(*stream) for stream in zip(x.split(rows), places)])

    def moved(x, ids, places):
        least = size(x, *places) + batch * sum(lengths) * width * x.element_size()
        return least, least

    return Case(
        "scatter_tokens",
        name,
        ours=lambda x, ids, places: scatter_distinct(x, [Kept(*stream) for stream in zip(ids, places)]),
        reference=plain,
        baseline=rounded(plain, of_first),
        draw=draw,
        moved=moved,
    )


# ------------------------------------------------------------------------------------------------------------- pixels


def draw_images(d: Draw, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Images `shape` (batch, channels, height, width) or clips (batch, channels, frames, height, width) as they reach the
    model.

    'spectrogram': float32, a transposed view; 'frame': float32; 'bytes': uint8, channels last in memory, as decoders give
    them. 'clip' and 'clip-bytes': float32 and uint8, the frames before the channels in memory, as loaders give them.
    """
    if kind in ("clip", "clip-bytes"):
        batch, channels, frames, *size = shape
        draw_pixels = d.fixed if kind == "clip" else d.bytes
        return draw_pixels(batch, frames, channels, *size).transpose(1, 2)
    batch, channels, height, width = shape
    match kind:
        case "spectrogram":
            return d.fixed(batch, width, height).unsqueeze(1).transpose(2, 3)
        case "frame":
            return d.fixed(*shape)
        case "bytes":
            return d.bytes(batch, height, width, channels).permute(0, 3, 1, 2)
    raise ValueError(f"kind is {kind!r}; allowed: 'spectrogram', 'frame', 'bytes', 'clip', 'clip-bytes'")


def embed(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    patch: int,
    kept: int | None,
    width: int,
    *,
    trained: bool = False,
    full: bool = True,
    tubelet: int = 1,
) -> Case:
    """`kept` patches of each image or clip (None: all). `trained`: positions have a gradient; `full`: in float32."""
    batch, channels = shape[:2]
    length, pixels_each = patches_of(shape, patch, tubelet), channels * tubelet * patch**2

    def draw(d: Draw) -> list:
        ids = None if kept is None else d.order(batch, length)[:, :kept].contiguous()
        kernel = (patch, patch) if len(shape) == 4 else (tubelet, patch, patch)
        weight = d.low(width, channels, *kernel, scale=pixels_each**-0.5)
        pos = (d.full if full else d.low)(length, width)
        return [draw_images(d, kind, shape), ids, weight, d.full(width), pos.requires_grad_(trained), d.full(width)]

    def plain(images, ids, weight, bias, pos, modality):
        return reference.embed_kept_patches(images, ids, weight, bias.to(weight.dtype), pos, modality).to(pos.dtype)

    def explicit(images, ids, weight, bias, pos, modality):
        """Pixels and projection are rounded to the weight's dtype."""
        images = reference.normalize_images(images, torch.float32).to(weight.dtype).float()
        convolution = F.conv2d if weight.dim() == 4 else F.conv3d
        projected = convolution(images, weight.float(), stride=weight.shape[2:]).to(weight.dtype).float()
        tokens = projected.flatten(2).transpose(1, 2) + pos.float() + bias + modality
        if ids is not None:
            tokens = reference.take_tokens(tokens, ids)
        return tokens.flatten(0, 1).to(pos.dtype)

    def moved(images, ids, weight, bias, pos, modality):
        rows = batch * (kept or length)
        pixels = size(images) * (kept or length) // length
        patches = rows * pixels_each * weight.element_size()
        out = rows * width * pos.element_size()
        return pixels + patches + size(ids, weight, pos) + out, patches + size(weight) + out

    return Case(
        "embed_kept_patches",
        name,
        ours=embed_kept_patches,
        reference=plain,
        baseline=explicit,
        draw=draw,
        moved=moved,
        forward_flops=2.0 * batch * (kept or length) * width * pixels_each,
    )


def patches_of(shape: tuple[int, ...], patch: int, tubelet: int) -> int:
    """Patches of an image or a clip of this shape."""
    *frames, height, columns = shape[2:]
    return (frames[0] // tubelet if frames else 1) * (height // patch) * (columns // patch)


def patch_mse(
    name: str, kind: str, shape: tuple[int, ...], patch: int, removed: int, *, norm: bool = True, tubelet: int = 1
) -> Case:
    """The loss over `removed` patches of each image or clip; `norm`: the true patches are normalized."""
    batch, channels = shape[:2]
    length = patches_of(shape, patch, tubelet)

    def draw(d: Draw) -> list:
        ids = d.order(batch, length)[:, :removed].contiguous()
        return [d.low(batch, removed, tubelet * patch * patch * channels), draw_images(d, kind, shape), ids]

    def plain(pred, images, ids):
        return reference.masked_patch_mse(pred, images, ids, patch, norm, tubelet_size=tubelet)

    def moved(pred, images, ids):
        pixels = size(images) * removed // length
        return size(pred, ids) + pixels, 2 * size(pred) + size(ids) + pixels

    return Case(
        "masked_patch_mse",
        name,
        ours=lambda pred, images, ids: masked_patch_mse(pred, images, ids, patch, norm, tubelet_size=tubelet),
        reference=plain,
        baseline=rounded(plain, in_float32),
        draw=draw,
        moved=moved,
    )


# ---------------------------------------------------------------------------------------------------- loss and features


def contrastive(name: str, count: int, width: int, *, bidirectional: bool = False, full: bool = True) -> Case:
    """Rows that are related, so that some find their own. `full`: in float32, as in training."""

    def draw(d: Draw) -> list:
        audio = d.fixed(count, width)
        video = 0.1 * audio + d.fixed(count, width)
        return [x.to(torch.float32 if full else d.dtype).requires_grad_() for x in (audio, video)]

    def plain(audio, video):
        return reference.contrastive_loss(audio, video, bidirectional=bidirectional)

    def explicit(audio, video):
        """The normalized rows are rounded to the inputs' dtype."""
        units = (F.normalize(x.float(), dim=-1).to(x.dtype).float() for x in (audio, video))
        return plain(*units)

    return Case(
        "contrastive_loss",
        name,
        ours=lambda audio, video: contrastive_loss(audio, video, bidirectional=bidirectional),
        reference=plain,
        baseline=explicit,
        draw=draw,
        moved=lambda audio, video: (size(audio, video), 2 * size(audio, video)),
        forward_flops=2.0 * count * count * width,
        dtypes=(torch.float32,) if full else LOW_AND_FULL,
    )


def log_mel(name: str, batch: int, samples: int) -> Case:
    """The bare spectrogram of float32 sound."""

    def moved(waveform):
        return size(waveform) + batch * fbank.num_frames(samples) * 128 * 4, 0

    return Case(
        "log_mel_fbank",
        name,
        ours=log_mel_fbank,
        reference=fbank.log_mel_fbank,
        baseline=fbank.log_mel_fbank,
        draw=lambda d: [0.1 * d.fixed(batch, samples)],
        moved=moved,
        dtypes=(torch.float32,),
        differentiable=False,
        capture=False,
    )


def features(name: str, counts: list[int], length: int) -> Case:
    """Normalized features of int16 sound, in clips of `counts` samples."""

    def draw(d: Draw) -> list:
        waveform = (3000 * d.fixed(len(counts), max(counts))).round().to(torch.int16)
        return [waveform, torch.tensor(counts, device=d.device)]

    def ours(waveform, num_samples):
        return log_mel_features(waveform, num_samples, length, AUDIO_MEAN, AUDIO_STD)

    def plain(waveform, num_samples):
        return fbank.log_mel_features(waveform, num_samples, length, AUDIO_MEAN, AUDIO_STD)

    def exact(waveform, num_samples):
        return plain(waveform.double() / 32768, num_samples)

    return Case(
        "log_mel_fbank",
        name,
        ours=ours,
        reference=exact,
        baseline=plain,
        draw=draw,
        moved=lambda waveform, num_samples: (size(waveform) + len(counts) * length * 128 * 4, 0),
        plain=plain,
        dtypes=(torch.float32,),
        differentiable=False,
        capture=False,
    )


# ---------------------------------------------------------------------------------------------------------- optimizer


def adam(name: str, sizes: list[int], *, decoupled: bool = True) -> Case:
    """A step of Adam on parameters of `sizes` elements, the third one, after which the weights are rounded to the gradients'
    dtype; to float16 where these are in float32."""
    options = (0.01, 0.9, 0.999, 1e-8, 0.1)

    def draw(d: Draw) -> list:
        params, moments = ([d.fixed(size) for size in sizes] for _ in range(2))
        return [[d.low(size).detach() for size in sizes], params, moments, [x.square() for x in moments]]

    def ours(grads, params, exp_avgs, exp_avg_sqs):
        groups = [[torch.empty_like(x).copy_(x) for x in group] for group in (grads, params, exp_avgs, exp_avg_sqs)]
        steps = [torch.full((), 2.0, device=p.device) for p in params]
        low = torch.float16 if grads[0].dtype == torch.float32 else grads[0].dtype
        rounded = [torch.empty_like(p, dtype=low) for p in params]
        adam_update(*groups, steps, rounded, None, *options, decoupled, False, None, None)
        return *groups[1], *groups[2], *groups[3], *rounded

    def plain(grads, params, exp_avgs, exp_avg_sqs):
        each = zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
        results = [reference.adam_update(p, g.to(p.dtype), m, v, 3, *options, decoupled) for p, g, m, v in each]
        params, exp_avgs, exp_avg_sqs = zip(*results)
        return *params, *exp_avgs, *exp_avg_sqs, *params

    def dtypes(grads, *_):
        low = torch.float16 if grads[0].dtype == torch.float32 else grads[0].dtype
        return 3 * [torch.float32] * len(grads) + [low] * len(grads)

    def moved(grads, params, exp_avgs, exp_avg_sqs):
        return size(*grads) + 2 * size(*params, *exp_avgs, *exp_avg_sqs) + sum(sizes) * 2, 0

    return Case(
        "adam_update",
        name,
        ours=ours,
        reference=plain,
        baseline=rounded(plain, dtypes),
        draw=draw,
        moved=moved,
        differentiable=False,
    )
