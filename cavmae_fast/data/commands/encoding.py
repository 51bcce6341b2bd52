"""One clip of a list to the bytes that go into a shard: what the worker processes of `cavmae-fast prepare` do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from cavmae_fast.data.decode.workers import unusable
from cavmae_fast.data.media.encoded import SAMPLE_RATE, decode_image, decode_sound, encode_image, encode_sound
from cavmae_fast.data.media.files import MediaError, read_clip, read_sound_file
from cavmae_fast.data.sets.labels import foreign_labels
from cavmae_fast.data.sets.shards import PreparedClip
from cavmae_fast.data.sets.sources import Source, read_file

_CLIP_BYTES = 64 << 20  # a clip of extracted files; one from a video takes 0.6 MB


@dataclass(frozen=True)
class EncodeClip:
    """(number, source) -> the clip as it goes into a shard, or the reason why it cannot.

    Attributes:
        frames, size, seconds, quality: as in `PrepareConfig`.
        known_labels: the classes; a clip with another label cannot be used. None: labels are not looked at.
    """

    frames: int
    size: int
    seconds: float
    quality: int
    known_labels: frozenset[str] | None

    def __call__(self, item: tuple[int, Source]) -> PreparedClip | str:
        key, source = item
        try:
            if self.known_labels is not None and (unknown := set(source.labels) - self.known_labels):
                return foreign_labels(source, sorted(unknown))
            images, waveform, more = self._from_video(source) if source.video else self._from_files(source)
            sound = encode_sound(waveform)
        except Exception as error:
            return unusable(error, source)
        digest = hashlib.sha256(sound)
        for image in images:
            digest.update(image)
        meta = {
            "id": source.id,
            "labels": source.labels,
            "source": str(source),
            "duration": len(waveform) / SAMPLE_RATE,
            "samples": len(waveform),
            **more,
            "hash": digest.hexdigest(),
        }
        return PreparedClip(key, meta, sound, images)

    def _from_video(self, source: Source) -> tuple[list[bytes], np.ndarray, dict[str, Any]]:
        """Frames, sound, and what else is noted of the clip."""
        if not self.frames:
            return [], read_sound_file(source.video, seconds=self.seconds), {}
        clip = read_clip(source.video, num_frames=self.frames, size=self.size, seconds=self.seconds)
        images = [encode_image(frame, self.quality) for frame in clip.frames]
        return images, clip.waveform, {"picture_seconds": clip.picture_seconds}

    def _from_files(self, source: Source) -> tuple[list[bytes], np.ndarray, dict[str, Any]]:
        """Extracted frames are taken as they are, byte for byte, once they are known to decode."""
        images: list[bytes] = []
        for number in range(self.frames):
            images.append(source.image(number))
            if (size := sum(map(len, images))) > _CLIP_BYTES:
                raise MediaError(f"{source}: {len(images)} frames take {size} bytes; allowed: {_CLIP_BYTES} for a clip")
        for image in set(images):
            decode_image(image, self.size, source.frame_path(images.index(image)))
        waveform = decode_sound(read_file(source.sound), source.sound)
        return images, waveform[: int(self.seconds * SAMPLE_RATE)], {}
