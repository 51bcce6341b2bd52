"""`inpaint`: clips with most of their patches removed, as a pretrained model fills them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode.decoder import Reject
from cavmae_fast.data.decode.reading import Arrays, Reader
from cavmae_fast.data.features import audio_features, image_features
from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.opening import Clips, frames_of, open_clips
from cavmae_fast.errors import CavmaeError
from cavmae_fast.evaluation.reconstruction import Filled, colors, fill_in
from cavmae_fast.evaluation.running import Model, Running, ready_model
from cavmae_fast.models.abilities import FillsIn
from cavmae_fast.reference.fbank import num_frames

MaskMode = Literal["unstructured", "time", "freq", "tf"]
DECIBELS = 10 / math.log(10)
"Of a natural logarithm of an energy."


class InpaintError(CavmaeError):
    """There is nothing to fill in."""


@dataclass(frozen=True, eq=False)
class Views:
    """One modality of a clip three times: as it is, with patches removed, and filled in by the model.

    Pictures are `[S, S, 3]` uint8, or `[frames, S, S, 3]` where the model sees several at once; spectrograms
    `[frames, mel_bins]` float32, normalized log-mel, without padding.
    """

    original: np.ndarray
    masked: np.ndarray
    filled: np.ndarray


@dataclass(frozen=True)
class Errors:
    """How far what was filled in is from what was removed, and how far the mean of what was left would be.

    Attributes:
        audio_db, audio_mean_db: root mean square over the removed part of the spectrogram, in dB.
        video_psnr_db, video_mean_psnr_db: peak signal-to-noise ratio over the removed pixels, in dB; more is better.

    None of a modality that the model does not have.
    """

    audio_db: float | None = None
    audio_mean_db: float | None = None
    video_psnr_db: float | None = None
    video_mean_psnr_db: float | None = None


@dataclass(frozen=True, eq=False)
class InpaintedClip:
    """One clip: its name, the file it came from, what the model has of both modalities, its sound `[samples]` int16, and the
    errors."""

    id: str
    path: str
    picture: Views | None
    spectrogram: Views | None
    sound: np.ndarray
    errors: Errors


@dataclass(frozen=True, eq=False)
class Inpainted:
    """The result of `inpaint`.

    Attributes:
        clips: those that could be used.
        rejects: the others, and why.
        mask_ratio, mask_mode, seed: what was removed.
        statistics_given: the model predicts patches up to their mean and spread (`norm_pix_loss`), which were therefore
            taken from the true patches: it is shown better than it is.
        clip_spec: what the spectrograms are normalized with.
    """

    clips: tuple[InpaintedClip, ...]
    rejects: tuple[Reject, ...]
    mask_ratio: float
    mask_mode: str
    seed: int
    statistics_given: bool
    clip_spec: ClipSpec


def inpaint(
    model: Model | str | PathLike,
    data: str | Path | Sequence[str | Path] | Clips,
    *,
    mask_mode: MaskMode = "unstructured",
    mask_ratio: float | None = None,
    clips: int = 8,
    seed: int = 0,
    running: Running | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Inpainted:
    """Removes patches of the first `clips` clips of `data`, of sound and picture alike, and lets the model fill them in. A
    model of several pictures per clip gets those of the crop in the middle.

    Args:
        model: a pretrained model, or its checkpoint (see `open_model`).
        mask_mode: how patches of the sound are chosen: anywhere, or whole stretches of time, frequency, or both (not for
            every model).
        mask_ratio: share of the patches that is removed; default: as published, 0.75 for CAV-MAE and 0.8 for MAEs and MAViL.
        seed: of the choice of patches.
        progress: called with how many clips of how many are done.

    Raises:
        CheckpointError, MediaError: model or data cannot be read.
        InpaintError: the model has no decoder, or no clip can be used. ValueError: an argument is out of range.
    """
    running = running or Running()
    precision = running.precision()
    if clips < 1:
        raise ValueError(f"clips is {clips}; allowed: 1 or more")
    if mask_mode not in ("unstructured", "time", "freq", "tf"):
        raise ValueError(f"mask_mode is {mask_mode!r}; allowed: unstructured, time, freq or tf")
    records = open_clips(data)
    model = ready_model(model, precision)
    if not isinstance(model, FillsIn):
        raise InpaintError(
            f"the model is a {type(model).__name__}, which has no decoder; allowed: a pretrained CAVMAE, MAE or MAViL"
        )
    if mask_mode not in model.mask_modes:
        raise ValueError(
            f"mask_mode is {mask_mode!r}; for {type(model).__name__} it must be one of {', '.join(model.mask_modes)}"
        )
    mask_ratio = model.usual_mask_ratio if mask_ratio is None else mask_ratio
    spec = model.clip_spec
    reader, found, rejects = Reader(spec, frames_of(records, spec)), [], []
    total = min(clips, len(records))
    with torch.random.fork_rng():  # the caller's own random numbers go on as if nothing had been drawn here
        torch.manual_seed(seed)
        for number in range(total):
            record = records[number]
            try:
                arrays = reader.read(record, 0.5)
            except MediaError as error:
                rejects.append(Reject(str(record), str(error)))
                continue
            audio, image = _features(arrays, spec, precision.device)
            with precision.autocast():
                parts = fill_in(model, audio, image, mask_ratio, mask_mode)
            found.append(_clip(arrays, str(record), parts, spec))
            progress(number + 1, total)
    if not found:
        raise InpaintError(f"none of {total} clips can be used; the first: {rejects[0].reason}")
    return Inpainted(tuple(found), tuple(rejects), mask_ratio, mask_mode, seed, model.norm_pix_loss, spec)


def _features(arrays: Arrays, spec: ClipSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's inputs, of one clip."""
    waveform = torch.from_numpy(arrays.sound.copy())[None].to(device)
    count = torch.tensor([arrays.info.samples], device=device)
    statistics = (spec.audio_length, spec.audio_mean, spec.audio_std, spec.sample_rate, spec.mel_bins)
    pixels = torch.from_numpy(arrays.images.copy()).permute(0, 3, 1, 2).reshape(1, *spec.shapes[1]).to(device)
    return audio_features(waveform, count, *statistics), image_features(pixels, spec.image_mean, spec.image_std)


