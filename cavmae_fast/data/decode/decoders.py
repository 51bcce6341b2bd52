"""A loader's steps to decoded arrays: in this process, in worker processes that write into shared memory, or by DALI."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Semaphore
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.dali import EncodedVideo
from cavmae_fast.data.decode.reading import (
    LoadClip,
    Loaded,
    Reader,
    Record,
    Request,
    Slots,
    image_name,
    load_into,
    read_encoded,
)
from cavmae_fast.data.decode.workers import TIMEOUT, Job, Lost, WorkerError, Workers, unusable
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
from cavmae_fast.data.media.files import MediaError, read_clip, read_sound
from cavmae_fast.data.sets.sources import Source, read_file
from cavmae_fast.data.steps import Want

_CHUNK = 8  # most clips a job: enough that messages do not count
_PAUSE = 0.2  # seconds between looks at whether the loader was closed
MOST_ATTEMPTS = 20
"Clips tried for one place of a batch before the data set is given up."


@dataclass(frozen=True)
class Reject:
    """A clip that could not be used: which one, and in one sentence why."""

    path: str
    reason: str


class UnusableDataError(MediaError):
    """Clip after clip cannot be used; `rejects` says why."""

    def __init__(self, rejects: list[Reject]):
        super().__init__(f"{len(rejects)} clips in a row cannot be used; the first: {rejects[0].reason}")
        self.rejects = rejects

    def __reduce__(self) -> tuple:
        return type(self), (self.rejects,)


class Decoded(NamedTuple):
    """The clips of a step.

    Attributes:
        clips: the clip at each place of the step; None where it could not be used and has no substitute.
        loaded: what is known of each; None likewise.
        image: `[n, S, S, 3]` uint8, of the n clips that could be used.
        waveform: `[n, samples]` int16, of these, zeros past each clip's end.
        rejects: the clips that could not be used.
        release: to be called when the tensors are no longer needed.
    """

    clips: list[int | None]
    loaded: list[Loaded | None]
    image: Tensor
    waveform: Tensor
    rejects: list[Reject]
    release: Callable[[], None]


Substitute = Callable[[Want, int], int | None]
"""(what was wanted, how many clips failed in its place) -> the clip to try next, or None to leave the place empty."""


@dataclass(eq=False)
class Places:
    """What became of a step's wants so far."""

    wants: Sequence[Want]
    substitute: Substitute
    clips: list[int | None] = field(init=False)  # the clip that is tried; None: the place stays empty
    loaded: list[Loaded | None] = field(init=False)
    failed: list[list[Reject]] = field(init=False)

    def __post_init__(self) -> None:
        self.clips = [want.clip for want in self.wants]
        self.loaded = [None] * len(self.wants)
        self.failed = [[] for _ in self.wants]

    def retry(self, place: int, record: Record, reason: str) -> None:
        """Notes that `record` failed at a place, and puts the next clip there."""
        failed = self.failed[place]
        failed.append(Reject(str(record), reason))
        clip = self.clips[place] = self.substitute(self.wants[place], len(failed))
        if clip is not None and len(failed) >= MOST_ATTEMPTS:
            raise UnusableDataError(failed)

    def decoded(self, image: Tensor, waveform: Tensor, release: Callable[[], None] = lambda: None) -> Decoded:
        """What is handed out, from a row for each place."""
        if None in self.loaded:
            rows = torch.tensor([row for row, loaded in enumerate(self.loaded) if loaded], dtype=torch.int64)
            image, waveform = image[rows], waveform[rows]
        return Decoded(self.clips, self.loaded, image, waveform, self.rejects, release)

    @property
    def rejects(self) -> list[Reject]:
        return [reject for failed in self.failed for reject in failed]


