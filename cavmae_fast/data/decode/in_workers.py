"""Decoding in worker processes, which write pictures and sound into memory that they share with the loader."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch

from cavmae_fast.data.decode.decoder import Decoded, Substitute, UnusableDataError
from cavmae_fast.data.decode.reading import ClipInfo, Reader, ReadIntoSlot, Record, Slots
from cavmae_fast.data.decode.workers import TIMEOUT, Job, Lost, WorkerError, Workers
from cavmae_fast.data.plan import Step

_CHUNK = 8  # most clips per job: enough that the cost of messages does not count
_PAUSE = 0.2  # seconds between looks at whether the loader was closed


@dataclass(eq=False)
class _UnderWay:
    """A step that workers are decoding."""

    decoded: Decoded
    base: int  # its first row of the shared memory
    missing: int  # places that are not decided yet
    failure: UnusableDataError | None = None  # why it will never be whole


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
        self.records, self.substitute, self.closing = records, substitute, False
        self.bases = range(0, rows * (prefetch + 1), rows)
        # Small enough that every worker has something to do, however few clips there are ahead.
        self.chunk = max(1, min(_CHUNK, len(self.bases) * rows // (2 * workers)))
        self._fd = os.memfd_create("clips")
        self._pinned = False
        try:
            slots = Slots(self._fd, rows * (prefetch + 1), reader.clip)
            os.truncate(self._fd, slots.nbytes())
            self.images, self.waveforms = map(torch.from_numpy, slots.arrays())
            self.workers = Workers(
                ReadIntoSlot(reader, slots),
                workers,
                timeout=timeout,
                fds=[self._fd],
                report=report,
                describe=lambda item: str(item[1]),
            )
            if pin:
                _call_cuda("cudaHostRegister", self.waveforms.data_ptr(), slots.nbytes(), 0)
                self._pinned = True
        except BaseException:
            os.close(self._fd)
            raise

    def decode(self, steps: Iterator[Step], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for base in self.bases:
            free.put(base)
        under_way: deque[_UnderWay] = deque()
        ended, failure = False, None
        try:
            while not stopped.is_set():
                while not ended and (base := _take(free, 0.0 if under_way else _PAUSE)) is not None:
                    step = next(steps, None)
                    if step is None:
                        ended = True
                    else:
                        under_way.append(self._begin(step, base))
                if under_way and not under_way[0].missing:
                    yield self._finish(under_way.popleft(), free)
                elif failure is not None:
                    raise failure
                elif under_way and under_way[0].failure is not None:
                    raise under_way[0].failure  # now that all steps before it were handed out
                elif under_way:
                    try:
                        for job in self.workers.wait(_PAUSE):
                            self._note(job)
                    except WorkerError as error:
                        ended, failure = True, error  # the whole steps before it are handed out first
                elif ended:
                    return
        finally:
            if not self.closing:
                self.workers.reset()  # whatever is still decoded would land in the next loop's rows

    def _begin(self, step: Step, base: int) -> _UnderWay:
        count = len(step.wants)
        begun = _UnderWay(Decoded(step, self.substitute), base, count)
        for first in range(0, count, self.chunk):
            self._submit(begun, range(first, min(first + self.chunk, count)))
        return begun

    def _submit(self, begun: _UnderWay, places: Sequence[int], first: bool = False) -> None:
        decoded = begun.decoded
        items = [
            (begun.base + place, self.records[decoded.clips[place]], decoded.step.wants[place].moment) for place in places
        ]
        self.workers.submit(Job(items, tag=(begun, places)), first)

    def _note(self, job: Job) -> None:
        """Notes the results of a job, and submits the substitutes of clips that cannot be used."""
        begun, places = job.tag
        for item, place in enumerate(places):
            result: Any = job.results[item]
            if isinstance(result, ClipInfo):
                begun.decoded.infos[place] = result
            else:
                _, record, _ = job.items[item]
                try:
                    begun.decoded.retry(place, record, result.reason if isinstance(result, Lost) else result)
                except UnusableDataError as error:
                    begun.failure = error
                    return
                if begun.decoded.clips[place] is not None:
                    self._submit(begun, [place], first=True)
                    continue
            begun.missing -= 1

    def _finish(self, begun: _UnderWay, free: queue.SimpleQueue[int]) -> Decoded:
        rows = slice(begun.base, begun.base + len(begun.decoded.clips))
        return begun.decoded.finish(self.images[rows], self.waveforms[rows], lambda: free.put(begun.base))

    def close(self) -> None:
        """Ends the processes and gives the memory back. What was handed out must have been used or copied."""
        self.workers.close()
        os.close(self._fd)
        if self._pinned:
            torch.cuda.synchronize()
            _call_cuda("cudaHostUnregister", self.waveforms.data_ptr())
        del self.images, self.waveforms


def _take(free: queue.SimpleQueue[int], timeout: float) -> int | None:
    try:
        return free.get(timeout=timeout) if timeout else free.get_nowait()
    except queue.Empty:
        return None


def _call_cuda(function: str, *arguments: int) -> None:
    code = int(getattr(torch.cuda.cudart(), function)(*arguments))
    if code != 0:
        raise RuntimeError(f"{function} failed for the loader's memory (CUDA error {code})")
