"""One clip of a data set into arrays: what the loader's processes do. Nothing here imports torch."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode.workers import unusable
from cavmae_fast.data.media.crop import CLIP_SECONDS, Crop, crop_at
from cavmae_fast.data.media.encoded import decode_image, decode_sound
from cavmae_fast.data.media.files import MediaError, read_clip, read_crop, read_sound_file
from cavmae_fast.data.sets.labels import LabelSet, foreign_labels
from cavmae_fast.data.sets.shards import ShardClip
from cavmae_fast.data.sets.sources import Source

Record = ShardClip | Source
"""Where one clip is."""


class ClipInfo(NamedTuple):
    """What is known of a clip besides its pictures and sound. `samples`: of its sound, as the model hears it."""

    id: str
    labels: tuple[str, ...]
    samples: int


class Arrays(NamedTuple):
    """A clip as it goes into a batch: `images [frames, S, S, 3]` uint8, `sound [info.samples]` int16."""

    info: ClipInfo
    images: np.ndarray
    sound: np.ndarray


@dataclass
class Reader:
    """Decodes what the model takes of a clip.

    Attributes:
        clip: what that is.
        num_frames: frames of a clip, from which its pictures are chosen.
        keep: hold decoded clips in this process's memory (all frames of a video: 1.8 MB for ten at 224 pixels and 10 s).
        label_set: the classes; a clip with another label cannot be used. None: labels are not looked at.
    """

    clip: ClipSpec
    num_frames: int
    keep: bool = False
    label_set: LabelSet | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def read(self, record: Record, moment: float) -> Arrays:
        """The clip's crop at a moment in [0, 1) (see `crop_at`).

        Raises:
            MediaError: the clip cannot be used.
        """
        if isinstance(record, Source) and record.video:
            self.check_labels(record, record.labels)
            return self._from_video(record, moment)
        name, labels, sound = self._once(record, lambda: self._sound(record))
        seconds = self._once((record, "pictures"), record.picture_seconds) if self.clip.frame_rate is not None else None
        crop = self._crop(moment, len(sound) / self.clip.sample_rate, seconds)
        pictures = {k: self._once((record, k), lambda k=k: self._image(record, k)) for k in crop.frames}
        return self._arrays(name, labels, crop, [pictures[k] for k in crop.frames], sound)

    def check_labels(self, record: Record, labels: tuple[str, ...]) -> None:
        """Raises MediaError when a label is not one of the classes."""
        if self.label_set is not None and (unknown := self.label_set.unknown(labels)):
            raise MediaError(foreign_labels(record, unknown))

    def _from_video(self, record: Source, moment: float) -> Arrays:
        cropped, rate = self.clip.frame_rate is not None, self.clip.sample_rate
        frames = {"num_frames": self.num_frames, "size": self.clip.image_size[0]}
        # A crop is cut out of the seconds that shards hold, so that it is the same from either.
        sound_of = {"sample_rate": rate, "seconds": CLIP_SECONDS if cropped else self.clip.samples / rate}
        if not self.clip.frames:
            sound = self._once(record, lambda: read_sound_file(record.video, **sound_of))
            crop, images = self._crop(moment, 0.0), ()
        elif self.keep:
            whole = self._once(record, lambda: read_clip(record.video, **frames, **sound_of))
            sound, crop = whole.waveform, self._crop(moment, whole.duration, whole.picture_seconds)
            images = whole.frames[list(crop.frames)]
        elif cropped:
            crop, images, sound = read_crop(record.video, partial(self._crop, moment), **frames, **sound_of)
        else:  # one pass over the file gives both
            crop = self._crop(moment, 0.0)
            whole = read_clip(record.video, frame=crop.frames[0], **frames, **sound_of)
            images, sound = whole.frames, whole.waveform
        return self._arrays(record.id, record.labels, crop, images, sound)

    def _sound(self, record: Record) -> tuple[str, tuple[str, ...], np.ndarray]:
        name, labels, data = record.head()
        self.check_labels(record, labels)
        return name, labels, decode_sound(data, str(record), self.clip.sample_rate)

    def _image(self, record: Record, frame: int) -> np.ndarray:
        called = record.frame_path(frame) if isinstance(record, Source) else str(record)
        return decode_image(record.image(frame), self.clip.image_size[0], called)

    def _crop(self, moment: float, duration: float, picture_seconds: float | None = None) -> Crop:
        return crop_at(self.clip, moment, self.num_frames, duration, picture_seconds)

    def _arrays(
        self, name: str, labels: tuple[str, ...], crop: Crop, images: Sequence[np.ndarray], sound: np.ndarray
    ) -> Arrays:
        """images: `[S, S, 3]` each; there may be none."""
        heard = sound[crop.sound(self.clip.sample_rate, self.clip.samples)]
        shape = (self.clip.frames, *self.clip.image_size, 3)
        return Arrays(ClipInfo(name, labels, len(heard)), np.asarray(images, np.uint8).reshape(shape), heard)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns or raises; it is called once for each key where clips are kept."""
        if not self.keep:
            return make()
        if key not in self._kept:
            try:
                self._kept[key] = make()
            except MediaError as error:
                self._kept[key] = error
        kept = self._kept[key]
        if isinstance(kept, MediaError):
            raise kept
        return kept


@dataclass(frozen=True)
class Slots:
    """Memory that the loader shares with its workers: rows of one clip each.

    Attributes:
        fd: of the shared memory.
        rows: clips it has room for.
        clip: what a model takes of one.
    """

    fd: int
    rows: int
    clip: ClipSpec

    def _image_shape(self) -> tuple[int, ...]:
        return self.rows, self.clip.frames, *self.clip.image_size, 3

    def nbytes(self) -> int:
        return int(np.prod(self._image_shape())) + 2 * self.rows * self.clip.samples

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """images `[rows, frames, S, S, 3]` uint8 and waveforms `[rows, samples]` int16, mapped."""
        memory = mmap.mmap(self.fd, self.nbytes())
        waveforms = np.frombuffer(memory, np.int16, self.rows * self.clip.samples).reshape(self.rows, -1)
        images = np.frombuffer(memory, np.uint8, offset=waveforms.nbytes, count=int(np.prod(self._image_shape())))
        return images.reshape(self._image_shape()), waveforms


@dataclass
class ReadIntoSlot:
    """Runs in the workers: (row, where the clip is, moment) -> the clip in that row of the shared memory, and what is known
    of it, or the reason why it cannot be used."""

    reader: Reader
    slots: Slots
    _arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, item: tuple[int, Record, float]) -> ClipInfo | str:
        if self._arrays is None:
            self._arrays = self.slots.arrays()
        (row, record, moment), (images, waveforms) = item, self._arrays
        return read_into(self.reader, record, moment, images[row], waveforms[row])


def read_into(reader: Reader, record: Record, moment: float, images: np.ndarray, waveform: np.ndarray) -> ClipInfo | str:
    """Reads a clip into `images [frames, S, S, 3]` and `waveform [samples]` (zeros past its end), or says why that cannot
    be."""
    try:
        found = reader.read(record, moment)
    except Exception as error:
        return unusable(error, record)
    images[:] = found.images
    waveform[: len(found.sound)] = found.sound
    waveform[len(found.sound) :] = 0
    return found.info
