"""Kaldi-compatible log-mel filter banks: the audio features of CAV-MAE, written for reading."""

import math

import torch
from torch import Tensor

from cavmae_fast.clip import MEL_BINS, SAMPLE_RATE, SHIFT_SECONDS, WINDOW_SECONDS

PRE_EMPHASIS = 0.97
LOW_HZ = 20.0
# Kaldi floors the energies at the epsilon of float32, whatever the precision of the computation.
ENERGY_FLOOR = torch.finfo(torch.float32).eps


def frame_sizes(sample_rate: int) -> tuple[int, int, int]:
    """Samples per window, samples per shift and DFT length (the next power of two) at `sample_rate` Hz."""
    window = int(sample_rate * WINDOW_SECONDS)
    shift = int(sample_rate * SHIFT_SECONDS)
    if shift < 1:
        raise ValueError(f"sample_rate is {sample_rate}; allowed: at least 100 Hz, so that a 10 ms shift is a sample")
    return window, shift, 1 << (window - 1).bit_length()


def num_frames(samples: int, sample_rate: int = SAMPLE_RATE) -> int:
    """Number of whole 25 ms windows, 10 ms apart, in `samples` samples (0 when not even one fits)."""
    window, shift, _ = frame_sizes(sample_rate)
    return 0 if samples < window else 1 + (samples - window) // shift


def hann_window(window: int) -> Tensor:
    """The symmetric Hanning window `[window]` in float64: 0 at both ends."""
    return 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(window, dtype=torch.float64) / (window - 1))


def mel_filters(sample_rate: int, num_mel_bins: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Triangular filters, equally spaced and equally wide in mel, from 20 Hz to the Nyquist frequency.

    Returns `[num_mel_bins, dft_length // 2 + 1]`: the weight of each DFT bin in each mel bin. Kaldi gives the Nyquist
    bin no weight.
    """
    _, _, dft_length = frame_sizes(sample_rate)

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    low, high = mel(torch.tensor([LOW_HZ, sample_rate / 2], dtype=torch.float64))
    step = (high - low) / (num_mel_bins + 1)
    left = low + step * torch.arange(num_mel_bins, dtype=torch.float64)[:, None]  # [bins, 1]
    bins = mel(torch.arange(dft_length // 2, dtype=torch.float64) * sample_rate / dft_length)[None]  # [1, dft / 2]
    rising, falling = (bins - left) / step, (left + 2 * step - bins) / step
    weights = torch.minimum(rising, falling).clamp(min=0.0)
    return torch.nn.functional.pad(weights, (0, 1)).to(dtype)


def check_waveform(waveform: Tensor, sample_rate: int, num_mel_bins: int) -> None:
    """Raise the errors that `log_mel_fbank` documents."""
    if not isinstance(waveform, Tensor) or not waveform.is_floating_point():
        kind = waveform.dtype if isinstance(waveform, Tensor) else type(waveform).__name__
        raise TypeError(f"waveform is {kind}; allowed: a floating-point tensor (divide int16 samples by 32768)")
    if waveform.dim() not in (1, 2):
        raise ValueError(f"waveform has shape {list(waveform.shape)}; allowed: [batch, samples] or [samples]")
    check_sizes(waveform, sample_rate, num_mel_bins)


def check_sizes(waveform: Tensor, sample_rate: int, num_mel_bins: int) -> None:
    """ValueError unless there is a mel bin, and a whole window in `waveform`."""
    if num_mel_bins < 1:
        raise ValueError(f"num_mel_bins is {num_mel_bins}; allowed: 1 or more")
    window, _, _ = frame_sizes(sample_rate)
    if waveform.shape[-1] < window:
        raise ValueError(
            f"waveform has {waveform.shape[-1]} samples; allowed: at least one 25 ms window, "
            f"{window} samples at {sample_rate} Hz"
        )


def log_mel_fbank(waveform: Tensor, sample_rate: int = SAMPLE_RATE, num_mel_bins: int = MEL_BINS) -> Tensor:
    """Log-mel energies as Kaldi computes them (no dither, no energy term, HTK compatible, edges snipped).

    Args:
        waveform: `[batch, samples]` or `[samples]` (a batch of one), floating point, full scale 1.0. Float64 is
            computed in float64 (the oracle), everything else in float32.
        sample_rate: samples per second.
        num_mel_bins: mel bins between 20 Hz and half the sample rate.

    Returns:
        `[batch, frames, num_mel_bins]` natural logarithms, float64 for float64 input and else float32, with
        `frames = 1 + (samples - window) // shift`; energies are floored at the float32 epsilon (log: -15.9424).

    Raises:
        TypeError: `waveform` is no floating-point tensor.
        ValueError: `waveform` has a wrong number of dimensions or is shorter than one 25 ms window.

    Source: Kaldi's feature-window.cc and mel-computations.cc, with the options of AST (Gong et al., 2021).
    """
    check_waveform(waveform, sample_rate, num_mel_bins)
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    window, shift, dft_length = frame_sizes(sample_rate)
    waveform = waveform.to(dtype).reshape(-1, waveform.shape[-1])

    frames = waveform.unfold(-1, window, shift)  # [batch, frames, window]
    frames = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)  # the first sample is its own predecessor
    frames = frames - PRE_EMPHASIS * previous
    frames = frames * hann_window(window).to(frames)
    power = torch.fft.rfft(frames, n=dft_length).abs().square()  # [batch, frames, dft_length // 2 + 1]
    energies = power @ mel_filters(sample_rate, num_mel_bins).to(power).T
    return energies.clamp(min=ENERGY_FLOOR).log()


def log_mel_features(
    waveform: Tensor,
    num_samples: Tensor,
    length: int,
    mean: float,
    std: float,
    sample_rate: int = SAMPLE_RATE,
    num_mel_bins: int = MEL_BINS,
) -> Tensor:
    """Normalized log-mel energies of a batch of clips, one clip after the other, as the published loader makes them.

    waveform `[batch, samples]`, int16 or floating point; `num_samples [batch]` are the clip's own. Each clip loses the mean
    of its own samples; its frames are zero-padded or cut to `length`, then normalized as `(x - mean) / std`.
    -> `[batch, length, num_mel_bins]`, float64 for float64 input and else float32.
    """
    waveform = waveform / 32768 if waveform.dtype == torch.int16 else waveform
    features = []
    for row, count in zip(waveform, num_samples.tolist()):
        energies = log_mel_fbank(row[:count] - row[:count].mean(), sample_rate, num_mel_bins)[0, :length]
        features.append(torch.nn.functional.pad(energies, (0, 0, 0, length - energies.shape[0])))
    return (torch.stack(features) - mean) / std
