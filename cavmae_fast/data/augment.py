"""What the decisions of `draws.py` do to a batch on its device: mixup, SpecAugment, noise and roll."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cavmae_fast.clip import AUDIO_MEAN, AUDIO_STD


@torch.no_grad()
def mix_waveforms(
    waveform: Tensor, num_samples: Tensor, other: Tensor, other_num_samples: Tensor, lam: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Sound of each clip mixed with another's, as published: `lam * first + (1 - lam) * second`, without its mean.

    Both lose the mean of their own samples before, and the second is zero-padded or cut to the first's length.

    Args:
        waveform, other: `[batch, samples]` (the numbers of samples may differ) on one device: int16, or floating point
            with full scale 1.0. What lies past a clip's own end is ignored.
        num_samples, other_num_samples: `[batch]` integers, the samples that are the clips' own.
        lam: `[batch]`, the first clip's share. Where it is 1 the first clip comes out as it was, so that
            `audio_features` returns, bit by bit, what it returns for that clip unmixed; `other` may hold anything there.

    Returns:
        `[batch, samples]` float32 with zeros past the clips' ends, and `num_samples`.

    Raises:
        TypeError, ValueError: a wrong type or shape, or (looked at on the CPU only) a number of samples out of range.
    """
    for name, sound, own in (("waveform", waveform, num_samples), ("other", other, other_num_samples)):
        if sound.dtype != torch.int16 and not sound.is_floating_point():
            raise TypeError(f"{name} is {sound.dtype}; allowed: int16 or floating point")
        if sound.dim() != 2 or len(sound) != len(waveform):
            raise ValueError(f"{name} has shape {list(sound.shape)}; allowed: [batch, samples], one batch for both")
        if own.device.type == "cpu" and own.numel() and not 0 <= own.min() <= own.max() <= sound.shape[1]:
            raise ValueError(
                f"num_samples of {name} lies in [{own.min()}, {own.max()}]; allowed: 0 to {sound.shape[1]} (the sound's)"
            )
    share = _rows("lam", lam, waveform, torch.float32)  # [batch, 1]
    first, own, count = _own_samples(waveform, _rows("num_samples", num_samples, waveform, torch.int64))
    second, theirs, their_count = _own_samples(other, _rows("other_num_samples", other_num_samples, other, torch.int64))
    second = torch.where(theirs, second - second.sum(dim=1, keepdim=True) / their_count, 0.0)
    second = F.pad(second, (0, waveform.shape[1] - other.shape[1]))  # a negative number cuts
    mixed = torch.lerp(second, first - first.sum(dim=1, keepdim=True) / count, share)
    mean = torch.where(own, mixed, 0.0).sum(dim=1, keepdim=True) / count
    return torch.where(own & (share < 1), mixed - mean, first), num_samples


