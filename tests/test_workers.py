"""Worker processes: what kills, hangs or starves one costs one item, which is named; nothing is lost or done twice."""

from __future__ import annotations

import operator
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cavmae_fast.data.decode import workers as module
from cavmae_fast.data.decode.workers import Job, Lost, WorkerError, Workers


def double(item: int) -> int:
    return 2 * item


def act(item: str | int) -> object:
    """Does what the item says; numbers are doubled."""
    if isinstance(item, int):
        return double(item)
    what, _, argument = item.partition(" ")
    if what == "signal":
        os.kill(os.getpid(), int(argument))
    elif what == "exit":
        os._exit(int(argument))
    elif what == "once" and not os.path.exists(argument):
        Path(argument).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "sleep":
        time.sleep(float(argument))
    elif what == "naps":  # a sleep ends at a time of the clock, which goes on while a process is stopped
        for _ in range(int(argument)):
            time.sleep(0.1)
    elif what == "regex":  # in C, with the interpreter's lock
        re.match(r"(a+)+b", "a" * 60)
    elif what == "raise":
        raise ZeroDivisionError("on purpose")
    elif what == "allocate":
        try:
            return len(bytearray(int(argument)))
        except MemoryError:
            return "MemoryError"
    elif what == "deadline":
        return signal.getitimer(signal.ITIMER_REAL)[0], signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    elif what == "write":
        os.write(int(argument), b"here")
    return item


class Unloadable:
    """Ends a worker before its first item."""

    def __reduce__(self):
        return operator.truediv, (1, 0)


@dataclass(frozen=True)
class Big:
    nbytes: int

    def __call__(self, item: int) -> bytes:
        return bytes([item % 256]) * self.nbytes


def run(items: list, *, chunk: int = 1, workers: Workers) -> list:
    jobs = [Job(items[i : i + chunk], tag=i) for i in range(0, len(items), chunk)]
    for job in jobs:
        workers.submit(job)
    done: list[Job] = []
    while len(done) < len(jobs):
        found = workers.wait()
        assert found, "jobs were lost"
        done += found
    assert sorted(job.tag for job in done) == [job.tag for job in jobs]
    return [job.results[k] for job in jobs for k in range(len(job.items))]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_every_item_once(chunk):
    with Workers(double, 3) as workers:
        assert run(list(range(50)), chunk=chunk, workers=workers) == [2 * i for i in range(50)]
        assert workers.wait() == []


def test_results_larger_than_a_socket():
    with Workers(Big(3 << 20), 2) as workers:
        results = run(list(range(12)), workers=workers)
    assert [(len(result), result[0]) for result in results] == [(3 << 20, i) for i in range(12)]


@pytest.mark.parametrize(
    "death, status",
    [
        (f"signal {int(signal.SIGKILL)}", "killed by signal 9, SIGKILL"),
        ("exit 3", "exit status 3"),
        (f"signal {int(signal.SIGSEGV)}", "killed by signal 11, SIGSEGV"),
    ],
)
def test_an_item_that_kills_is_named_and_the_others_go_on(death, status):
    said: list[str] = []
    items = [*range(7), death, *range(7, 20)]
    with Workers(act, 2, report=said.append, describe=lambda item: f"<{item}>") as workers:
        results = run(items, chunk=5, workers=workers)
    assert results[7] == Lost(f"<{death}>: its worker process died ({status})")
    assert results[:7] + results[8:] == [2 * i for i in range(20)]
    assert said == [f"<{death}>: its worker process died ({status}); it is tried once more"]


def test_a_worker_killed_once_costs_nothing(tmp_path):
    said: list[str] = []
    item = f"once {tmp_path / 'flag'}"
    with Workers(act, 2, report=said.append) as workers:
        assert run([1, item, 2, 3], chunk=2, workers=workers) == [2, item, 4, 6]
    assert len(said) == 1 and item in said[0]


def test_idle_workers_killed_from_outside():
    said: list[str] = []
    with Workers(act, 2, report=said.append) as workers:
        for number in range(4):
            assert run([number] * 4, workers=workers) == [2 * number] * 4
            for pid in workers.pids:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        assert run([9] * 4, workers=workers) == [18] * 4
    assert said


def test_deaths_leak_no_descriptors():
    with Workers(act, 1, report=lambda message: None) as workers:
        run([1], workers=workers)
        before = len(os.listdir("/proc/self/fd"))
        run(["exit 1", "exit 1", 2], workers=workers)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("hang", ["sleep 100", "regex"])
def test_an_item_that_hangs_is_stopped_and_named(hang):
    begin = time.monotonic()
    with Workers(act, 2, timeout=1.0) as workers:
        results = run([1, 2, hang, 3, 4], chunk=5, workers=workers)
        pids = workers.pids
    assert results == [2, 4, Lost(f"{hang}: it took longer than 1 s"), 6, 8]
    assert time.monotonic() - begin < 15
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_slow_items_within_the_limit_are_not_added_up():
    with Workers(act, 1, timeout=1.5) as workers:
        assert run(["sleep 0.6"] * 4, chunk=2, workers=workers) == ["sleep 0.6"] * 4


def test_memory_limit():
    with Workers(act, 1, memory=512 << 20) as workers:
        assert run(["allocate 100000000", "allocate 800000000", 1], workers=workers) == [100000000, "MemoryError", 2]


def test_what_the_callable_raises_ends_the_run():
    begin = time.monotonic()
    with Workers(act, 1, timeout=20) as workers:
        workers.submit(Job([1, "raise"]))
        workers.submit(Job([2]))
        with pytest.raises(WorkerError, match="ZeroDivisionError: on purpose"):
            while workers.wait():
                pass
        workers.reset()
    assert time.monotonic() - begin < 10


