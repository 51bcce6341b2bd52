"""What the models take: normalized log-mel spectrograms and normalized images, from integers, on any device."""

from functools import lru_cache

import torch
from torch import Tensor

from cavmae_fast.ops.log_mel_fbank import log_mel_features
from cavmae_fast.reference.fbank import frame_sizes
from cavmae_fast.reference.operators import IMAGE_MEAN, IMAGE_STD

AUDIO_MEAN, AUDIO_STD = -5.081, 4.4849  # of the log-mel values over AudioSet
_RATE, _MEL_BINS = 16000, 128
_WINDOW, _SHIFT, _ = frame_sizes(_RATE)


def samples_of(audio_length: int) -> int:
    """Samples at 16 kHz that `audio_length` frames cover."""
    return (audio_length - 1) * _SHIFT + _WINDOW


def audio_features(
    waveform: Tensor, num_samples: Tensor, audio_length: int = 1024, mean: float = AUDIO_MEAN, std: float = AUDIO_STD
) -> Tensor:
    """Normalized log-mel spectrograms of a batch of clips, each as if it had been computed alone.

    Every clip loses the mean of its own samples; its `1 + (n - 400) // 160` frames are zero-padded or cut to
    `audio_length`, and then normalized as `(x - mean) / std` (so padding becomes `-mean / std`, as published).

    Args:
        waveform: `[batch, samples]` at 16 kHz: int16, or floating point with full scale 1.0. What lies past a clip's
            own end is ignored.
        num_samples: `[batch]` integers, the samples that are the clip's own, 400 (25 ms) or more.
        audio_length: frames of 10 ms to return.
        mean, std: of the log-mel values of the training data.

    Returns:
        `[batch, audio_length, 128]` float32 on the waveform's device.

    Raises:
        TypeError, ValueError: a wrong type or shape, or `num_samples` out of range. (The range is checked for tensors
            on the CPU only: looking at it on an accelerator would make every batch wait.)
    """
    if audio_length < 1:
        raise ValueError(f"audio_length is {audio_length}; allowed: 1 or more frames")
    if waveform.dtype == torch.float64:
        waveform = waveform.float()
    return log_mel_features(waveform, num_samples, audio_length, mean, std, _RATE, _MEL_BINS)


@lru_cache(maxsize=8)
def _image_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation `[3, 1, 1]`, kept: to copy them for each batch would wait for the device."""
    mean, std = (torch.tensor(values).view(3, 1, 1).to(device) for values in (IMAGE_MEAN, IMAGE_STD))
    return mean, std


@torch.no_grad()
def image_features(image: Tensor) -> Tensor:
    """Images normalized with ImageNet's mean and standard deviation.

    Args:
        image: `[batch, 3, height, width]` uint8, RGB, any device.

    Returns:
        `[batch, 3, height, width]` float32.

    Raises:
        ValueError: a wrong dtype or shape.
    """
    if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; allowed: torch.uint8 of shape [batch, 3, height, width]"
        )
    mean, std = _image_statistics(image.device)
    return (image.float() / 255).sub_(mean).div_(std)
