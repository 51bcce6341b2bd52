"""Decoding by DALI: a few threads here read the bytes, and DALI's decode them. What DALI cannot decode is decoded here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event, Semaphore
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.dali import DaliError, EncodedVideo
from cavmae_fast.data.decode.decoder import Decoded, Substitute, UnusableDataError
from cavmae_fast.data.decode.reading import Arrays, ClipInfo, Reader, Record
from cavmae_fast.data.decode.workers import unusable
from cavmae_fast.data.media.crop import crop_at
from cavmae_fast.data.media.encoded import Encoded, encode_image, encode_sound, is_jpeg, is_plain_sound, sound_seconds
from cavmae_fast.data.media.files import read_sound
from cavmae_fast.data.plan import Step
from cavmae_fast.data.sets.sources import Source, read_file

_PAUSE = 0.2  # seconds between looks at whether the loader was closed
_STRIKES = 3  # whole batches in a row that DALI may fail at: then it is not the clips

Bytes = Encoded | EncodedVideo
"""A clip as DALI takes it."""


@dataclass(eq=False)
class _UnderWay:
    """A step that DALI has, and what was found at each of its places: bytes for DALI, a clip that was decoded here, or
    nothing."""

    decoded: Decoded
    found: list[Bytes | Arrays | None]

    @property
    def bytes(self) -> list[Bytes]:
        return [one for one in self.found if isinstance(one, Bytes)]


class InDali:
    """Decodes with DALI, some steps ahead of the one that is handed out.

    DALI fails at a whole batch for one clip, and with it at all that it was given. These few steps are then decoded here, by
    the reader, and DALI goes on with the next. A clip that turns out to be unusable is not given to DALI again.

    Args:
        records: `records[clip]` says where a clip is: all in shards or extracted files; or all videos, of which NVDEC
            decodes the frame, and PyAV the sound.
        reader: says what is taken of a clip, and decodes what DALI decodes in another way, or not at all.
        substitute: what takes the place of a clip that cannot be used.
        rows: most clips of a step.
        threads: of DALI, and for reading.
        device: where the results are.
        prefetch: steps decoded ahead.
        report: called with a sentence when DALI failed at a batch in which nothing is damaged.
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
        report: Callable[[str], None] = lambda message: None,
    ):
        self.records, self.reader, self.substitute, self.prefetch = records, reader, substitute, prefetch
        self.closing, self.device, self.report = False, device, report
        videos = isinstance(records[0], Source) and records[0].video is not None
        self._encoded: Callable[..., Bytes | Arrays] = self._video if videos else self._clip
        decode = dali.decode_videos if videos else dali.decode_batches
        self._decode = partial(decode, clip=reader.clip, device=device, threads=threads, max_batch=rows, prefetch=prefetch)
        # DALI takes no empty batch. It gets this where a step has nothing for it, and what it makes of it is not used.
        black = encode_image(np.zeros((8, 8, 3), np.uint8), quality=50)
        silence = encode_sound(np.zeros(reader.clip.sample_rate, np.int16), reader.clip.sample_rate)
        self._nothing = [Encoded((black,) * reader.clip.frames, silence)]
        self._unusable: set[int] = set()
        self._threads = ThreadPoolExecutor(min(threads, 8), "read")

    def decode(self, steps: Iterator[Step], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        ahead = Semaphore(self.prefetch)
        under_way: deque[_UnderWay] = deque()  # as DALI has them
        lost: deque[_UnderWay] = deque()  # those before them that DALI failed at
        failure: list[UnusableDataError] = []

        def feed() -> Iterator[list[Bytes]]:
            for step in steps:
                decoded = Decoded(step, self.substitute)
                try:
                    found = self._each(partial(self._find, decoded), range(len(step.wants)))
                except UnusableDataError as error:  # the steps before it are handed out first
                    failure.append(error)
                    return
                under_way.append(_UnderWay(decoded, found))
                yield under_way[-1].bytes or self._nothing

        source = feed()
        batches = self._decode(source)
        strikes = 0
        while not stopped.is_set():
            if not ahead.acquire(timeout=_PAUSE):
                continue
            if lost:
                self._decode_here(lost[0])
                yield self._finish(lost.popleft(), None, ahead.release)
                continue
            try:
                batch = next(batches, None)
            except DaliError as error:
                lost.extend(under_way)
                under_way.clear()
                batches = self._decode(source)
                if not self._decode_here(lost[0]):  # nothing in it is damaged
                    strikes += 1
                    if strikes == _STRIKES:
                        raise
                    self.report(f"DALI failed at a batch that is not damaged, which was decoded without it: {error}")
                ahead.release()
                continue
            if batch is not None:
                strikes = 0
                yield self._finish(under_way.popleft(), batch, ahead.release)
            elif failure:
                raise failure[0]
            else:
                return

    def _each(self, function: Callable[[int], Any], places: Sequence[int]) -> list[Any]:
        return list(self._threads.map(function, places))

    def _find(self, decoded: Decoded, place: int, here: bool = False) -> Bytes | Arrays | None:
        """What there is for a place of a step, or for its substitute; None when the place stays empty. `here`: decoded."""
        while (number := decoded.clips[place]) is not None:
            record, moment = self.records[number], decoded.step.wants[place].moment
            try:
                if here or number in self._unusable:
                    found: Bytes | Arrays = self.reader.read(record, moment)
                else:
                    decoded.infos[place], found = self._encoded(record, moment)
                if isinstance(found, Arrays):
                    decoded.infos[place] = found.info
                return found
            except Exception as error:
                self._unusable.add(number)
                decoded.infos[place] = None
                decoded.retry(place, record, unusable(error, record))
        return None

    def _clip(self, record: Record, moment: float) -> tuple[ClipInfo | None, Bytes | Arrays]:
        """The bytes of a clip in a shard or in extracted files; decoded, where DALI would decode them in another way."""
        clip = self.reader.clip
        name, labels, sound = record.head()
        self.reader.check_labels(record, labels)
        if not is_plain_sound(sound, clip.sample_rate):
            return None, self.reader.read(record, moment)
        seconds = (0.0, None)
        if clip.frame_rate is not None:
            seconds = sound_seconds(sound, str(record)), record.picture_seconds()
        crop = crop_at(clip, moment, self.reader.num_frames, *seconds)
        images = {frame: record.image(frame) for frame in crop.frames}
        if not all(map(is_jpeg, images.values())):
            return None, self.reader.read(record, moment)
        first = crop.sound(clip.sample_rate, clip.samples).start
        return ClipInfo(name, labels, 0), Encoded(tuple(images[frame] for frame in crop.frames), sound, first)

    def _video(self, record: Source, moment: float) -> tuple[ClipInfo, Bytes]:
        """A video file as NVDEC takes it, and its sound."""
        clip, frames = self.reader.clip, self.reader.num_frames
        self.reader.check_labels(record, record.labels)
        (frame,) = crop_at(clip, moment, frames, 0.0).frames
        seconds = clip.samples / clip.sample_rate
        waveform, number = read_sound(
            record.video, num_frames=frames, frame=frame, sample_rate=clip.sample_rate, seconds=seconds
        )
        return ClipInfo(record.id, record.labels, len(waveform)), EncodedVideo(read_file(record.video), number, waveform)

    def _decode_here(self, begun: _UnderWay) -> bool:
        """Decodes what was DALI's to decode. Returns whether any of its clips cannot be used."""
        places = [place for place, one in enumerate(begun.found) if isinstance(one, Bytes)]
        rejects = len(begun.decoded.rejects)
        for place, one in zip(places, self._each(partial(self._find, begun.decoded, here=True), places), strict=True):
            begun.found[place] = one
        return len(begun.decoded.rejects) > rejects

    def _finish(self, begun: _UnderWay, batch: tuple[Tensor, Tensor, Tensor] | None, release: Callable[[], None]) -> Decoded:
        """Puts together what DALI decoded and what was decoded here."""
        decoded, clip = begun.decoded, self.reader.clip
        theirs = [place for place, one in enumerate(begun.found) if isinstance(one, Bytes)]
        ours = [place for place, one in enumerate(begun.found) if isinstance(one, Arrays)]
        if theirs:
            image, waveform, samples = batch
            for place, count in zip(theirs, samples.tolist(), strict=True):
                decoded.infos[place] = decoded.infos[place]._replace(samples=count)
            if len(theirs) == len(begun.found):
                return decoded.finish(image, waveform, release)
        whole = torch.zeros(len(begun.found), clip.frames, *clip.image_size, 3, dtype=torch.uint8, device=self.device)
        sounds = torch.zeros(len(begun.found), clip.samples, dtype=torch.int16, device=self.device)
        if theirs:
            whole[theirs], sounds[theirs] = image, waveform
        if ours:
            whole[ours] = torch.from_numpy(np.stack([begun.found[place].images for place in ours])).to(self.device)
            for place in ours:
                sound = np.ascontiguousarray(begun.found[place].sound)
                sounds[place, : len(sound)] = torch.tensor(sound, device=self.device)
        return decoded.finish(whole, sounds, release)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)
