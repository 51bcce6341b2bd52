"""Every random decision about clips: frames, mixup, masks, noise, roll. What they do to a batch is in `augment.py`.

Decisions are drawn on the host from (seed, epoch, position in the epoch's global sequence) and nothing else. So a batch can
be rebuilt at any time, and it does not matter how the sequence is split over ranks, batches and workers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import index
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cavmae_fast.clip import MEL_BINS

if TYPE_CHECKING:
    import torch

# Columns of random numbers that a position owns. To move one changes every run that is rebuilt from its seed.
_MOMENT, _MIXED, _PARTNER, _PARTNER_MOMENT, _FREQ, _TIME, _LEVEL, _SHIFT, _FIELD = 0, 1, 2, 3, 4, 6, 8, 9, 10
_LAM = slice(12, 31)
_COLUMNS = 32


@dataclass(frozen=True)
class Augmentation:
    """What a recipe does to its clips.

    Attributes:
        random_frame: draw one of a clip's frames, or where the crop begins; else the middle one.
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

    PRETRAIN: ClassVar[Augmentation]
    FINE_TUNE: ClassVar[Augmentation]
    EVALUATE: ClassVar[Augmentation]

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
    """Decisions for some clips, one row per clip; `draws[2:4]` and `draws[indices]` are the draws of those rows.

    Attributes:
        moment: `[rows]` float64 in [0, 1), where in the clip its picture or its crop is taken (`crop_at`).
        mixed: `[rows]` bool, whether another clip is mixed in.
        lam: `[rows]` float64, the share of the first clip; 1.0 where not mixed.
        partner: `[rows]` int64, the clip to mix in; -1 where not mixed.
        partner_moment: `[rows]` float64, where in that clip; -1.0 where not mixed.
        freq: `[rows, 2]` int64, first masked mel bin and number of them.
        time: `[rows, 2]` int64, first masked frame and number of them.
        level: `[rows]` float64, what the noise field in [0, 1) is multiplied by: 0 to 0.1.
        shift: `[rows]` int64, frames to roll by, `-audio_length` to `audio_length - 1`.
    """

    moment: np.ndarray
    mixed: np.ndarray
    lam: np.ndarray
    partner: np.ndarray
    partner_moment: np.ndarray
    freq: np.ndarray
    time: np.ndarray
    level: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.moment)

    def __getitem__(self, rows: slice | np.ndarray) -> Draws:
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    position: int,
    rows: int,
    num_clips: int,
    audio_length: int = 1024,
    num_mel_bins: int = MEL_BINS,
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
        audio_length, num_mel_bins: of the spectrograms.

    Raises:
        ValueError: a number is out of range, or a mask may be wider than the spectrogram.
    """
    for name, value, least in (
        ("position", position, 0),
        ("rows", rows, 0),
        ("num_clips", num_clips, 1),
        ("audio_length", audio_length, 1),
        ("num_mel_bins", num_mel_bins, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; allowed: {least} or more")
    for name, most, size in (
        ("freq_mask", augmentation.freq_mask, num_mel_bins),
        ("time_mask", augmentation.time_mask, audio_length),
    ):
        if most > size:
            raise ValueError(f"{name} is {most}; allowed: 0 to {size}, what the spectrogram has")

    uniform = (_words(seed, epoch, position, rows) >> np.uint64(11)) * 2.0**-53  # [rows, columns], in [0, 1)

    def below(limit: int, column: int) -> np.ndarray:
        return (uniform[:, column] * limit).astype(np.int64)

    def band(most: int, size: int, column: int) -> np.ndarray:
        width = uniform[:, column] * most
        start = uniform[:, column + 1] * (size - width)
        return np.stack([start, width], axis=1).astype(np.int64)  # each rounded down by itself, as torchaudio does

    moment, partner_moment = uniform[:, _MOMENT], uniform[:, _PARTNER_MOMENT]
    if not augmentation.random_frame:
        moment = partner_moment = np.full(rows, 0.5)
    mixed = uniform[:, _MIXED] < augmentation.mixup
    lam = np.partition(uniform[:, _LAM], 9, axis=1)[:, 9]  # the median of 19 uniform numbers is Beta(10, 10) exactly
    return Draws(
        moment=moment,
        mixed=mixed,
        lam=np.where(mixed, lam, 1.0),
        partner=np.where(mixed, below(num_clips, _PARTNER), -1),
        partner_moment=np.where(mixed, partner_moment, -1.0),
        freq=band(augmentation.freq_mask, num_mel_bins, _FREQ),
        time=band(augmentation.time_mask, audio_length, _TIME),
        level=uniform[:, _LEVEL] * (0.1 if augmentation.noise else 0.0),
        shift=below(2 * audio_length, _SHIFT) - audio_length if augmentation.noise else np.zeros(rows, np.int64),
    )


def generator_for(device: torch.device | str, seed: int, epoch: int, position: int) -> torch.Generator:
    """A generator on `device` for the noise field of the step that begins at this position, on all ranks together.

    Its field depends on the kind of device and on how the epoch is cut into steps, too; `draw` does not.
    """
    import torch

    return torch.Generator(device).manual_seed(int(_words(seed, epoch, position, 1)[0, _FIELD]))


def _words(seed: int, epoch: int, position: int, rows: int) -> np.ndarray:
    """`[rows, columns]` random uint64: a counter-based generator (Philox4x64-10), so any row can be had at once."""
    for name, value in (("seed", seed), ("epoch", epoch), ("position", position)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}; allowed: 0 to 2^63 - 1")
    key = index(seed) + (index(epoch) << 64)  # Python's integers: NumPy's would overflow in silence
    counter = index(position) * (_COLUMNS // 4)  # the generator gives four words per count
    return np.random.Philox(key=key, counter=counter).random_raw(rows * _COLUMNS).reshape(rows, _COLUMNS)