def _clip(arrays: Arrays, path: str, parts: dict[str, Filled], spec: ClipSpec) -> InpaintedClip:
    spectrogram = pictures = None
    errors: dict[str, float] = {}
    if (sound := parts.get("a")) is not None:
        frames = min(num_frames(arrays.info.samples, spec.sample_rate), spec.audio_length)
        sound = Filled(*(x[..., :frames] for x in sound))  # without padding
        spectrogram = Views(*(x[0, 0].T.contiguous().numpy() for x in sound[:3]))
        error, of_mean = (DECIBELS * spec.audio_std * rms for rms in _errors(sound))
        errors |= {"audio_db": error, "audio_mean_db": of_mean}
    if (picture := parts.get("v")) is not None:
        pictures = Views(*(colors(x[0], spec) for x in picture[:3]))
        error, of_mean = (20 * math.log10(1 / max(rms, 1e-10)) for rms in _errors(picture, torch.tensor(spec.image_std)))
        errors |= {"video_psnr_db": error, "video_mean_psnr_db": of_mean}
    return InpaintedClip(arrays.info.id, path, pictures, spectrogram, arrays.sound, Errors(**errors))


def _errors(one: Filled, scale: Tensor | None = None) -> tuple[float, float]:
    """Root mean square over what was removed of one clip: of the prediction, and of the mean of each channel over what was
    left. `scale`: what each channel is multiplied by."""
    true, filled, hidden = (part[0].flatten(1) for part in (one.true, one.filled, one.hidden))  # [C, pixels], [1, pixels]
    left = 1 - hidden
    mean = (true * left).sum(dim=1, keepdim=True) / left.sum().clamp(min=1)
    removed = hidden.sum().clamp(min=1) * len(true)
    weight = hidden if scale is None else hidden * scale.view(-1, 1)
    error, of_mean = (float((((guess - true) * weight).square().sum() / removed).sqrt()) for guess in (filled, mean))
    return error, of_mean