def test_workers_that_cannot_start_are_the_programs_error(capfd):
    with Workers(Unloadable(), 2, report=lambda message: None) as workers:
        job = Job([1, 2])
        workers.submit(job)
        with pytest.raises(WorkerError, match=r"workers in a row ended before their first item \(exit status 1\)"):
            workers.wait()
        assert not job.results
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_worker_whose_parent_is_gone_ends_a_hanging_item_itself():
    with Workers(act, 1, timeout=1.5) as workers:
        ((seconds, by_default),) = run(["deadline"], workers=workers)
    assert 60 < seconds <= 64 and by_default


def test_workers_end_when_their_parent_is_killed():
    script = (
        "import sys, time; from test_workers import act; from cavmae_fast.data.decode.workers import Job, Workers\n"
        "workers = Workers(act, 2); workers.submit(Job([1])); workers.wait(); workers.submit(Job(['sleep 1']))\n"
        "print(*workers.pids, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment())
    pids = parent.stdout.readline().split()
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_stopped_and_continued_run_times_nothing_out():
    script = (
        "from test_workers import act, run; from cavmae_fast.data.decode.workers import Workers\n"
        "with Workers(act, 2, timeout=2.0) as workers:\n"
        "    run([1], workers=workers); print('begun', flush=True)\n"
        "    print(run(['naps 14'] * 2, workers=workers), flush=True)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    assert parent.stdout.readline() == "begun\n"
    time.sleep(0.8)  # until the parent has looked at its workers at least once
    os.killpg(parent.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.killpg(parent.pid, signal.SIGCONT)
    assert parent.communicate()[0] == "['naps 14', 'naps 14']\n"


def test_interrupts_are_the_parents():
    with Workers(act, 1) as workers:
        run([1], workers=workers)
        (pid,) = workers.pids
        os.kill(pid, signal.SIGINT)
        assert run(["sleep 0.2", 3], workers=workers) == ["sleep 0.2", 6] and workers.pids == [pid]


def test_first_and_reset():
    with Workers(act, 1) as workers:
        jobs = [Job([i], tag=i) for i in range(6)]
        for job in jobs[:5]:
            workers.submit(job)
        workers.submit(jobs[5], first=True)
        order = []
        while done := workers.wait():
            order += [job.tag for job in done]
        assert order == [0, 1, 5, 2, 3, 4]  # two were at the worker already
        for i in range(6):
            workers.submit(Job([i]))
        pids = workers.pids
        workers.reset()
        assert workers.wait() == [] and workers.pids == pids  # it was done in time
        workers.submit(Job(["sleep 30"]))
        begin = time.monotonic()
        workers.reset(grace=0.3)
        assert time.monotonic() - begin < 5 and workers.pids != pids
        assert run([4], workers=workers) == [8]


def test_reset_after_errors_of_the_program():
    """However many workers raise, none goes on with a job."""
    with Workers(act, 3) as workers:
        for item in ("raise", "raise", "sleep 20"):
            workers.submit(Job([item]))
        with pytest.raises(WorkerError):
            while workers.wait():
                pass
        workers.reset(grace=0.5)
        assert not any(worker.jobs for worker in workers._workers)
        assert run([1, 2, 3], workers=workers) == [2, 4, 6]


def test_wait_gives_up_when_asked_to():
    with Workers(act, 1) as workers:
        run([1], workers=workers)
        workers.submit(Job(["sleep 1"]))
        begin = time.monotonic()
        assert workers.wait(timeout=0.2) == [] and 0.15 < time.monotonic() - begin < 0.8


def test_descriptors_are_handed_on():
    reading, writing = os.pipe()
    try:
        with Workers(act, 1, fds=[writing]) as workers:
            run([f"write {writing}"], workers=workers)
        assert os.read(reading, 10) == b"here"
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("options", [{"count": 0}, {"count": -1}, {"count": 1, "timeout": 0.0}])
def test_out_of_range(options):
    with pytest.raises(ValueError, match="allowed: count >= 1, timeout > 0"):
        Workers(double, **options)


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))


def alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Instant(Workers):
    """Workers that answer newest first, and count what is under way."""

    def __init__(self, result):
        self.jobs: list[Job] = []
        self.result, self.most, self.submitted = result, 0, 0

    def submit(self, job: Job) -> None:
        self.submitted += 1
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))

    def wait(self, timeout: float | None = None) -> list[Job]:
        job = self.jobs.pop()
        job.results[0] = self.result(job.items[0])
        return [job]


def test_results_come_in_order_and_few_are_held(monkeypatch):
    workers = Instant(str)
    assert list(workers.in_order(iter(range(100)), 8)) == list(map(str, range(100)))
    assert workers.most == 8
    workers = Instant(lambda item: bytes(1000))
    monkeypatch.setattr(module, "HELD_BYTES", 4000)
    results = workers.in_order(iter(range(10**9)), 10, len)
    begun = []
    for _ in range(12):
        next(results)
        begun.append(workers.submitted)
    assert begun[:7] == [10] * 7 and begun[-1] > 10  # nothing is begun while ten, nine, ... four large results wait
    assert len(list(Instant(lambda item: bytes(1000)).in_order(iter(range(100)), 1000, len))) == 100


def test_what_workers_run_imports_no_torch():
    """A worker that imports torch starts seconds later and takes 200 MB more."""
    code = "import sys, cavmae_fast.data.decode.reading, cavmae_fast.data.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
