"""One clip of a data set into arrays: what the loader's processes do."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cavmae_fast.data.decode.workers import unusable
from cavmae_fast.data.media.encoded import SAMPLE_RATE, Encoded, decode_image, decode_sound
from cavmae_fast.data.media.files import Clip, MediaError, read_clip
from cavmae_fast.data.sets.labels import LabelSet, foreign_labels
from cavmae_fast.data.sets.shards import ShardClip
from cavmae_fast.data.sets.sources import Source

Record = ShardClip | Source
"""Where one clip is."""


class ClipInfo(NamedTuple):
    """What is known of a clip besides its picture and sound. `samples`: its own, at 16 kHz."""

    id: str
    labels: tuple[str, ...]
    samples: int


def read_encoded(record: Record, frame: int) -> tuple[str, tuple[str, ...], Encoded]:
    """Id, labels and bytes of a clip that lies in a shard or in extracted files. MediaError names what cannot be read."""
    if isinstance(record, ShardClip):
        meta, encoded = record.read(frame)
        return meta["id"], tuple(meta["labels"]), encoded
    return record.id, record.labels, record.encoded(frame)


def image_name(record: Record, frame: int) -> str:
    """How messages call a clip's frame."""
    return record.frame_path(frame) if isinstance(record, Source) else str(record)


@dataclass
class Reader:
    """Decodes a clip's frame and sound.

    Attributes:
        num_frames: of a clip.
        size: height and width of the frame.
        samples: most samples of the sound.
        keep: hold decoded clips in this process's memory (all frames of a video, 1.8 MB at 224 pixels and 10 s).
        label_set: the classes; a clip with another label cannot be used. None: labels are not looked at.
    """

    num_frames: int
    size: int
    samples: int
    keep: bool = False
    label_set: LabelSet | None = None
    _kept: dict[tuple, Any] = field(default_factory=dict)

    def read(self, record: Record, frame: int) -> tuple[ClipInfo, np.ndarray, np.ndarray]:
        """What is known of the clip, its frame `[size, size, 3]` uint8 and its sound `[samples]` int16.

        Raises:
            MediaError: the clip cannot be used.
        """
        if isinstance(record, Source) and record.video:
            self.check_labels(record, record.labels)
            clip, number = self._video(record.video, frame)
            return ClipInfo(record.id, record.labels, len(clip.waveform)), clip.frames[number], clip.waveform
        if (record, frame) in self._kept:
            return self._kept[record, frame]
        clip_id, labels, encoded = read_encoded(record, frame)
        self.check_labels(record, labels)
        image = decode_image(encoded.image, self.size, image_name(record, frame))
        waveform = decode_sound(encoded.sound, str(record))[: self.samples]
        result = ClipInfo(clip_id, labels, len(waveform)), image, waveform
        if self.keep:
            self._kept[record, frame] = result
        return result

    def check_labels(self, record: Record, labels: tuple[str, ...]) -> None:
        """Raises MediaError when a label is not one of the classes."""
        if self.label_set is not None and (unknown := self.label_set.unknown(labels)):
            raise MediaError(foreign_labels(record, unknown))

    def _video(self, path: str, frame: int) -> tuple[Clip, int]:
        options = {"num_frames": self.num_frames, "size": self.size, "seconds": self.samples / SAMPLE_RATE}
        if not self.keep:
            return read_clip(path, frame=frame, **options), 0
        if (path,) not in self._kept:
            try:
                self._kept[path,] = read_clip(path, **options)
            except MediaError as error:
                self._kept[path,] = error
        kept = self._kept[path,]
        if isinstance(kept, MediaError):
            raise kept
        return kept, frame


@dataclass(frozen=True)
class Slots:
    """Memory that the loader shares with its workers: rows of one frame and one sound each.

    Attributes:
        fd: of the shared memory.
        rows, size, samples: rows, height and width of a frame, samples of a sound.
    """

    fd: int
    rows: int
    size: int
    samples: int

    def nbytes(self) -> int:
        return self.rows * (3 * self.size**2 + 2 * self.samples)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """images `[rows, size, size, 3]` uint8 and waveforms `[rows, samples]` int16, mapped."""
        memory = mmap.mmap(self.fd, self.nbytes())
        frame = 3 * self.size**2
        waveforms = np.frombuffer(memory, np.int16, self.rows * self.samples).reshape(self.rows, self.samples)
        images = np.frombuffer(memory, np.uint8, self.rows * frame, offset=waveforms.nbytes)
        return images.reshape(self.rows, self.size, self.size, 3), waveforms


@dataclass
class ReadIntoSlot:
    """Runs in the workers: (row, where the clip is, its frame) -> the clip in that row of the shared memory, and what is
    known of it, or the reason why it cannot be used."""

    reader: Reader
    slots: Slots
    _arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, item: tuple[int, Record, int]) -> ClipInfo | str:
        if self._arrays is None:
            self._arrays = self.slots.arrays()
        (row, record, frame), (images, waveforms) = item, self._arrays
        return read_into(self.reader, record, frame, images[row], waveforms[row])


def read_into(reader: Reader, record: Record, frame: int, image: np.ndarray, waveform: np.ndarray) -> ClipInfo | str:
    """Reads a clip into `image [S, S, 3]` and `waveform [samples]` (zeros past its end), or says why that cannot be."""
    try:
        info, picture, sound = reader.read(record, frame)
    except Exception as error:
        return unusable(error, record)
    image[:] = picture
    waveform[: len(sound)] = sound
    waveform[len(sound) :] = 0
    return info