class InProcess:
    """Decodes in this process, one clip after the other. `records[clip]` says where a clip is."""

    def __init__(self, records: Sequence[Record], reader: Reader, substitute: Substitute):
        self.records, self.reader, self.substitute, self.closing = records, reader, substitute, False

    def decode(self, steps: Iterator[Sequence[Want]], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order."""
        size = self.reader.size
        for wants in steps:
            places = Places(wants, self.substitute)
            image = torch.empty(len(wants), size, size, 3, dtype=torch.uint8)
            waveform = torch.empty(len(wants), self.reader.samples, dtype=torch.int16)
            for place, want in enumerate(wants):
                while (clip := places.clips[place]) is not None:
                    request = Request(place, self.records[clip], want.frame)
                    result = load_into(self.reader, request, image[place].numpy(), waveform[place].numpy())
                    if isinstance(result, Loaded):
                        places.loaded[place] = result
                        break
                    places.retry(place, request.record, result)
            yield places.decoded(image, waveform)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(eq=False)
class _Step:
    places: Places
    base: int  # its first row of the shared memory
    missing: int  # places not decided yet


class InWorkers:
    """Decodes in worker processes, some steps ahead of the one that is handed out.

    `closing` is set before `close` is called: then the processes are not made ready for another loop.

    Args:
        records: `records[clip]` says where a clip is.
        reader: decodes one.
        substitute: what takes the place of a clip that cannot be used.
        rows: most clips of a step.
        workers: processes.
        prefetch: steps decoded ahead.
        timeout: seconds a clip may take.
        report: called with a sentence when a worker died.
        pin: register the shared memory with CUDA, so that copies to the device run beside everything else.
    """

    def __init__(
        self,
        records: Sequence[Record],
        reader: Reader,
        substitute: Substitute,
        *,
        rows: int,
        workers: int,
        prefetch: int = 3,
        timeout: float = TIMEOUT,
        report: Callable[[str], None] = lambda message: None,
        pin: bool = False,
    ):
        self.records, self.substitute, self.closing = records, substitute, False
        self.bases = range(0, rows * (prefetch + 1), rows)
        # Small enough that every worker has something to do, however few clips there are ahead.
        self.chunk = max(1, min(_CHUNK, len(self.bases) * rows // (2 * workers)))
        self._fd = os.memfd_create("clips")
        self._pinned = False
        try:
            slots = Slots(self._fd, rows * (prefetch + 1), reader.size, reader.samples)
            os.truncate(self._fd, slots.nbytes())
            self.images, self.waveforms = map(torch.from_numpy, slots.arrays())
            self.workers = Workers(LoadClip(reader, slots), workers, timeout=timeout, fds=[self._fd], report=report)
            if pin:
                _call_cuda("cudaHostRegister", self.waveforms.data_ptr(), slots.nbytes(), 0)
                self._pinned = True
        except BaseException:
            os.close(self._fd)
            raise

    def decode(self, steps: Iterator[Sequence[Want]], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for base in self.bases:
            free.put(base)
        under_way: deque[_Step] = deque()
        ended, failure = False, None
        try:
            while not stopped.is_set():
                while not ended and (base := _take(free, 0.0 if under_way else _PAUSE)) is not None:
                    wants = next(steps, None)
                    if wants is None:
                        ended = True
                    else:
                        under_way.append(self._begin(wants, base))
                if under_way and not under_way[0].missing:
                    yield self._decoded(under_way.popleft(), free)
                elif failure is not None:
                    raise failure
                elif under_way:
                    try:
                        for job in self.workers.wait(_PAUSE):
                            self._note(job)
                    except (WorkerError, UnusableDataError) as error:
                        ended, failure = True, error  # the steps before it that are whole come first
                elif ended:
                    return
        finally:
            if not self.closing:
                self.workers.reset()  # whatever is still decoded would land in the next loop's rows

    def _begin(self, wants: Sequence[Want], base: int) -> _Step:
        step = _Step(Places(wants, self.substitute), base, len(wants))
        for first in range(0, len(wants), self.chunk):
            self._submit(step, range(first, min(first + self.chunk, len(wants))))
        return step

    def _submit(self, step: _Step, numbers: Sequence[int], first: bool = False) -> None:
        places = step.places
        requests = [Request(step.base + n, self.records[places.clips[n]], places.wants[n].frame) for n in numbers]
        self.workers.submit(Job(requests, tag=(step, numbers)), first)

    def _note(self, job: Job) -> None:
        step, numbers = job.tag
        for item, number in enumerate(numbers):
            result = job.results[item]
            if isinstance(result, Loaded):
                step.places.loaded[number] = result
            else:
                step.places.retry(number, job.items[item].record, result.reason if isinstance(result, Lost) else result)
                if step.places.clips[number] is not None:
                    self._submit(step, [number], first=True)
                    continue
            step.missing -= 1

    def _decoded(self, step: _Step, free: queue.SimpleQueue) -> Decoded:
        rows = slice(step.base, step.base + len(step.places.wants))
        return step.places.decoded(self.images[rows], self.waveforms[rows], lambda: free.put(step.base))

    def close(self) -> None:
        """Ends the processes and gives the memory back. What was handed out must have been used or copied."""
        self.workers.close()
        os.close(self._fd)
        if self._pinned:
            torch.cuda.synchronize()
            _call_cuda("cudaHostUnregister", self.waveforms.data_ptr())
        del self.images, self.waveforms


class _Fed(list):
    """A batch of encoded clips for DALI. `rows`: the place of each in the step."""

    def __init__(self, clips: Sequence, places: Places, rows: Sequence[int]):
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

    def decode(self, steps: Iterator[Sequence[Want]], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        ahead = Semaphore(self.prefetch)
        begun: deque[Places] = deque()

        def feed() -> Iterator[_Fed]:
            for wants in steps:
                places = Places(wants, self.substitute)
                begun.append(places)
                yield self._fed(places, range(len(wants)))

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
            used = [row for row, loaded in enumerate(places.loaded) if loaded]
            for row, count in zip(used, samples.tolist()):
                places.loaded[row] = places.loaded[row]._replace(samples=count)
            image, waveform = image[: len(used)], waveform[: len(used)]
            yield Decoded(places.clips, places.loaded, image, waveform, places.rejects, ahead.release)

    def _fetch(self, places: Places, row: int) -> Encoded | EncodedVideo | None:
        """The bytes for a place of a step, or those of its substitute; None when the place stays empty."""
        while (clip := places.clips[row]) is not None:
            record = self.records[clip]
            try:
                places.loaded[row], encoded = self._read(record, places.wants[row].frame, clip in self._doubtful)
                return encoded
            except Exception as error:
                self._doubtful.add(clip)
                places.loaded[row] = None
                places.retry(row, record, unusable(error, record))
        return None

    def _read(self, record: Record, frame: int, doubtful: bool) -> tuple[Loaded, Encoded | EncodedVideo]:
        reader = self.reader
        if self.videos:
            reader.check_labels(record, record.labels)
            options = {"num_frames": reader.num_frames, "frame": frame, "seconds": reader.samples / SAMPLE_RATE}
            if doubtful:
                read_clip(record.video, **options)
            waveform, number = read_sound(record.video, **options)
            return Loaded(record.id, record.labels, len(waveform)), EncodedVideo(read_file(record.video), number, waveform)
        clip_id, labels, (image, sound) = read_encoded(record, frame)
        reader.check_labels(record, labels)
        # What DALI would decode in another way than the torch loader, or not at all, is decoded here.
        if doubtful or not is_jpeg(image):
            image = encode_png(decode_image(image, reader.size, image_name(record, frame)))
        if doubtful or not is_plain_sound(sound):
            sound = encode_wav(decode_sound(sound, str(record)))
        return Loaded(clip_id, labels, 0), Encoded(image, sound)

    def _fed(self, places: Places, rows: Sequence[int]) -> _Fed:
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


def _take(free: queue.SimpleQueue, timeout: float) -> int | None:
    try:
        return free.get(timeout=timeout) if timeout else free.get_nowait()
    except queue.Empty:
        return None


def _call_cuda(function: str, *arguments: int) -> None:
    code = int(getattr(torch.cuda.cudart(), function)(*arguments))
    if code != 0:
        raise RuntimeError(f"{function} failed for the loader's memory (CUDA error {code})")
