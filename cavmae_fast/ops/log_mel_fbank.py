"""Kaldi-compatible log-mel filter banks, and the normalized features of a batch of clips, from the samples in one pass.

    m = mean of the frame x;  y[t] = (x[t] - m) - 0.97 (x[t-1] - m);  X = DFT of (y window)
    feature[b, f, j] = (log max(sum over k of |X[k]|^2 filter[k, j], 1.19e-7) - mean) / std

and `-mean / std` for frames that do not lie within the clip's own samples. `cavmae_fast.reference.fbank` defines it. The
published loader first subtracts the mean of the whole clip; since every frame then loses its own mean, that changes nothing
but rounding.

Triton: a program makes a tile of frames, from the samples (int16 or float32, read straight from the batch) to the features.
The DFT is a product with a table. The window is symmetric: with the origin of time at the frame's center, which changes the
phase and not the power, cosines multiply `y[c+i] + y[c-i]` and sines `y[c+i] - y[c-i]`, which is half the products. Products
of fp16 numbers give float32 accuracy in this way: data (scaled by a power of two, frame by frame) and table are each split
into a high and a low fp16 part, whose sum is within 2^-24 of the value; the product of the two low parts is too small to
count, so three products remain. Tensor cores truncate their sums, so only 16 terms are summed there at once, and these
sums are added in float32. `tests/ops/test_log_mel_fbank.py` holds a quiet sound beside a loud one to the error of a
float32 FFT.

Estimated, not measured, for an H200 and a 10.24 s clip of 1024 frames: the DFT is 2 x 208 x 256 products per frame and
part, 0.65 GFLOP in fp16, 1.7 us at 40 % of 989 TFLOP/s. As three TF32 products, whose parts Triton truncates (2^-21), it
would be 3.3 us; in float32 on CUDA cores, 0.22 GFLOP at 30 of 67 TFLOP/s, 7 us. The mel product, 0.2 GFLOP in three TF32
parts, adds 1 us; there all terms are positive, so an error of 2^-20 in a term is one of 1e-6 in the logarithm. Preparing
the samples again for every 64 DFT bins costs about 1.5 us. Bytes: 0.33 MB in, 0.52 MB out, 0.2 us. Together about 4 us per
clip, 1 ms for 256 clips.

PyTorch: an FFT has a thirtieth of the table's arithmetic and is what a CPU does best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.clip import MEL_BINS, SAMPLE_RATE
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register
from cavmae_fast.reference import fbank as reference

BLOCK_K, BLOCK_N = 16, 64
"Terms and DFT bins of one product: the tables are padded to them, and accuracy rests on the 16 terms."
MAX_MEL_BINS = 128
"The kernel's sums have room for no more mel bins."
TABLE_BITS = 10
"The DFT tables are scaled by 2^10, so that their low parts are normal fp16 numbers."

# Frames that the PyTorch version works on at a time: on a CPU the scratch memory (about 6 kB per frame) nearly stays in
# the L2 cache, elsewhere it is bounded, whatever the batch and the clip length.
_BLOCK_FRAMES = {"cpu": 512}
_BLOCK_FRAMES_ACCELERATOR = 65536


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _emphasised(clip, start, place, valid, mean):
    """Samples at `place` of their frames, without the mean and pre-emphasised; 0 where not valid. [BLOCK_F, BLOCK_K]"""
    here = tl.load(clip + (start[:, None] + place[None, :]), mask=valid, other=0).to(tl.float32)
    # The window is 0 at a frame's first sample, so it does not matter what is taken for the sample before it.
    before = tl.load(clip + (start[:, None] + tl.maximum(place - 1, 0)[None, :]), mask=valid, other=0).to(tl.float32)
    return tl.where(valid, (here - mean[:, None]) - 0.97 * (before - mean[:, None]), 0.0)


@triton.jit
def _split_dot(value, table, offset, low_part):
    """value [BLOCK_F, BLOCK_K] fp32 times a table of high and low fp16 parts, to fp32 accuracy: the small terms first."""
    high = value.to(tl.float16)
    low = (value - high.to(tl.float32)).to(tl.float16)
    table_high = tl.load(table + offset)
    product = tl.dot(low, table_high)
    product = tl.dot(high, tl.load(table + low_part + offset), product)
    return tl.dot(high, table_high, product)


@triton.jit
def log_mel_fbank_kernel(
    waveform,  # [B, S] int16 or fp32
    num_samples,  # [B]
    cosines, sines,  # [2, K, N] fp16: high and low parts, scaled by 2^10
    filters,  # [N, BLOCK_M] fp32
    out,  # [B, length, MEL] fp32
    stride_b, tiles, frames, length, floor, mean, std,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, K: tl.constexpr, N: tl.constexpr, MEL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    """`frames` fit into S samples. A DFT value is 2^-UNIT times that of the scaled table and the waveform's full scale."""
    number = tl.program_id(0) // tiles
    frame = tl.program_id(0) % tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    own = frame < frames
    if HAS_COUNT:
        own &= frame <= (tl.load(num_samples + number).to(tl.int64) - WINDOW) // SHIFT
    clip = waveform + number.to(tl.int64) * stride_b
    start = frame * SHIFT

    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    peak = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(0, WINDOW, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        valid = own[:, None] & (place < WINDOW)[None, :]
        value = tl.load(clip + (start[:, None] + place[None, :]), mask=valid, other=0).to(tl.float32)
        total += tl.sum(value, axis=1)
        peak = tl.maximum(peak, tl.max(tl.abs(value), axis=1))
    average = total / WINDOW
    # Folded, emphasised samples are below 8 peak: the power of two 2^(138 - exponent) brings them into fp16's range. What
    # is so small that this exponent is not reached lies far below the energy floor.
    exponent = tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 100)
    scale = ((265 - exponent) << 23).to(tl.float32, bitcast=True)
    unscale = ((exponent - (11 + UNIT)) << 23).to(tl.float32, bitcast=True)

    energy = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    for bins in range(0, N, BLOCK_N):
        column = bins + tl.arange(0, BLOCK_N)
        real = tl.zeros([BLOCK_F, BLOCK_N], dtype=tl.float32)
        imaginary = tl.zeros([BLOCK_F, BLOCK_N], dtype=tl.float32)
        for first in range(0, K, BLOCK_K):
            i = first + tl.arange(0, BLOCK_K)
            valid = own[:, None] & (i < (WINDOW + 1) // 2)[None, :]
            right = _emphasised(clip, start, WINDOW // 2 + i, valid, average)
            left = _emphasised(clip, start, (WINDOW - 1) // 2 - i, valid, average)
            offset = i[:, None] * N + column[None, :]
            real += _split_dot((right + left) * scale[:, None], cosines, offset, K * N)
            imaginary += _split_dot((right - left) * scale[:, None], sines, offset, K * N)
        power = real * real + imaginary * imaginary
        weight = tl.load(filters + column[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :])
        energy = tl.dot(power, weight, energy, input_precision="tf32x3")

    energy = energy * unscale[:, None] * unscale[:, None]
    value = tl.log(tl.where(energy < floor, floor, energy))  # NaN stays NaN
    value = (tl.where(own[:, None], value, 0.0) - mean) / std
    mel = tl.arange(0, BLOCK_M)
    row = number.to(tl.int64) * length + frame
    tl.store(out + row[:, None] * MEL + mel[None, :], value, mask=(frame < length)[:, None] & (mel < MEL)[None, :])


# ------------------------------------------------------------------------------------------------------- launchers


@lru_cache(maxsize=32)
def _tables(sample_rate: int, num_mel_bins: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's constants: cosines and sines `[2, K, N]` fp16 with the window, mel filters `[N, BLOCK_M]` fp32.

    K and N are the halves of window and DFT, padded with zeros to whole tiles; BLOCK_M is a power of two.
    """
    window, _, dft_length = reference.frame_sizes(sample_rate)
    half, bins = (window + 1) // 2, dft_length // 2
    weight = reference.hann_window(window)[window // 2 :] * 2**TABLE_BITS
    if window % 2:
        weight[0] /= 2  # the sample at the center is its own mirror image
    time = torch.arange(half, dtype=torch.float64) + (0.0 if window % 2 else 0.5)
    angle = time[:, None] * torch.arange(bins, dtype=torch.float64) * (2 * math.pi / dft_length)
    pad = (0, -bins % BLOCK_N, 0, -half % BLOCK_K)
    tables = []
    for wave in (angle.cos(), angle.sin()):
        exact = F.pad(weight[:, None] * wave, pad)
        high = exact.to(torch.float16)
        tables.append(torch.stack([high, (exact - high.double()).to(torch.float16)]).to(device))
    filters = reference.mel_filters(sample_rate, num_mel_bins, torch.float32)[:, :bins].T
    columns = max(16, triton.next_power_of_2(num_mel_bins))
    filters = F.pad(filters, (0, columns - num_mel_bins, 0, pad[1])).contiguous()
    return *tables, filters.to(device)


def _limit(implementation: str, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    _, samples, num_mel_bins = shape
    if num_mel_bins > MAX_MEL_BINS:
        return f"the kernel makes at most {MAX_MEL_BINS} mel bins, not {num_mel_bins}"
    if samples >= 2**31:
        return f"the kernel counts a clip's samples in 32 bits, and there are {samples}"
    return None


def _forward_triton(waveform, num_samples, sample_rate, num_mel_bins, length, mean, std, architecture):
    batch, samples = waveform.shape
    window, shift, _ = reference.frame_sizes(sample_rate)
    cosines, sines, filters = _tables(sample_rate, num_mel_bins, waveform.device)
    out = waveform.new_empty(batch, length, num_mel_bins, dtype=torch.float32)
    if out.numel() == 0:
        return out
    options = launch("log_mel_fbank", architecture, torch.float32)
    tiles = triton.cdiv(length, options["BLOCK_F"])
    log_mel_fbank_kernel[(batch * tiles,)](
        waveform, num_samples, cosines, sines, filters, out, waveform.stride(0), tiles,
        reference.num_frames(samples, sample_rate), length, reference.ENERGY_FLOOR, mean, std,
        WINDOW=window, SHIFT=shift, K=cosines.shape[1], N=cosines.shape[2], MEL=num_mel_bins,
        UNIT=TABLE_BITS + (15 if waveform.dtype == torch.int16 else 0), BLOCK_K=BLOCK_K, BLOCK_N=BLOCK_N,
        BLOCK_M=filters.shape[1], HAS_COUNT=num_samples is not None, **options,
    )  # fmt: skip
    return out


@lru_cache(maxsize=32)
def _constants(
    sample_rate: int, num_mel_bins: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hanning window `[window - 1]` (without its first 0), and the mel filters' weights that are not 0, mel bin by mel bin:
    DFT bins, weights, and where each mel bin's begin."""
    window, _, _ = reference.frame_sizes(sample_rate)
    filters = reference.mel_filters(sample_rate, num_mel_bins)
    mel, dft = filters.nonzero(as_tuple=True)
    begins = torch.searchsorted(mel, torch.arange(num_mel_bins))
    hann = reference.hann_window(window)[1:]
    return hann.to(device, dtype), dft.to(device), filters[mel, dft].to(device, dtype), begins.to(device)


def _forward_torch(waveform, num_samples, sample_rate, num_mel_bins, length, mean, std):
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    batch, samples = waveform.shape
    window, shift, dft_length = reference.frame_sizes(sample_rate)
    hann, dft_bins, weights, begins = _constants(sample_rate, num_mel_bins, waveform.device, dtype)
    if waveform.dtype == torch.int16:
        hann = hann / 32768
    frames = min(length, reference.num_frames(samples, sample_rate))
    out = waveform.new_empty(batch, length, num_mel_bins, dtype=dtype)
    out[:, frames:] = -mean / std
    if batch == 0 or frames == 0:
        return out  # FFT libraries refuse empty batches
    most = _BLOCK_FRAMES.get(waveform.device.type, _BLOCK_FRAMES_ACCELERATOR)
    block = triton.cdiv(frames, triton.cdiv(frames, most))
    clips = min(batch, max(1, most // block))
    padded = waveform.new_zeros(clips * block, dft_length, dtype=dtype)  # what lies past the window stays 0
    power = padded.new_zeros(dft_length // 2 + 1, clips * block)
    shift_by = padded.new_full((), -mean / std)
    scale = padded.new_full((batch, frames, 1), 1 / std)
    if num_samples is not None:
        own = torch.arange(frames, device=out.device) <= ((num_samples - window) // shift).unsqueeze(1)  # [batch, frames]
        scale.masked_fill_(~own.unsqueeze(-1), 0.0)
        own_frames = own.sum(dim=1, keepdim=True)
    for first in range(0, batch, clips):
        chosen = slice(first, first + clips)
        sound = waveform[chosen, : (frames - 1) * shift + window].to(dtype)
        means = sound.unfold(-1, window, shift).mean(dim=-1)  # [clips, frames]
        # Every frame loses its mean anyway: losing the average of all first keeps float32 digits for the sound.
        if num_samples is None:
            center = means.mean(dim=1, keepdim=True)
        else:
            center = torch.where(own[chosen], means, 0.0).sum(dim=1, keepdim=True) / own_frames[chosen]
        sound = sound - center
        means = (means - center).unsqueeze(-1)
        # Once over the clip, not in each of the overlapping frames, and without the first sample, which never counts:
        # (x[t] - m) - 0.97 (x[t-1] - m) = (x[t] - 0.97 x[t-1]) - 0.03 m.
        emphasised = torch.sub(sound[:, 1:], sound[:, :-1], alpha=reference.PRE_EMPHASIS)
        emphasised = emphasised.unfold(-1, window - 1, shift)  # [clips, frames, window - 1]
        for start in range(0, frames, block):
            here = slice(start, min(start + block, frames))
            shape = sound.shape[0], here.stop - here.start
            windowed = padded[: shape[0] * shape[1], : window - 1]
            part = windowed.view(*shape, window - 1)
            torch.sub(emphasised[:, here], means[:, here], alpha=1.0 - reference.PRE_EMPHASIS, out=part)
            windowed.mul_(hann)
            # Contiguous: to square real and imaginary parts apart is slow.
            squares = torch.view_as_real(torch.fft.rfft(padded)).square_()
            torch.add(squares[..., 0], squares[..., 1], out=power.T)
            # A DFT bin counts in two mel bins alone: a sixty-fourth of the dense product, and what no global switch (TF32,
            # bf16 products on CPU) reaches: a TF32 product would cost 1e-3 in the logarithm.
            energies = F.embedding_bag(dft_bins, power, begins, mode="sum", per_sample_weights=weights)  # [mel, rows]
            energies = energies[:, : shape[0] * shape[1]]
            if num_samples is not None and waveform.is_floating_point():
                energies.masked_fill_(~own[chosen, here].flatten(), 1.0)  # padding may hold NaN
            energies.clamp_(min=reference.ENERGY_FLOOR).log_()
            features = energies.T.unflatten(0, shape)
            torch.addcmul(shift_by, features, scale[chosen, here], out=out[chosen, here])
    return out


# --------------------------------------------------------------------------------------------------- torch operator


def _forward_fake(waveform, num_samples, sample_rate, num_mel_bins, length, mean, std):
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    return waveform.new_empty(waveform.shape[0], length, num_mel_bins, dtype=dtype)


_forward = register(
    "log_mel_fbank",
    "(Tensor waveform, Tensor? num_samples, SymInt sample_rate, SymInt num_mel_bins, SymInt length, float mean,"
    " float std) -> Tensor",
    torch=_forward_torch,
    triton=_forward_triton,
    fake=_forward_fake,
    limit=_limit,
    shape=lambda waveform, num_samples, sample_rate, num_mel_bins, *_: (*waveform.shape, num_mel_bins),
)


def _run(waveform: Tensor, num_samples: Tensor | None, *arguments) -> Tensor:
    """The operator on the dtypes and strides it takes. Features need no gradient: none is recorded."""
    if waveform.dtype not in (torch.int16, torch.float64):
        waveform = waveform.to(torch.float32)
    waveform = waveform.detach()
    return _forward(waveform if waveform.stride(-1) == 1 else waveform.contiguous(), num_samples, *arguments)


def log_mel_fbank(waveform: Tensor, sample_rate: int = SAMPLE_RATE, num_mel_bins: int = MEL_BINS) -> Tensor:
    """Log-mel energies as Kaldi computes them (25 ms Hanning window, 10 ms shift, no dither, 20 Hz to Nyquist).

    Args:
        waveform: `[batch, samples]` or `[samples]` (a batch of one), floating point, full scale 1.0, any device.
            Float64 is computed in float64, everything else in float32.
        sample_rate: samples per second.
        num_mel_bins: mel bins between 20 Hz and half the sample rate.

    Returns:
        `[batch, frames, num_mel_bins]` natural logarithms, float64 for float64 input and else float32, with
        `frames = 1 + (samples - window) // shift`; energies are floored at the float32 epsilon (log: -15.9424).
        There is no gradient to the waveform.

    Raises:
        TypeError: `waveform` is no floating-point tensor.
        ValueError: `waveform` has a wrong number of dimensions or is shorter than one 25 ms window.
    """
    reference.check_waveform(waveform, sample_rate, num_mel_bins)
    frames = reference.num_frames(waveform.shape[-1], sample_rate)
    return _run(waveform.reshape(-1, waveform.shape[-1]), None, sample_rate, num_mel_bins, frames, 0.0, 1.0)


def log_mel_features(
    waveform: Tensor,
    num_samples: Tensor,
    length: int,
    mean: float,
    std: float,
    sample_rate: int = SAMPLE_RATE,
    num_mel_bins: int = MEL_BINS,
) -> Tensor:
    """Normalized log-mel energies of a batch of clips of different lengths, each as if it had been computed alone.

    The frames of a clip's own samples are zero-padded or cut to `length`, and then normalized as `(x - mean) / std`
    (so padding becomes `-mean / std`, as published).

    Args:
        waveform: `[batch, samples]`: int16, or floating point with full scale 1.0. What lies past a clip's own end is
            ignored.
        num_samples: `[batch]` integers on the same device, the samples that are the clip's own: one window (25 ms) or more.
        length: frames of 10 ms to return.
        mean, std: of the log-mel values of the training data.
        sample_rate, num_mel_bins: as in `log_mel_fbank`.

    Returns:
        `[batch, length, num_mel_bins]`, float64 for float64 input and else float32. There is no gradient.

    Raises:
        TypeError, ValueError: a wrong type or shape, or `num_samples` out of range. (The range is checked for tensors
            on the CPU only: looking at it on an accelerator would make every batch wait.)
    """
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise TypeError(f"waveform is {waveform.dtype}; allowed: int16 or floating point")
    if waveform.dim() != 2:
        raise ValueError(f"waveform has shape {list(waveform.shape)}; allowed: [batch, samples]")
    reference.check_sizes(waveform, sample_rate, num_mel_bins)
    batch, samples = waveform.shape
    if num_samples.is_floating_point() or num_samples.shape != (batch,):
        raise ValueError(
            f"num_samples is {num_samples.dtype} {list(num_samples.shape)}; allowed: integers of shape [{batch}]"
        )
    if length < 1:
        raise ValueError(f"length is {length}; allowed: 1 or more frames")
    window, _, _ = reference.frame_sizes(sample_rate)
    if num_samples.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(num_samples.min()), int(num_samples.max())
        if low < window or high > samples:
            raise ValueError(f"num_samples lies in [{low}, {high}]; allowed: {window} to {samples} (the waveform's)")
    return _run(waveform, num_samples.to(waveform.device), sample_rate, num_mel_bins, length, mean, std)
