"""Augmentation of the published recipes, for whole batches on their device: frames, mixup, SpecAugment, noise and roll.

Decisions are drawn on the host, from (seed, epoch, position in the epoch's global sequence) and nothing else: a batch can be
rebuilt at any time, and it does not matter how the sequence is split over ranks, batches and workers.
"""

from dataclasses import dataclass, fields
from operator import index
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cavmae_fast.data.features import AUDIO_MEAN, AUDIO_STD

# Columns of random numbers that a position owns. To move one changes every run that is rebuilt from its seed.
_FRAME, _MIXED, _PARTNER, _PARTNER_FRAME, _FREQ, _TIME, _LEVEL, _SHIFT, _FIELD = 0, 1, 2, 3, 4, 6, 8, 9, 10
_LAM = slice(12, 31)
_COLUMNS = 32


@dataclass(frozen=True)
class Augmentation:
    """What a recipe does to its clips.

    Attributes:
        random_frame: draw one of a clip's frames; else the middle one.
        mixup: share of the clips that another one is mixed into, 0 to 1, by lambda ~ Beta(10, 10).
        freq_mask: SpecAugment, most mel bins that are masked (always fewer); 0 masks none.
        time_mask: SpecAugment, most frames that are masked (always fewer); 0 masks none.
        noise: add uniform noise of a random level up to 0.1, then roll in time.
        label_smoothing: 0 to less than 1.

    Raises:
        ValueError: a number is out of range.
    """

    random_frame: bool = True
    mixup: float = 0.0
    freq_mask: int = 0
    time_mask: int = 0
    noise: bool = False
    label_smoothing: float = 0.0

    PRETRAIN: ClassVar["Augmentation"]
    FINE_TUNE: ClassVar["Augmentation"]
    EVALUATE: ClassVar["Augmentation"]

    def __post_init__(self) -> None:
        if not 0 <= self.mixup <= 1:
            raise ValueError(f"mixup is {self.mixup}; allowed: 0 to 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; allowed: 0 to less than 1")
        for name in ("freq_mask", "time_mask"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 0:
                raise ValueError(f"{name} is {value}; allowed: integers of 0 or more")


Augmentation.PRETRAIN = Augmentation(noise=True)
Augmentation.FINE_TUNE = Augmentation(mixup=0.5, freq_mask=48, time_mask=192, noise=True, label_smoothing=0.1)
Augmentation.EVALUATE = Augmentation(random_frame=False)


@dataclass(frozen=True, eq=False)
class Draws:
    """Decisions for a number of clips, a row each; `draws[2:4]` and `draws[indices]` are the draws of those rows.

    Attributes:
        frame: `[rows]` int64, the frame to use.
        mixed: `[rows]` bool, whether another clip is mixed in.
        lam: `[rows]` float64, the share of the first clip; 1.0 where not mixed.
        partner: `[rows]` int64, the clip to mix in; -1 where not mixed.
        partner_frame: `[rows]` int64, its frame; -1 where not mixed.
        freq: `[rows, 2]` int64, first masked mel bin and number of them.
        time: `[rows, 2]` int64, first masked frame and number of them.
        level: `[rows]` float64, what the noise field in [0, 1) is multiplied by: 0 to 0.1.
        shift: `[rows]` int64, frames to roll by, `-audio_length` to `audio_length - 1`.
    """

    frame: np.ndarray
    mixed: np.ndarray
    lam: np.ndarray
    partner: np.ndarray
    partner_frame: np.ndarray
    freq: np.ndarray
    time: np.ndarray
    level: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows: slice | np.ndarray) -> "Draws":
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    position: int,
    rows: int,
    num_clips: int,
    num_frames: int = 10,
    audio_length: int = 1024,
    num_mel_bins: int = 128,
) -> Draws:
    """All decisions for `rows` consecutive positions of the epoch's global sequence, the first being `position`.

    A row depends on (seed, epoch, its own position) alone: the draws of a part of a sequence are that part of its draws.
    Distributions are those of the published `src/dataloader.py` and of torchaudio's masking.

    Args:
        augmentation: the recipe; each of its parts draws from numbers of its own, so that switching one off leaves
            the others as they were.
        seed, epoch: 0 to 2^63 - 1.
        position: of the first row in the epoch, over all ranks.
        rows: how many positions to draw for.
        num_clips: clips of the data set, from which partners are drawn evenly (also when clips are balanced).
        num_frames: frames of a clip.
        audio_length, num_mel_bins: of the spectrograms.

    Raises:
        ValueError: a number is out of range, or a mask may be wider than the spectrogram.
    """
    for name, value, least in (("position", position, 0), ("rows", rows, 0), ("num_clips", num_clips, 1),
                               ("num_frames", num_frames, 1), ("audio_length", audio_length, 1),
                               ("num_mel_bins", num_mel_bins, 1)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is {value}; allowed: {least} or more")
    for name, most, size in (("freq_mask", augmentation.freq_mask, num_mel_bins),
                             ("time_mask", augmentation.time_mask, audio_length)):  # fmt: skip
        if most > size:
            raise ValueError(f"{name} is {most}; allowed: 0 to {size}, what the spectrogram has")

    uniform = (_words(seed, epoch, position, rows) >> np.uint64(11)) * 2.0**-53  # [rows, columns], in [0, 1)

    def below(limit: int, column: int) -> np.ndarray:
        return (uniform[:, column] * limit).astype(np.int64)

    def band(most: int, size: int, column: int) -> np.ndarray:
        width = uniform[:, column] * most
        start = uniform[:, column + 1] * (size - width)
        return np.stack([start, width], axis=1).astype(np.int64)  # each rounded down by itself, as torchaudio does

    middle = np.full(rows, num_frames // 2)
    frame, partner_frame = (
        below(num_frames, column) if augmentation.random_frame else middle for column in (_FRAME, _PARTNER_FRAME)
    )
    mixed = uniform[:, _MIXED] < augmentation.mixup
    lam = np.partition(uniform[:, _LAM], 9, axis=1)[:, 9]  # the median of 19 uniform numbers is Beta(10, 10) exactly
    return Draws(
        frame=frame,
        mixed=mixed,
        lam=np.where(mixed, lam, 1.0),
        partner=np.where(mixed, below(num_clips, _PARTNER), -1),
        partner_frame=np.where(mixed, partner_frame, -1),
        freq=band(augmentation.freq_mask, num_mel_bins, _FREQ),
        time=band(augmentation.time_mask, audio_length, _TIME),
        level=uniform[:, _LEVEL] * (0.1 if augmentation.noise else 0.0),
        shift=below(2 * audio_length, _SHIFT) - audio_length if augmentation.noise else np.zeros(rows, np.int64),
    )


def generator_for(device: torch.device | str, seed: int, epoch: int, position: int) -> torch.Generator:
    """A generator on `device` for the noise field of the batch whose first row has this position.

    Its field depends on the kind of device and on the batch's shape too; `draw` does not.
    """
    return torch.Generator(device).manual_seed(int(_words(seed, epoch, position, 1)[0, _FIELD]))


def _words(seed: int, epoch: int, position: int, rows: int) -> np.ndarray:
    """`[rows, columns]` random uint64: a counter-based generator (Philox4x64-10), so any row can be had at once."""
    for name, value in (("seed", seed), ("epoch", epoch), ("position", position)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}; allowed: 0 to 2^63 - 1")
    key = index(seed) + (index(epoch) << 64)  # Python's integers: NumPy's would overflow in silence
    counter = index(position) * (_COLUMNS // 4)  # four words a count
    return np.random.Philox(key=key, counter=counter).random_raw(rows * _COLUMNS).reshape(rows, _COLUMNS)


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
        image, other: `[batch, 3, height, width]`, one floating-point dtype and device, finite.
        lam: `[batch]`, the first image's share, rounded to that dtype.

    Returns:
        `[batch, 3, height, width]` in the dtype of `image`.

    Raises:
        TypeError, ValueError: a wrong type or shape.
    """
    if not image.is_floating_point() or other.dtype != image.dtype:
        raise TypeError(f"image is {image.dtype} and other {other.dtype}; allowed: one floating-point dtype (normalized)")
    if image.dim() != 4 or image.shape != other.shape:
        raise ValueError(
            f"image is {list(image.shape)} and other {list(other.shape)}; allowed: both one shape, [batch, 3, height, width]"
        )
    return torch.lerp(other, image, _rows("lam", lam, image, image.dtype)[..., None, None])


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
    features: Tensor, level: Tensor | np.ndarray, shift: Tensor | np.ndarray, generator: torch.Generator
) -> Tensor:
    """Add noise, uniform in [0, 1) times `level`, then roll by `shift` frames: what leaves one end enters at the other.

    Args:
        features: `[batch, frames, mel bins]`, floating point, normalized.
        level: `[batch]`, the noise's upper end.
        shift: `[batch]` integers, frames towards the end.
        generator: of the noise, on the features' device; see `generator_for`.

    Returns:
        `[batch, frames, mel bins]` in the dtype of `features`.

    Raises:
        TypeError, ValueError: a wrong type or shape, or a generator of another device.
    """
    _check_features(features)
    if generator.device.type != features.device.type:
        raise ValueError(f"generator is on {generator.device}; allowed: {features.device}, where features is")
    field = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
    noisy = field.mul_(_rows("level", level, features, features.dtype)[:, :, None]).add_(features)
    batch, frames, _ = features.shape
    clip = torch.arange(batch, device=features.device)[:, None]
    source = (torch.arange(frames, device=features.device) - _rows("shift", shift, features, torch.int64)) % frames
    return noisy[clip, source]


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
