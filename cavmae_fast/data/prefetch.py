"""Decoding and building batches ahead of the loop that takes them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Decoded, Decoder, InProcess
from cavmae_fast.data.plan import Step


class _Built(NamedTuple):
    """A batch whose work on the GPU is under way: `done` says when it ends, and so when `release` may be called."""

    batch: Batch
    done: torch.cuda.Event
    release: Callable[[], None]


Ready = Decoded | _Built
"""What waits for the consumer."""


class Prefetcher:
    """Runs a decoder over steps, in a thread of its own where it does not decode in this process.

    On a GPU the thread builds the batches, too, on a stream beside the model's. On a CPU that is the consumer's work: two
    threads with matrix products of their own would fight for the cores.

    It knows nothing of the loader, so that the loader can be collected while the thread runs.

    Args:
        decoder: whose memory bounds how far the thread runs ahead.
        steps: what to decode.
        build: makes a batch of a decoded step.
        stream: for all work on the GPU; None on a CPU.
    """

    def __init__(
        self,
        decoder: Decoder,
        steps: Iterator[Step],
        build: Callable[[Decoded], Batch],
        stream: torch.cuda.Stream | None,
    ):
        self._build, self._stream = build, stream
        self._stopped = threading.Event()
        self._ready = self._run(decoder, steps)
        self._queue: queue.SimpleQueue[Ready | BaseException | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        if not isinstance(decoder, InProcess):
            self.thread = threading.Thread(target=self._fill, name="loader", daemon=True)
            self.thread.start()

    @property
    def stopped(self) -> bool:
        """Whether `close` was called."""
        return self._stopped.is_set()

    def _run(self, decoder: Decoder, steps: Iterator[Step]) -> Iterator[Ready]:
        for decoded in decoder.decode(steps, self._stopped):
            if self._stream is None:
                yield decoded
            else:
                yield _Built(self._build(decoded), self._stream.record_event(), decoded.release)

    def _fill(self) -> None:
        """The thread's life."""
        try:
            with on_stream(self._stream):
                for ready in self._ready:
                    self._queue.put(ready)
            self._queue.put(None)
        except BaseException as error:  # raised where the batch is asked for
            self._queue.put(error)

    def wait(self) -> Ready | None:
        """What the next batch is made of, as soon as it is there; None after the last. Raises what decoding raised."""
        if self.thread is None:
            with on_stream(self._stream):
                return next(self._ready, None)
        ready = self._queue.get()
        if isinstance(ready, BaseException):
            raise ready
        return ready

    def finish(self, ready: Ready) -> Batch:
        """The batch, for use on the caller's stream."""
        if isinstance(ready, Decoded):
            batch = self._build(ready)
            ready.release()
            return batch
        batch, done, release = ready
        done.synchronize()  # long past, as a rule; now the host memory that it was copied from is free, too
        release()
        for tensor in (batch.audio, batch.image, batch.labels):
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream(self._stream.device))
        return batch

    def close(self) -> None:
        """Ends the thread; may be called again when it was interrupted."""
        self._stopped.set()
        if self.thread is not None:
            self.thread.join()
        self._ready.close()


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """On this stream and its device; threads have a current device and stream of their own. None: as it is."""
    if stream is None:
        yield
    else:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield
