"""Worker processes that survive bad input: an item that crashes or hangs its worker is lost and named, and the work goes on.

Each worker is a fresh Python process with a socket of its own (no lock is shared, so a killed worker cannot hold one) and
a memory limit. It runs one callable over jobs, which are short lists of items; a word of shared memory says which item it
is working on. The parent's script is not imported again, so no `if __name__ == "__main__"` is needed.
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
"Bytes of results that `in_order` keeps while an earlier result is not there yet."
_POLL_SECONDS = 0.5
_STRIKES = 2  # workers that an item may kill before it is lost: the first may have been killed from outside
_BOOT_SECONDS = 300.0  # for Python and the libraries to load, perhaps from a slow network disk
_GRACE_SECONDS = 2.0  # for a worker to end after its socket was closed, or to finish a job that nobody waits for
_FAILED_STARTS = 10  # workers in a row that end before their first item: then the items are not the cause
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
    """One process, its socket, its progress (two words of shared memory) and the clock of the item it is working on."""

    def __init__(self, function: bytes, memory: int, timeout: float, fds: Sequence[int]):
        shared = os.memfd_create("progress")
        os.truncate(shared, mmap.PAGESIZE)
        self.progress = mmap.mmap(shared, mmap.PAGESIZE)
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        # Workers are as many as there are cores; threads inside one would only fight.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # Let glibc keep freed memory: to map it again for every clip takes a fifth of the time that decoding one takes.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(shared), str(memory), str(math.ceil(timeout))],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(theirs.fileno(), shared, *fds),
            )
        os.close(shared)
        self.connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # the worker died already, which `wait` finds out when it reads the socket
            self.connection.send_bytes(function)
        self.jobs: deque[Job] = deque()  # the first is being worked on, the second waits in the socket
        self.sent: deque[list[int]] = deque()
        self.restart_clock(0)

    def send(self, job: Job) -> None:
        numbers = job.left()
        self.jobs.append(job)
        self.sent.append(numbers)
        if len(self.jobs) == 1:
            self.restart_clock(self._count())
        with contextlib.suppress(OSError):
            self.connection.send([job.items[i] for i in numbers])

    def _count(self) -> int:
        """Items that the worker has begun, and 1 for having started; 0 until then."""
        return int.from_bytes(self.progress[:8], "little")

    def restart_clock(self, count: int) -> None:
        """Restart the timer for the current item. `count`: the worker's count at that item, -1 where it is not known."""
        self.seen, self.looked, self.taken = count, time.monotonic(), 0.0

    @property
    def booted(self) -> bool:
        """Whether the process has loaded its libraries and its callable."""
        return self._count() > 0

    def stuck(self, timeout: float) -> bool:
        """Whether the current item has taken longer than `timeout`. Only time during which this process ran is counted."""
        count, now = self._count(), time.monotonic()
        if count != self.seen:
            self.restart_clock(count)
        # A longer pause means that this process was stopped or busy, and then the worker probably was, too.
        self.taken += min(now - self.looked, 2 * _POLL_SECONDS)
        self.looked = now
        return self.taken > (timeout if count else max(timeout, _BOOT_SECONDS))

    def current(self) -> int:
        """Which item of the first job is being worked on: its index in `Job.items`."""
        position = int.from_bytes(self.progress[8:16], "little")
        return self.sent[0][min(position, len(self.sent[0]) - 1)]

    def close(self, kill: bool = False) -> int:
        """Ends the process and returns its exit status."""
        if kill:
            self.process.kill()
        self.connection.close()
        try:
            status = self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # a closed socket should have ended it
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
        for depth in (0, 1):  # up to two jobs per worker, so that no worker waits for the parent between jobs
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
        worker.restart_clock(-1)
        self._failed_starts = 0
        if not ok:
            raise WorkerError(value)
        job.results.update(zip(numbers, value, strict=True))
        return [] if job.left() else [job]

    def _replace(self, number: int, cause: str | None) -> list[Job]:
        """Replaces a worker that died, or stops one for `cause` and replaces it; its jobs are queued again.

        The item that it was working on is lost when there is a `cause`, or when this is the second worker that it killed.
        Returns the job that is complete with that loss, if any.
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
            self._report(f"a worker ended without being at work on an item ({_status(status)}); another took its place")
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

    def in_order(self, items: Iterator[Any], window: int, nbytes: Callable[[Any], int] = lambda result: 0) -> Iterator[Any]:
        """The results of `items`, one job per item, in the order of the items.

        At most `window` items are under way or wait for an earlier one, and none is begun while results of `HELD_BYTES` or
        more wait. `nbytes` says how many bytes a result takes.
        """
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
        """Drops all jobs. A worker that has not finished its own within `grace` seconds is replaced, so that no worker is
        busy with an item that nobody waits for."""
        self._queue.clear()
        end = time.monotonic() + grace
        with contextlib.suppress(WorkerError):  # what a dropped job raises concerns nobody
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
    """Runs in the worker: receives the callable, then jobs, until the parent closes the socket or is gone."""
    import resource
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the socket
    if hasattr(resource, "RLIMIT_DATA"):
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(socket_fd)
    progress = mmap.mmap(progress_fd, mmap.PAGESIZE)
    # If an item hangs after the parent is gone, only this alarm ends the process.
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
