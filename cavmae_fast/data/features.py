"""What the models take: normalized log-mel spectrograms and normalized images, from integers, on any device."""

from functools import lru_cache

import torch
from torch import Tensor

from cavmae_fast.clip import AUDIO_MEAN, AUDIO_STD, IMAGE_MEAN, IMAGE_STD, MEL_BINS, SAMPLE_RATE
from cavmae_fast.ops.log_mel_fbank import log_mel_features

Colors = tuple[float, float, float]
"One number each for red, green and blue."


def audio_features(
    waveform: Tensor,
    num_samples: Tensor,
    audio_length: int = 1024,
    mean: float = AUDIO_MEAN,
    std: float = AUDIO_STD,
    sample_rate: int = SAMPLE_RATE,
    mel_bins: int = MEL_BINS,
) -> Tensor:
    """Normalized log-mel spectrograms of a batch of clips, each as if it had been computed alone.

    Every clip loses the mean of its own samples; its frames (25 ms each, every 10 ms: `1 + (n - 400) // 160` of n samples
    at 16 kHz) are zero-padded or cut to `audio_length`, and then normalized as `(x - mean) / std` (so padding becomes
    `-mean / std`, as published).

    Args:
        waveform: `[batch, samples]`: int16, or floating point with full scale 1.0. What lies past a clip's own end is
            ignored.
        num_samples: `[batch]` integers, the samples that are the clip's own, at least 25 ms.
        audio_length: frames of 10 ms to return.
        mean, std: of the log-mel values of the training data.
        sample_rate: of the waveform, in Hz.
        mel_bins: to return.

    Returns:
        `[batch, audio_length, mel_bins]` float32 on the waveform's device.

    Raises:
        TypeError, ValueError: a wrong type or shape, or `num_samples` out of range. (The range is checked for tensors
            on the CPU only: looking at it on an accelerator would make every batch wait.)
    """
    if audio_length < 1:
        raise ValueError(f"audio_length is {audio_length}; allowed: 1 or more frames")
    if waveform.dtype == torch.float64:
        waveform = waveform.float()
    return log_mel_features(waveform, num_samples, audio_length, mean, std, sample_rate, mel_bins)


@lru_cache(maxsize=8)
def _image_statistics(device: torch.device, mean: Colors, std: Colors) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[3, 1, 1]`, kept: to copy them for each batch would wait for the device."""
    first, second = (torch.tensor(values).view(3, 1, 1).to(device) for values in (mean, std))
    return first, second


@torch.no_grad()
def image_features(image: Tensor, mean: Colors = IMAGE_MEAN, std: Colors = IMAGE_STD) -> Tensor:
    """Normalized images.

    Args:
        image: `[batch, 3, height, width]` or `[batch, frames, 3, height, width]` uint8, RGB, any device.
        mean, std: of the colors of pixels in [0, 1]; the default is ImageNet's.

    Returns:
        The same shape, float32.

    Raises:
        ValueError: a wrong dtype or shape.
    """
    if image.dtype != torch.uint8 or image.dim() not in (4, 5) or image.shape[-3] != 3:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; allowed: torch.uint8 of shape [batch, 3, height, width] or "
            "[batch, frames, 3, height, width]"
        )
    subtract, divide = _image_statistics(image.device, tuple(mean), tuple(std))
    return (image.float() / 255).sub_(subtract).div_(divide)