def _own_samples(waveform: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 sound with zeros past each clip's end, where it is the clip's own, and the number `[batch, 1]` of samples."""
    own = torch.arange(waveform.shape[1], device=waveform.device) < count
    scaled = waveform.float() / 32768 if waveform.dtype == torch.int16 else waveform.float()
    return torch.where(own, scaled, 0.0), own, count.clamp(min=1)  # not a product: padding may hold NaN


@torch.no_grad()
def mix_images(image: Tensor, other: Tensor, lam: Tensor | np.ndarray) -> Tensor:
    """Normalized images mixed as `lam * image + (1 - lam) * other`; where `lam` is 1, exactly `image`.

    Args:
        image, other: `[batch, 3, height, width]` or `[batch, frames, 3, height, width]`, one floating-point dtype and
            device, finite.
        lam: `[batch]`, the first image's share, rounded to that dtype.

    Returns:
        The shape and dtype of `image`.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    if not image.is_floating_point() or other.dtype != image.dtype:
        raise TypeError(f"image is {image.dtype} and other {other.dtype}; allowed: one floating-point dtype (normalized)")
    if image.dim() not in (4, 5) or image.shape != other.shape:
        raise ValueError(
            f"image is {list(image.shape)} and other {list(other.shape)}; allowed: both one shape, "
            "[batch, 3, height, width] or [batch, frames, 3, height, width]"
        )
    share = _rows("lam", lam, image, image.dtype)
    return torch.lerp(other, image, share.view(-1, *[1] * (image.dim() - 1)))


@torch.no_grad()
def mask_spectrogram(
    features: Tensor, freq: Tensor | np.ndarray, time: Tensor | np.ndarray, fill: float = -AUDIO_MEAN / AUDIO_STD
) -> Tensor:
    """SpecAugment: one band of mel bins and one of frames of each clip are set to `fill`.

    Args:
        features: `[batch, frames, mel bins]`, floating point, normalized.
        freq, time: `[batch, 2]` integers, first masked bin or frame and number of them.
        fill: `(0 - mean) / std`. The published order, masking with 0 and then normalizing, gives the same.

    Returns:
        `[batch, frames, mel bins]` in the dtype of `features`.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    _check_features(features)
    masked = []
    for name, band, size in (("time", time, features.shape[1]), ("freq", freq, features.shape[2])):
        start, width = _rows(name, band, features, torch.int64, 2).split(1, dim=1)
        places = torch.arange(size, device=features.device)
        masked.append((places >= start) & (places < start + width))  # [batch, size]
    return features.masked_fill(masked[0][:, :, None] | masked[1][:, None, :], fill)


@torch.no_grad()
def noise_and_roll(
    features: Tensor,
    level: Tensor | np.ndarray,
    shift: Tensor | np.ndarray,
    generator: torch.Generator,
    rows: np.ndarray | None = None,
) -> Tensor:
    """Add noise, uniform in [0, 1) times `level`, then roll by `shift` frames: what leaves one end enters at the other.

    Args:
        features: `[batch, frames, mel bins]`, floating point, normalized.
        level: `[batch]`, the noise's upper end.
        shift: `[batch]` integers, frames towards the end.
        generator: of the step's noise, on the features' device; see `generator_for`.
        rows: `[batch]` integers, rising: which rows of the step these are, whose other rows lie on other ranks; default:
            the first ones.

    Returns:
        `[batch, frames, mel bins]` in the dtype of `features`.

    Raises:
        TypeError, ValueError: a wrong type or shape, or a generator of another device.
    """
    _check_features(features)
    if generator.device.type != features.device.type:
        raise ValueError(f"generator is on {generator.device}; allowed: {features.device}, where features is")
    field = _noise(features, generator, np.arange(len(features)) if rows is None else rows)
    noisy = field.mul_(_rows("level", level, features, features.dtype)[:, :, None]).add_(features)
    batch, frames, _ = features.shape
    clip = torch.arange(batch, device=features.device)[:, None]
    source = (torch.arange(frames, device=features.device) - _rows("shift", shift, features, torch.int64)) % frames
    return noisy[clip, source]


def _noise(like: Tensor, generator: torch.Generator, rows: np.ndarray) -> Tensor:
    """Uniform numbers in [0, 1) of the shape and dtype of `like`: these rows of a field that `generator` fills row by row.

    So a row's numbers depend on its place in the step and not on which rank has it. A GPU's generator counts, and what comes
    before a row is passed over at no cost; a CPU's has to be run through it.
    """
    field = torch.empty_like(like, memory_format=torch.contiguous_format)
    at = 0  # the row that the generator stands before
    for place, row in zip(field, rows.tolist(), strict=True):
        if row > at:
            _pass_over(row - at, generator, place)
        torch.rand(place.shape, generator=generator, out=place)
        at = row + 1
    return field


def _pass_over(count: int, generator: torch.Generator, row: Tensor) -> None:
    """Lets `generator` stand behind as many more rows, without their numbers; `row` is written over."""
    if row.device.type == "cuda":
        before = generator.get_offset()
        torch.rand(row.shape, generator=generator, out=row)
        generator.set_offset(before + count * (generator.get_offset() - before))
    else:
        for _ in range(count):
            torch.rand(row.shape, generator=generator, out=row)


def _check_features(features: Tensor) -> None:
    if not features.is_floating_point():
        raise TypeError(f"features is {features.dtype}; allowed: floating point")
    if features.dim() != 3:
        raise ValueError(f"features has shape {list(features.shape)}; allowed: [batch, frames, mel bins]")


def _rows(name: str, values: Tensor | np.ndarray, like: Tensor, dtype: torch.dtype, columns: int = 1) -> Tensor:
    """Numbers of each clip, `[batch]` or `[batch, columns]`, as `[batch, columns]` on the device of `like`."""
    values = torch.as_tensor(values)
    batch = len(like)
    if values.shape != ((batch,) if columns == 1 else (batch, columns)):
        allowed = f"[{batch}]" if columns == 1 else f"[{batch}, {columns}]"
        raise ValueError(f"{name} has shape {list(values.shape)}; allowed: {allowed}")
    if not dtype.is_floating_point and (values.is_floating_point() or values.dtype == torch.bool):
        raise TypeError(f"{name} is {values.dtype}; allowed: integers")
    # Rounded before the copy: half the bytes, and not every device has float64.
    return values.to(dtype).to(like.device, non_blocking=True).view(batch, columns)
