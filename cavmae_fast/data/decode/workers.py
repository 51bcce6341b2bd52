"""Worker processes that outlive what they are fed: a crash or a hang costs one item, which is named, and the work goes on.

Each worker is a fresh Python process with a socket of its own (no lock is shared, so a killed worker cannot hold one) and
a memory limit. It runs one callable over jobs, which are short lists of items; a byte of shared memory says which item it
is at. The parent's script is not imported again, so no `if __name__ == "__main__"` is needed.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from cavmae_fast.data.media.files import MediaError
from cavmae_fast.errors import CavmaeError

MEMORY_LIMIT = 2 << 30
"Bytes of private memory a worker may take: what FFmpeg needs for 8K video, and less than a broken header may ask for."
TIMEOUT = 25.0
"Seconds one item may take."
HELD_BYTES = 256 << 20
"Results that may wait for an earlier one."
_POLL_SECONDS = 0.5
_STRIKES = 2  # workers an item may kill: the first may have been killed from outside
_BOOT_SECONDS = 300.0  # for Python and the libraries to load, perhaps from a slow network disk
_GRACE_SECONDS = 2.0  # for a worker to end when its socket is closed, or its job when nobody waits for it
_FAILED_STARTS = 10  # workers in a row that end before their first item: then it is not the items
_BOOT = "import sys; from cavmae_fast.data.decode.workers import _serve; _serve(*map(int, sys.argv[1:]))"


@dataclass(frozen=True)
class Lost:
    """The result of an item whose worker died or was stopped."""

    reason: str


def unusable(error: Exception, item: Any) -> str:
    """Why an item cannot be used, from what decoding it raised: in one sentence that names it.

    Damaged files make libraries raise what they do not document, and every item is to end well or named. What no file can
    be the cause of, a library that is missing or an error of the program, is raised again.
    """
    if isinstance(error, ImportError | NameError):
        raise error
    if isinstance(error, MediaError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{item}: needs more than the {MEMORY_LIMIT >> 20} MiB of memory that a clip may take"
    return f"{item}: {type(error).__name__}: {error}"


class WorkerError(CavmaeError, RuntimeError):
    """An error of the program, not of an item: the callable raised (the message holds its traceback), or workers do not
    start."""


@dataclass(eq=False)
class Job:
    """Items to run, in one worker. `results` is complete, one for each item, when `Workers.wait` returns the job."""

    items: Sequence[Any]
    tag: Any = None
    results: dict[int, Any] = field(default_factory=dict)
    strikes: dict[int, int] = field(default_factory=dict)

    def left(self) -> list[int]:
        return [i for i in range(len(self.items)) if i not in self.results]


class _Worker:
    """One process, its socket and its byte of progress."""

    def __init__(self, function: bytes, memory: int, timeout: float, fds: Sequence[int]):
        shared = os.memfd_create("progress")
        os.truncate(shared, mmap.PAGESIZE)
        self.progress = mmap.mmap(shared, mmap.PAGESIZE)
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        # Workers are as many as there are cores; threads inside one would only fight.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # Keep freed memory: to map it anew for every clip costs a fifth of the time that decoding one from a shard takes.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(shared), str(memory), str(math.ceil(timeout))],
                stdin=subprocess.DEVNULL, env=environment, pass_fds=(theirs.fileno(), shared, *fds),
            )  # fmt: skip
        os.close(shared)
        self.connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it died: found out when its socket is read
            self.connection.send_bytes(function)
        self.jobs: deque[Job] = deque()  # the first is being worked on, the second waits in the socket
        self.sent: deque[list[int]] = deque()
        self.rest(0)

    def send(self, job: Job) -> None:
        numbers = job.left()
        self.jobs.append(job)
        self.sent.append(numbers)
        if len(self.jobs) == 1:
            self.rest(self._count())
        with contextlib.suppress(OSError):
            self.connection.send([job.items[i] for i in numbers])

    def _count(self) -> int:
        return int.from_bytes(self.progress[:8], "little")

    def rest(self, count: int) -> None:
        """Begins to measure anew: `count` is that of the item being worked on, -1 where it is not known."""
        self.seen, self.looked, self.taken = count, time.monotonic(), 0.0

    @property
    def booted(self) -> bool:
        return self._count() > 0

    def stuck(self, timeout: float) -> bool:
        """Whether the item being worked on has taken longer than `timeout`, as far as this process was awake to see it."""
        count, now = self._count(), time.monotonic()
        if count != self.seen:
            self.rest(count)
        self.taken += min(now - self.looked, 2 * _POLL_SECONDS)  # more: this process was stopped or busy, like the worker
        self.looked = now
        return self.taken > (timeout if count else max(timeout, _BOOT_SECONDS))

    def current(self) -> int:
        """The number, within the first job, of the item being worked on."""
        position = int.from_bytes(self.progress[8:16], "little")
        return self.sent[0][min(position, len(self.sent[0]) - 1)]

    def close(self, kill: bool = False) -> int:
        """Ends the process and returns its exit status."""
        if kill:
            self.process.kill()
        self.connection.close()
        try:
            status = self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # its socket is closed, and yet it does not end
            self.process.kill()
            status = self.process.wait()
        self.progress.close()
        return status


class Workers:
    """A fixed number of worker processes that run `function(item)` for the items of jobs, in any order.

    Args:
        function: a picklable callable of an importable module; it returns what can be pickled. What it raises ends the
            run: expected failures of an item must be return values.
        count: processes.
        timeout: seconds an item may take; then its worker is stopped and the item is `Lost`.
        memory: bytes of private memory a worker may take; beyond, its allocations fail.
        fds: file descriptors the workers inherit, under the same numbers.
        report: called with one sentence when a worker died and its item is tried once more.
        describe: the name of an item in such sentences.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        count: int,
        *,
        timeout: float = TIMEOUT,
        memory: int = MEMORY_LIMIT,
        fds: Sequence[int] = (),
        report: Callable[[str], None] = lambda message: None,
        describe: Callable[[Any], str] = str,
    ):
        if count < 1 or timeout <= 0:
            raise ValueError(f"count={count}, timeout={timeout}; allowed: count >= 1, timeout > 0")
        self._function = pickle.dumps(function)
        self._memory, self._fds, self.timeout = memory, fds, timeout
        self._report, self._describe = report, describe
        self._queue: deque[Job] = deque()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def _start(self) -> _Worker:
        return _Worker(self._function, self._memory, self.timeout, self._fds)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def submit(self, job: Job, first: bool = False) -> None:
        """Queues a job; `first`: before those that wait."""
        self._queue.appendleft(job) if first else self._queue.append(job)
        self._feed()

    def _feed(self) -> None:
        for depth in (0, 1):  # two jobs a worker, so that none waits for the parent
            for worker in self._workers:
                if self._queue and len(worker.jobs) == depth:
                    worker.send(self._queue.popleft())

    def wait(self, timeout: float | None = None) -> list[Job]:
        """Jobs that are complete, as soon as there is one; an empty list when nothing is under way or time is up.

        Raises:
            WorkerError: the callable raised, or worker after worker ends before it begins.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while any(worker.jobs for worker in self._workers):
            pause = _POLL_SECONDS if end is None else max(0.0, min(_POLL_SECONDS, end - time.monotonic()))
            ready = set(wait([worker.connection for worker in self._workers], pause))
            done: list[Job] = []
            for number, worker in enumerate(self._workers):
                if worker.connection in ready:
                    try:
                        done += self._collect(worker)
                    except (EOFError, OSError):
                        done += self._replace(number, None)
                elif worker.jobs and worker.stuck(self.timeout):
                    done += self._replace(number, f"it took longer than {self.timeout:g} s")
            self._feed()
            if done or (end is not None and time.monotonic() >= end):
                return done
        return []

    def _collect(self, worker: _Worker) -> list[Job]:
        ok, value = worker.connection.recv()
        job, numbers = worker.jobs.popleft(), worker.sent.popleft()
        worker.rest(-1)
        self._failed_starts = 0
        if not ok:
            raise WorkerError(value)
        job.results.update(zip(numbers, value, strict=True))
        return [] if job.left() else [job]

    def _replace(self, number: int, cause: str | None) -> list[Job]:
        """Puts a fresh worker in the place of one that died, or that is stopped for `cause`; its jobs are queued again.

        The item it was at is lost for `cause`, or when it kills its second worker.
        """
        worker = self._workers[number]
        booted = worker.booted
        culprit = worker.current() if worker.jobs and booted else None
        status = worker.close(kill=cause is not None)
        if not booted:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise WorkerError(f"{_FAILED_STARTS} workers in a row ended before their first item ({_status(status)})")
        self._workers[number] = self._start()
        self._queue.extendleft(reversed(worker.jobs))
        if culprit is None:
            self._report(f"a worker that was at no item ended ({_status(status)}); another took its place")
            return []
        job = worker.jobs[0]
        job.strikes[culprit] = job.strikes.get(culprit, 0) + 1
        died = cause or f"its worker process died ({_status(status)})"
        name = self._describe(job.items[culprit])
        if cause is None and job.strikes[culprit] < _STRIKES:
            self._report(f"{name}: {died}; it is tried once more")
            return []
        job.results[culprit] = Lost(f"{name}: {died}")
        if job.left():
            return []
        self._queue.remove(job)
        return [job]

    def in_order(
        self, items: Iterator[Any], window: int, nbytes: Callable[[Any], int] = lambda result: 0
    ) -> Iterator[Any]:
        """The results of `items`, a job each, in their order. No more than `window` are under way or wait for their turn,
        and nothing more is begun while `HELD_BYTES` wait, as `nbytes` counts them."""
        done: dict[int, Any] = {}
        sent = taken = held = 0
        while True:
            while sent - taken < window and held < HELD_BYTES and (item := next(items, None)) is not None:
                self.submit(Job([item], tag=sent))
                sent += 1
            if taken == sent:
                return
            while taken not in done:
                for job in self.wait():
                    done[job.tag] = job.results[0]
                    held += nbytes(job.results[0])
            result = done.pop(taken)
            held -= nbytes(result)
            taken += 1
            yield result

    def reset(self, grace: float = _GRACE_SECONDS) -> None:
        """Forgets all jobs. Workers that are not done with theirs within `grace` seconds are replaced, so that none goes on
        with an item that nobody waits for."""
        self._queue.clear()
        end = time.monotonic() + grace
        with contextlib.suppress(WorkerError):  # what a forgotten job raises is of no interest
            while any(worker.jobs for worker in self._workers) and (left := end - time.monotonic()) > 0:
                self.wait(left)
                self._queue.clear()
        self._queue.clear()
        for number, worker in enumerate(self._workers):
            if worker.jobs or worker.connection.closed:
                worker.close(kill=True)
                self._workers[number] = self._start()

    def close(self) -> None:
        """Stops all workers, whatever they are at."""
        self._queue.clear()
        for worker in self._workers:
            worker.close(kill=True)
        self._workers = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def default_count() -> int:
    """Worker processes where none are asked for: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(socket_fd: int, progress_fd: int, memory: int, timeout: int) -> None:
    """A worker's life: the callable first, then jobs until the parent closes the socket or is gone."""
    import resource
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the socket
    if hasattr(resource, "RLIMIT_DATA"):
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(socket_fd)
    progress = mmap.mmap(progress_fd, mmap.PAGESIZE)
    # Should the parent be gone when an item hangs, nobody else stops this process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    deadline = 2 * timeout + 60
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function = pickle.loads(connection.recv_bytes())
        count = 1
        progress[:8] = count.to_bytes(8, "little")
        while True:
            items, results = connection.recv(), []
            try:
                for position, item in enumerate(items):
                    count += 1
                    progress[:16] = count.to_bytes(8, "little") + position.to_bytes(8, "little")
                    signal.alarm(deadline)
                    results.append(function(item))
                reply = (True, results)
            except Exception:
                reply = (False, traceback.format_exc())
            signal.alarm(0)
            connection.send(reply)
