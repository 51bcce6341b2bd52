"""Decoding by DALI: bytes are read here by a few threads, and decoded by DALI's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Semaphore
from typing import Any

import numpy as np
import torch

from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.dali import EncodedVideo
from cavmae_fast.data.decode.decoder import Decoded, Substitute, UnusableDataError
from cavmae_fast.data.decode.reading import ClipInfo, Reader, Record, image_name, read_encoded
from cavmae_fast.data.decode.workers import unusable
from cavmae_fast.data.media.encoded import (
    MIN_SAMPLES,
    SAMPLE_RATE,
    Encoded,
    decode_image,
    decode_sound,
    encode_png,
    encode_wav,
    is_jpeg,
    is_plain_sound,
)
from cavmae_fast.data.media.files import read_clip, read_sound
from cavmae_fast.data.plan import Step
from cavmae_fast.data.sets.sources import Source, read_file

_PAUSE = 0.2  # seconds between looks at whether the loader was closed


class _Fed(list):
    """A batch of encoded clips for DALI. `rows`: the place of each in the step."""

    def __init__(self, clips: Sequence, places: Decoded, rows: Sequence[int]):
        super().__init__(clips)
        self.places, self.rows = places, rows


class InDali:
    """Decodes with DALI: the bytes of each clip are read by a few threads here, and decoded by DALI's.

    Args:
        records: `records[clip]` says where a clip is: all in shards or extracted files; or all videos, of which NVDEC
            decodes the frame, and PyAV the sound.
        reader: how large the results are; decodes what DALI cannot.
        substitute: what takes the place of a clip that cannot be used.
        rows: most clips of a step.
        threads: of DALI, and for reading.
        device: where the results are.
        prefetch: steps decoded ahead.
    """

    def __init__(
        self,
        records: Sequence[Record],
        reader: Reader,
        substitute: Substitute,
        *,
        rows: int,
        threads: int,
        device: torch.device,
        prefetch: int = 3,
    ):
        self.records, self.reader, self.substitute, self.prefetch = records, reader, substitute, prefetch
        self.closing = False
        self._doubtful: set[int] = set()  # clips that are decoded here, because DALI failed at their batch
        self.videos = isinstance(records[0], Source) and records[0].video is not None
        self.options: dict[str, Any] = {
            "image_size": reader.size, "samples": reader.samples, "device": device, "threads": threads, "max_batch": rows,
            "prefetch": prefetch,
        }  # fmt: skip
        self._threads = ThreadPoolExecutor(min(threads, 8), "read")

    def decode(self, steps: Iterator[Step], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        ahead = Semaphore(self.prefetch)
        begun: deque[Decoded] = deque()

        def feed() -> Iterator[_Fed]:
            for step in steps:
                places = Decoded(step, self.substitute)
                begun.append(places)
                yield self._fed(places, range(len(step.wants)))

        decoder = dali.decode_videos if self.videos else dali.decode_batches
        batches = decoder(feed(), repair=self._repair, **self.options)
        while not stopped.is_set():
            if not ahead.acquire(timeout=_PAUSE):
                continue
            batch = next(batches, None)
            if batch is None:
                return
            image, waveform, samples = batch
            places = begun.popleft()
            used = [row for row, info in enumerate(places.infos) if info]
            for row, count in zip(used, samples.tolist()):
                places.infos[row] = places.infos[row]._replace(samples=count)
            image, waveform = image[: len(used)], waveform[: len(used)]
            places.image, places.waveform, places.release = image, waveform, ahead.release
            yield places

    def _fetch(self, places: Decoded, row: int) -> Encoded | EncodedVideo | None:
        """The bytes for a place of a step, or those of its substitute; None when the place stays empty."""
        while (clip := places.clips[row]) is not None:
            record = self.records[clip]
            try:
                places.infos[row], encoded = self._read(record, places.step.wants[row].frame, clip in self._doubtful)
                return encoded
            except Exception as error:
                self._doubtful.add(clip)
                places.infos[row] = None
                places.retry(row, record, unusable(error, record))
        return None

    def _read(self, record: Record, frame: int, doubtful: bool) -> tuple[ClipInfo, Encoded | EncodedVideo]:
        reader = self.reader
        if self.videos:
            reader.check_labels(record, record.labels)
            options = {"num_frames": reader.num_frames, "frame": frame, "seconds": reader.samples / SAMPLE_RATE}
            if doubtful:
                read_clip(record.video, **options)
            waveform, number = read_sound(record.video, **options)
            return ClipInfo(record.id, record.labels, len(waveform)), EncodedVideo(read_file(record.video), number, waveform)
        clip_id, labels, (image, sound) = read_encoded(record, frame)
        reader.check_labels(record, labels)
        # What DALI would decode in another way than the torch loader, or not at all, is decoded here.
        if doubtful or not is_jpeg(image):
            image = encode_png(decode_image(image, reader.size, image_name(record, frame)))
        if doubtful or not is_plain_sound(sound):
            sound = encode_wav(decode_sound(sound, str(record)))
        return ClipInfo(clip_id, labels, 0), Encoded(image, sound)

    def _fed(self, places: Decoded, rows: Sequence[int]) -> _Fed:
        clips = list(self._threads.map(partial(self._fetch, places), rows))
        found = [(row, clip) for row, clip in zip(rows, clips, strict=True) if clip is not None]
        if found:
            return _Fed([clip for _, clip in found], places, [row for row, _ in found])
        if self.videos:
            raise UnusableDataError(places.rejects)
        # DALI takes no empty batch; what it makes of this one is not handed out.
        nothing = Encoded(encode_png(np.zeros((1, 1, 3), np.uint8)), encode_wav(np.zeros(MIN_SAMPLES, np.int16)))
        return _Fed([nothing], places, [])

    def _repair(self, fed: _Fed) -> _Fed:
        """A batch in place of one that DALI could not decode: all of it is decoded here, once, to find the culprits, which
        are decoded here ever after."""
        places, before = fed.places, set(self._doubtful)
        batch = {places.clips[row] for row in fed.rows}
        self._doubtful |= batch
        repaired = self._fed(places, fed.rows)
        if culprits := batch - {places.clips[row] for row in fed.rows}:  # else it may be any of them
            self._doubtful -= batch - culprits - before
        return repaired

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)
