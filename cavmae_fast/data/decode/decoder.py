"""What every way of decoding shares: the `Decoder` protocol, a step's clips in the making, and decoding in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from cavmae_fast.data.decode.reading import ClipInfo, Reader, Record, read_into
from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.plan import Step, Want

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


Substitute = Callable[[Want, int], int | None]
"""(what was wanted, how many clips failed in its place) -> the clip to try next, or None to leave the place empty."""


@dataclass(eq=False)
class Decoded:
    """The clips of a step. A decoder fills in place after place, and hands it out when all are decided.

    Attributes:
        step: what was wanted.
        substitute: which clip takes the place of one that cannot be used.
        clips: the clip at each place of the step; None where it could not be used and has no substitute.
        infos: what is known of each; None until it is decoded, and where the place stays empty.
        image: `[n, frames, S, S, 3]` uint8, of the n clips that could be used.
        waveform: `[n, samples]` int16, of these, zeros past each clip's end.
        release: to be called when the tensors are no longer needed.
    """

    step: Step
    substitute: Substitute
    clips: list[int | None] = field(init=False)
    infos: list[ClipInfo | None] = field(init=False)
    image: Tensor = field(init=False)
    waveform: Tensor = field(init=False)
    release: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        self.clips = [want.clip for want in self.step.wants]
        self.infos = [None] * len(self.clips)
        self._failed: list[list[Reject]] = [[] for _ in self.clips]

    @property
    def rejects(self) -> list[Reject]:
        """The clips that could not be used."""
        return [reject for failed in self._failed for reject in failed]

    def retry(self, place: int, record: Record, reason: str) -> None:
        """Notes that `record` failed at a place, and puts its substitute there.

        Raises:
            UnusableDataError: too many clips have failed in this place.
        """
        failed = self._failed[place]
        failed.append(Reject(str(record), reason))
        clip = self.clips[place] = self.substitute(self.step.wants[place], len(failed))
        if clip is not None and len(failed) >= MOST_ATTEMPTS:
            raise UnusableDataError(failed)

    def finish(self, image: Tensor, waveform: Tensor, release: Callable[[], None] = lambda: None) -> Decoded:
        """Takes the arrays, a row for each place of the step, and leaves out the rows of places that stay empty."""
        if None in self.infos:
            rows = torch.tensor([row for row, info in enumerate(self.infos) if info], dtype=torch.int64)
            image, waveform = image[rows], waveform[rows]
        self.image, self.waveform, self.release = image, waveform, release
        return self


class Decoder(Protocol):
    """Decodes the clips of steps, in order.

    Attributes:
        closing: set before `close` is called, so that nothing is made ready for another loop.
    """

    closing: bool

    def decode(self, steps: Iterator[Step], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order. `stopped` ends it early."""
        ...

    def close(self) -> None:
        """Ends processes and threads, and gives memory back."""
        ...


class InProcess:
    """Decodes in this process, one clip after the other. `records[clip]` says where a clip is."""

    def __init__(self, records: Sequence[Record], reader: Reader, substitute: Substitute):
        self.records, self.reader, self.substitute, self.closing = records, reader, substitute, False

    def decode(self, steps: Iterator[Step], stopped: Event) -> Iterator[Decoded]:
        """The clips of each step, in order, each step decoded when it is asked for."""
        clip = self.reader.clip
        for step in steps:
            decoded = Decoded(step, self.substitute)
            image = torch.empty(len(step.wants), clip.frames, *clip.image_size, 3, dtype=torch.uint8)
            waveform = torch.empty(len(step.wants), clip.samples, dtype=torch.int16)
            for place, want in enumerate(step.wants):
                while (number := decoded.clips[place]) is not None:
                    record = self.records[number]
                    result = read_into(self.reader, record, want.moment, image[place].numpy(), waveform[place].numpy())
                    if isinstance(result, ClipInfo):
                        decoded.infos[place] = result
                        break
                    decoded.retry(place, record, result)
            yield decoded.finish(image, waveform)

    def close(self) -> None:
        """There is nothing to close."""
