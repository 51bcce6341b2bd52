"""Starting, watching and ending the processes in which candidates run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cavmae_fast.tuning.journal import Journal, Row
from cavmae_fast.tuning.plan import TuneError
from cavmae_fast.tuning.search import PYTORCH

PACKAGE = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "cavmae_fast.tuning.worker")
POLL = 0.2
"Seconds between two looks at what a process has found."
STARTUP = 120.0
"Seconds that a process may take until it says something: imports, and the device's first use, on a busy machine."
COMPILE_SHARES = (5, 5, 2, 2, 2)
"How the cores are shared by the first units: two of attention, and those of the largest products, have most to compile."
MOST_STARTS = 40
"Processes in a row; more deaths than this are a fault of the machine."


def environment() -> dict[str, str]:
    """A process finds the package where this one found it."""
    paths = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths}


def end_with_parent() -> None:
    """Called by a process that is watched: it ends when its parent is gone, however that ended."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


@contextlib.contextmanager
def process(command: Sequence[str], output: object) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, which is gone at the end with all that it started."""
    child = subprocess.Popen(command, stdout=output, stderr=output, env=environment(), start_new_session=True)
    try:
        yield child
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def watch(
    command: Sequence[str], journal: Journal, limit: float, deadline: float, found: Callable[[Row], None]
) -> tuple[str, str]:
    """Runs a worker until it ends, is silent for `limit` seconds after its first row, or `deadline` (Unix time) is past.

    -> ('done', 'crashed', 'timed out' or 'no time'; what is to be said about it). `found` is called with each new row.
    """
    before = seen = len(journal.rows)
    with tempfile.TemporaryFile("w+") as output, process(command, output) as child:
        heard = time.monotonic()
        while True:
            code = child.poll()  # first: then all that it wrote is read
            rows = journal.rows
            for row in rows[seen:]:
                found(row)
            if len(rows) > seen:
                heard, seen = time.monotonic(), len(rows)
            if code is not None:
                output.seek(0)
                tail = output.read()[-1000:].strip().splitlines()
                said = f": {tail[-1]}" if tail else ""
                return ("done", "") if code == 0 else ("crashed", f"its process ended with exit code {code}{said}")
            patience = limit if seen > before else max(limit, STARTUP)
            if time.monotonic() - heard > patience:
                return "timed out", f"it took more than {patience:.0f} s"
            if time.time() > deadline:
                return "no time", "the time was spent"
            time.sleep(POLL)


def work_off(
    journal: Journal,
    limit: float,
    deadline: float,
    found: Callable[[Row], None],
    worker: Sequence[str] = WORKER,
) -> bool:
    """Has all units of the journal tuned, whatever its candidates do -> whether there was time for all.

    `limit`: seconds for one attempt; `deadline`: Unix time after which no unit is begun, and one that is under way is
    given up half a limit later.
    """
    command = [*worker, "--journal", str(journal.path), "--deadline", str(deadline)]
    for _ in range(MOST_STARTS):
        status, reason = watch(command, journal, limit, deadline + limit / 2, found)
        if status in ("done", "no time"):
            return status == "done"
        begun = journal.rows[-1] if journal.rows else {}
        culprit = begun.get("candidate") if begun.get("row") == "begin" else None
        if culprit in (None, "", PYTORCH):  # no candidate is to blame: neither would another start help
            where = f"{begun['unit']}, {begun['what']}" if begun.get("row") == "begin" else "the worker"
            raise TuneError(f"tuning failed at {where}: {reason}")
        row = {"row": "dead", "unit": begun["unit"], "candidate": culprit, "status": status}
        journal.add(row | {"reason": f"{begun['what']}: {reason}"})
        found(journal.rows[-1])
    raise TuneError(f"{MOST_STARTS} processes died one after the other")


def compile_parts(names: Sequence[str], cores: int) -> list[tuple[str, int, int]]:
    """(unit, part, parts) of all processes that compile, in the order in which they are started. Every one of a unit's also
    compiles the launches that the unit has now, so there are several only where there is much besides."""
    counts = [max(1, cores * share // sum(COMPILE_SHARES)) for share in COMPILE_SHARES]
    counts += [1] * len(names)
    return [(name, part, count) for name, count in zip(names, counts) for part in range(count)]


def compile_ahead(journal: Journal, names: Sequence[str], seconds: float, most: int, worker: Sequence[str] = WORKER) -> None:
    """Compiles the candidates of the units `names` with all cores, but `most` processes, for `seconds` at most. What is not
    compiled then is compiled when it is tried."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, most)
    waiting = compile_parts(names, cores)
    end, running = time.monotonic() + seconds, []
    with contextlib.ExitStack() as stack, open(os.devnull, "w") as nowhere:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < cores:
                name, part, count = waiting.pop(0)
                command = [*worker, "--journal", str(journal.path), "--compile", name, str(part), str(count)]
                running.append(stack.enter_context(process(command, nowhere)))
            running = [child for child in running if child.poll() is None]
            time.sleep(POLL)
