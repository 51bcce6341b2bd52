"""What is searched for: a sound, an image or a video file, as a model embeds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode.reading import Reader
from cavmae_fast.data.features import audio_features, image_features
from cavmae_fast.data.media.crop import FRAME_SECONDS, crop_at
from cavmae_fast.data.media.encoded import decode_image
from cavmae_fast.data.media.files import read_clip, read_sound_file
from cavmae_fast.data.sets.opening import NUM_FRAMES, frames_of
from cavmae_fast.data.sets.sources import Source, read_file
from cavmae_fast.evaluation.features import check_streams, embed_inputs, finish
from cavmae_fast.evaluation.running import Model
from cavmae_fast.models.precision import Precision

MIDDLE = 0.5
"The moment of a clip that is looked at."


@dataclass(frozen=True, eq=False)
class Query:
    """A file that is searched for.

    Attributes:
        name: the file's name, as results show it.
        sound: `[samples]` int16 at the model's sample rate, or None.
        frames: `[n, S, S, 3]` uint8 RGB, or None. Of a model that sees several pictures at once, those of a crop.
    """

    name: str
    sound: np.ndarray | None = None
    frames: np.ndarray | None = None


def read_query(
    model: Model,
    *,
    audio: str | Path | None = None,
    image: str | Path | None = None,
    video: str | Path | None = None,
    frames: int = 1,
) -> Query:
    """Reads the one file that is given, as `model` takes its clips: a sound, an image (JPEG or PNG) or a video with both.

    For a model of several pictures at once, sound and pictures are those of the crop in the middle, as clips of an index are
    looked at, and an image stands for a clip in which nothing moves.

    Args:
        frames: pictures of a video; 1: the middle one of ten, as clips of an index are looked at.

    Raises:
        ValueError: none is given, or several. MediaError: the file cannot be read, or lacks sound or picture.
    """
    given = [(name, path) for name, path in (("audio", audio), ("image", image), ("video", video)) if path is not None]
    if len(given) != 1:
        named = " and ".join(name for name, _ in given) or "none"
        raise ValueError(f"of audio, image and video, {named} is given; allowed: exactly one")
    kind, path = given[0]
    spec = model.clip_spec
    if kind == "image":
        picture = decode_image(read_file(str(path)), spec.image_size[0], str(path))
        return Query(Path(path).name, frames=np.repeat(picture[None], spec.frames, axis=0))
    if spec.frame_rate is not None:
        return _read_crop(spec, kind, Path(path))
    sound_of = {"sample_rate": spec.sample_rate, "seconds": spec.samples / spec.sample_rate}
    if kind == "audio":
        return Query(Path(path).name, sound=read_sound_file(path, **sound_of))
    clip = read_clip(path, size=spec.image_size[0], num_frames=NUM_FRAMES, **sound_of)
    chosen = [int((i + 0.5) * NUM_FRAMES / frames) for i in range(frames)]
    return Query(Path(path).name, clip.waveform, clip.frames[chosen])


def _read_crop(spec: ClipSpec, kind: str, path: Path) -> Query:
    """The crop in the middle of a sound or a video; of a sound, as of a video that is heard for as long."""
    source = Source(id=path.stem, video=str(path))
    frames = frames_of([source], spec)
    if kind == "audio":
        rate = spec.sample_rate
        sound = read_sound_file(path, sample_rate=rate, seconds=spec.samples / rate + FRAME_SECONDS)
        crop = crop_at(spec, MIDDLE, frames, len(sound) / rate)
        return Query(path.name, sound=sound[crop.sound(rate, spec.samples)])
    arrays = Reader(spec, frames).read(source, MIDDLE)
    return Query(path.name, arrays.sound, arrays.images)


@torch.no_grad()
def embed_query(model: Model, query: Query, precision: Precision) -> dict[str, Tensor]:
    """The query's embeddings by stream ('audio', 'video'), each `[D]` of length 1, as `embed_clips` makes them of clips.

    Raises ValueError when the model has no such stream or an embedding is not finite."""
    inputs: dict[str, Tensor] = {}
    spec = model.clip_spec
    if query.sound is not None and "a" in model.modalities:
        waveform = torch.from_numpy(query.sound)[None].to(precision.device)
        count = torch.tensor([len(query.sound)], device=precision.device)
        inputs["audio"] = audio_features(
            waveform, count, spec.audio_length, spec.audio_mean, spec.audio_std, spec.sample_rate, spec.mel_bins
        )
    if query.frames is not None and "v" in model.modalities:
        pixels = torch.from_numpy(query.frames.copy()).permute(0, 3, 1, 2).to(precision.device)
        pixels = pixels.reshape(-1, *spec.shapes[1])
        inputs["video"] = image_features(pixels, spec.image_mean, spec.image_std)
    check_streams(model, list(inputs) or ["video" if query.sound is None else "audio"])
    found = {}
    for name, x in inputs.items():
        with precision.autocast():
            tokens = embed_inputs(model, {name: x}, "mean")[name]
        if not bool(tokens.isfinite().all()):
            raise ValueError(f"the {name} embedding of {query.name!r} is not finite; the weights may be damaged")
        found[name] = finish(tokens.sum(dim=0), len(tokens), "mean")
    return found
