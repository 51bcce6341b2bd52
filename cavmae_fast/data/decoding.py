"""A loader's steps to decoded arrays: in this process, or in worker processes that write into shared memory."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from cavmae_fast.data.media import MediaError
from cavmae_fast.data.reading import LoadClip, Loaded, Reader, Record, Request, Slots, load_into
from cavmae_fast.data.steps import Want
from cavmae_fast.data.workers import TIMEOUT, Job, Lost, Workers

_CHUNK = 8  # clips a job: few enough to share a batch out evenly, enough that messages do not count
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


class Decoded(NamedTuple):
    """The clips of a step.

    Attributes:
        image: `[n, S, S, 3]` uint8.
        waveform: `[n, samples]` int16, zeros past each clip's end.
        loaded: what else is known of each; None for one that could not be used and has no substitute.
        rejects: the clips that could not be used.
        release: to be called when the tensors are no longer needed.
    """

    image: Tensor
    waveform: Tensor
    loaded: list[Loaded | None]
    rejects: list[Reject]
    release: Callable[[], None]


Substitute = Callable[[Want, int], int | None]
"""(what was wanted, how many clips failed in its place) -> the clip to try next, or None to leave the place empty."""


@dataclass(eq=False)
class Places:
    """What became of a step's wants so far."""

    wants: Sequence[Want]
    substitute: Substitute
    loaded: list[Loaded | None] = field(init=False)
    failed: list[list[Reject]] = field(init=False)

    def __post_init__(self) -> None:
        self.loaded = [None] * len(self.wants)
        self.failed = [[] for _ in self.wants]

    def retry(self, place: int, record: Record, reason: str) -> int | None:
        """Notes that `record` failed at a place -> the clip to try there next, or None to leave it empty."""
        failed = self.failed[place]
        failed.append(Reject(str(record), reason))
        clip = self.substitute(self.wants[place], len(failed))
        if clip is not None and len(failed) >= MOST_ATTEMPTS:
            raise UnusableDataError(failed)
        return clip

    @property
    def rejects(self) -> list[Reject]:
        return [reject for failed in self.failed for reject in failed]


class InProcess:
    """Decodes in this process, one clip after the other. `records[clip]` says where a clip is."""

    def __init__(self, records: Sequence[Record], reader: Reader, substitute: Substitute):
        self.records, self.reader, self.substitute = records, reader, substitute

    def decode(self, steps: Iterator[Sequence[Want]], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order."""
        size = self.reader.size
        for wants in steps:
            places = Places(wants, self.substitute)
            image = torch.empty(len(wants), size, size, 3, dtype=torch.uint8)
            waveform = torch.empty(len(wants), self.reader.samples, dtype=torch.int16)
            for place, want in enumerate(wants):
                clip: int | None = want.clip
                while clip is not None:
                    request = Request(place, self.records[clip], want.frame)
                    result = load_into(self.reader, request, image[place].numpy(), waveform[place].numpy())
                    if isinstance(result, Loaded):
                        places.loaded[place] = result
                        break
                    clip = places.retry(place, request.record, result)
            yield Decoded(image, waveform, places.loaded, places.rejects, lambda: None)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(eq=False)
class _Step:
    places: Places
    base: int  # its first row of the shared memory
    missing: int  # places not decided yet


class InWorkers:
    """Decodes in worker processes, some steps ahead of the one that is handed out.

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
        self.records, self.substitute = records, substitute
        self.bases = range(0, rows * (prefetch + 1), rows)
        fd = os.memfd_create("clips")
        slots = Slots(fd, rows * (prefetch + 1), reader.size, reader.samples)
        os.truncate(fd, slots.nbytes())
        self.images, self.waveforms = map(torch.from_numpy, slots.arrays())
        if pin:
            _pin(self.waveforms.data_ptr(), slots.nbytes())
        self.workers = Workers(LoadClip(reader, slots), workers, timeout=timeout, fds=[fd], report=report)
        os.set_inheritable(fd, False)
        self._fd = fd

    def decode(self, steps: Iterator[Sequence[Want]], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for base in self.bases:
            free.put(base)
        under_way: deque[_Step] = deque()
        ended = False
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
                elif under_way:
                    for job in self.workers.wait(_PAUSE):
                        self._note(job)
                elif ended:
                    return
        finally:
            self.workers.drain()

    def _begin(self, wants: Sequence[Want], base: int) -> _Step:
        step = _Step(Places(wants, self.substitute), base, len(wants))
        for first in range(0, len(wants), _CHUNK):
            places = range(first, min(first + _CHUNK, len(wants)))
            self._submit(step, places, [wants[place].clip for place in places])
        return step

    def _submit(self, step: _Step, places: Sequence[int], clips: Sequence[int], first: bool = False) -> None:
        requests = [
            Request(step.base + place, self.records[clip], step.places.wants[place].frame)
            for place, clip in zip(places, clips, strict=True)
        ]
        self.workers.submit(Job(requests, tag=(step, places)), first)

    def _note(self, job: Job) -> None:
        step, places = job.tag
        for number, place in enumerate(places):
            result = job.results[number]
            if isinstance(result, Loaded):
                step.places.loaded[place] = result
            else:
                reason = result.reason if isinstance(result, Lost) else result
                clip = step.places.retry(place, job.items[number].record, reason)
                if clip is not None:
                    self._submit(step, [place], [clip], first=True)
                    continue
            step.missing -= 1

    def _decoded(self, step: _Step, free: queue.SimpleQueue) -> Decoded:
        rows = slice(step.base, step.base + len(step.places.wants))
        return Decoded(
            self.images[rows], self.waveforms[rows], step.places.loaded, step.places.rejects, lambda: free.put(step.base)
        )

    def close(self) -> None:
        """Ends the processes."""
        self.workers.close()
        os.close(self._fd)


def _take(free: queue.SimpleQueue, timeout: float) -> int | None:
    try:
        return free.get(timeout=timeout) if timeout else free.get_nowait()
    except queue.Empty:
        return None


def _pin(pointer: int, nbytes: int) -> None:
    code = torch.cuda.cudart().cudaHostRegister(pointer, nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"CUDA could not register {nbytes >> 20} MiB of the loader's memory (error {int(code)})")
