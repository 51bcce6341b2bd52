"""Mean and standard deviation of a data set's log-mel values, for `cavmae-fast check`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cavmae_fast.clip import MEL_BINS

_PUBLISHED_BATCH = 1000  # clips; get_norm_stats.py takes mean and std of such batches, and the mean over the batches
_FEATURE_BATCH = 16  # clips whose features are computed at once
_ADVICE = (
    "To start from a checkpoint, keep the mean and std of its model (`model.clip_spec`): they belong to its weights. To "
    "train from scratch, give the model a clip of its own, ClipSpec(audio_mean=mean, audio_std=std), or the loader `mean` "
    "and `std`; Audio-MAE and MAViL divide by twice the deviation, audio_std=2 * std. `published` is what the published "
    "get_norm_stats.py computes (without its augmentation): it counts the zeros behind short clips as sound; give it to "
    "repeat the published recipe."
)


class LogMelStatistics:
    """Sums of the log-mel values, in float64, for each batch of clips as the published script cuts the list.

    `audio_length`: frames of the spectrograms; no clip that is added is longer.
    """

    def __init__(self, audio_length: int):
        self.audio_length = audio_length
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._sums: dict[int, np.ndarray] = {}  # batch -> clips, values of their own, sum, sum of squares

    def add(self, number: int, waveform: np.ndarray) -> None:
        """Takes clip `number` of the list: `waveform` `[samples]` int16 at 16 kHz."""
        self._waiting.append((number, waveform))
        if len(self._waiting) == _FEATURE_BATCH:
            self._compute()

    def _compute(self) -> None:
        import torch

        from cavmae_fast.data.features import audio_features
        from cavmae_fast.reference.fbank import num_frames

        lengths = [len(waveform) for _, waveform in self._waiting]
        padded = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.int16)
        for row, (_, waveform) in zip(padded, self._waiting, strict=True):
            row[: len(waveform)] = torch.from_numpy(waveform.copy())
        values = audio_features(padded, torch.tensor(lengths), self.audio_length, 0.0, 1.0).double().flatten(1)
        # What lies past a clip's end is 0, so these are also the sums over its own frames.
        sums = torch.stack([values.sum(1), values.square().sum(1)], 1).numpy()
        for (number, _), length, (total, squares) in zip(self._waiting, lengths, sums, strict=True):
            own = MEL_BINS * num_frames(length)  # no more than audio_length frames: the workers cut the sound
            batch = self._sums.setdefault(number // _PUBLISHED_BATCH, np.zeros(4))
            batch += (1, own, total, squares)
        self._waiting = []

    def report(self) -> dict[str, Any] | None:
        """Mean and standard deviation over the clips' own frames, and as published; None when there was no clip."""
        if self._waiting:
            self._compute()
        if not self._sums:
            return None
        batches = np.stack(list(self._sums.values()))  # [batches, 4]
        clips, values, _, _ = total = batches.sum(axis=0)
        padded = self.audio_length * MEL_BINS  # values of a clip
        published = np.mean([_moments(count * padded, *sums) for count, _, *sums in batches], axis=0)
        mean, std = _moments(*total[1:])
        return {
            "clips": int(clips),
            "frames": int(values) // MEL_BINS,
            "mean": mean,
            "std": std,
            "published": {"mean": float(published[0]), "std": float(published[1]), "audio_length": self.audio_length},
            "advice": _ADVICE,
        }


def _moments(n: float, total: float, squares: float) -> tuple[float, float]:
    """Mean and standard deviation (with n - 1, as torch.std) of n values, from their sum and sum of squares."""
    return float(total / n), float(np.sqrt(max(squares - total * total / n, 0.0) / (n - 1)))
