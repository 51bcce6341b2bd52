"""Decoded clips to batches: what a model takes, built on the training device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.augment import mask_spectrogram, mix_images, mix_waveforms, noise_and_roll
from cavmae_fast.data.decode.decoder import Decoded, Reject
from cavmae_fast.data.decode.reading import ClipInfo
from cavmae_fast.data.draws import Augmentation, Draws, generator_for
from cavmae_fast.data.features import audio_features, image_features
from cavmae_fast.data.sets.labels import LabelSet


@dataclass(frozen=True)
class Batch:
    """What a model takes, on the loader's device.

    Attributes:
        ids: names of the clips.
        audio: `[B, audio_length, mel_bins]` float32, normalized log-mel.
        image: `[B, 3, S, S]` RGB where a clip is one picture, else `[B, frames, 3, S, S]` (with 0 frames it is empty), with
            each picture's channels last in memory: uint8 (the models normalize it), or float32, normalized by color as
            `ClipSpec` says.
        labels: `[B, classes]` float32, or None where the loader knows no classes.
        clips: `[B]` int64 NumPy array, the numbers in the data set of the clips that are there.
        epoch, position: of the step; `Loader.batch_at` rebuilds the batch from them.
        rejects: clips that could not be used and were replaced (in training) or left out (in evaluation).
    """

    ids: list[str]
    audio: Tensor
    image: Tensor
    labels: Tensor | None
    clips: np.ndarray
    epoch: int
    position: int
    rejects: list[Reject]

    def __getitem__(self, rows: slice) -> Batch:
        """The batch of some of the clips, in views of the same memory."""
        return replace(
            self,
            ids=self.ids[rows],
            audio=self.audio[rows],
            image=self.image[rows],
            labels=None if self.labels is None else self.labels[rows],
            clips=self.clips[rows],
        )


@dataclass(frozen=True)
class BatchBuilder:
    """Decoded clips to a batch, on the device.

    Attributes:
        device: where batches are built and lie.
        clip: what the model takes of a clip.
        augmentation: the recipe; what was drawn by it comes with each step.
        label_set: the classes, or None.
        normalize_images: give float32 images.
        seed: of the noise field.
    """

    device: torch.device
    clip: ClipSpec
    augmentation: Augmentation
    label_set: LabelSet | None
    normalize_images: bool
    seed: int

    def __call__(self, decoded: Decoded) -> Batch:
        step, draws = decoded.step, decoded.step.draws
        used = [place for place, info in enumerate(decoded.infos) if info is not None]
        infos = [decoded.infos[place] for place in used]
        clips = np.array([decoded.clips[place] for place in used], np.int64)
        if len(used) < len(step.wants):  # only evaluation leaves places empty, and it mixes nothing
            draws = draws[np.array(used, np.int64)]
        image, waveform, count = self._arrays(decoded, infos)
        if draws.mixed.any():
            image, waveform, count = self._mixed(image, waveform, count, draws)
        clip = self.clip
        audio = audio_features(
            waveform, count, clip.audio_length, clip.audio_mean, clip.audio_std, clip.sample_rate, clip.mel_bins
        )
        if self.augmentation.freq_mask or self.augmentation.time_mask:
            audio = mask_spectrogram(audio, draws.freq, draws.time, -clip.audio_mean / clip.audio_std)
        if self.augmentation.noise and len(draws):
            generator = generator_for(self.device, self.seed, step.epoch, step.position)
            rows = np.array([step.wants[place].position - step.position for place in used[: len(draws)]], np.int64)
            audio = noise_and_roll(audio, draws.level, draws.shift, generator, rows)
        ids = [info.id for info in infos[: len(draws)]]
        labels = self._labels(infos, draws)
        return Batch(ids, audio, image, labels, clips[: len(draws)], step.epoch, step.position, decoded.rejects)

    def _arrays(self, decoded: Decoded, infos: list[ClipInfo]) -> tuple[Tensor, Tensor, Tensor]:
        """Images `[n, 3, S, S]` or `[n, frames, 3, S, S]`, waveforms `[n, samples]` and their own samples `[n]`, on the
        device."""
        image = decoded.image.to(self.device, non_blocking=True).permute(0, 1, 4, 2, 3)  # channels stay last in memory
        if self.clip.frames == 1:
            image = image[:, 0]
        waveform = decoded.waveform.to(self.device, non_blocking=True)
        count = self._to_device(torch.tensor([info.samples for info in infos], dtype=torch.int64))
        if self.normalize_images:
            image = image_features(image, self.clip.image_mean, self.clip.image_std)
        elif self.device.type == "cpu":
            image = image.clone()  # the memory that it lies in is used again
        return image, waveform, count

    def _mixed(self, image: Tensor, waveform: Tensor, count: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """The first `len(draws)` rows, mixed with the rows of their partners, which come after them."""
        rows = len(draws)
        partner = np.arange(rows)
        partner[draws.mixed] = rows + np.arange(draws.mixed.sum())
        other = torch.from_numpy(partner).to(self.device, non_blocking=True)
        image = mix_images(image[:rows], image[other], draws.lam)
        waveform, count = mix_waveforms(waveform[:rows], count[:rows], waveform[other], count[other], draws.lam)
        return image, waveform, count

    def _labels(self, infos: list[ClipInfo], draws: Draws) -> Tensor | None:
        if self.label_set is None:
            return None
        rows, smoothing = len(draws), self.augmentation.label_smoothing
        indices = self.label_set.encode([info.labels for info in infos])
        if not draws.mixed.any():
            return self._to_device(self.label_set.multi_hot(indices, smoothing))
        partner = np.full_like(indices[:rows], -1)
        partner[draws.mixed] = indices[rows:]
        return self._to_device(self.label_set.multi_hot(indices[:rows], smoothing, partner=partner, lam=draws.lam))

    def _to_device(self, small: Tensor) -> Tensor:
        """A tensor that was made here, on the device; from pinned memory, so that nothing waits for the copy."""
        return small if self.device.type == "cpu" else small.pin_memory().to(self.device, non_blocking=True)
