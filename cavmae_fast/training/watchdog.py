"""Ranks that end together: when one fails, is killed or cannot be reached, all leave within seconds and say which and why.

A rank that fails leaves its peers in a collective operation that never returns (NCCL) or that returns with an error about
sockets (gloo). So every rank has a thread that needs no collective: it looks once a second into the key-value store that
torchrun keeps anyway, where a failing rank leaves its sentence, and ends the process from beside.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed import Store

PERIOD = 1.0
"Seconds between two looks."
SILENCE = 15.0
"Seconds without a sign of life after which a rank is given up."
HURRY = 5.0
"The same, where a connection between ranks has broken."
GRACE = 5.0
"Seconds that a process has to end by itself, once it is known that the run has failed."


@dataclass(frozen=True)
class Failure:
    """Why a run of several ranks ends.

    Attributes:
        rank, host: where it went wrong.
        reason: one sentence, or the end of one that begins with the rank.
        exit_code: of every process.
    """

    rank: int
    host: str
    reason: str
    exit_code: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.reason}"


class Watchdog:
    """Watches the other ranks from two daemon threads, and ends this process when one of them has failed.

    The first thread talks to the store: it shows that this rank is alive, and looks for a failure and for ranks that no
    longer show it (rank 0 looks at all, the others at rank 0). The second needs no network: it sees whether the first one
    still gets answers.

    Args:
        store: a connection that no other thread uses, with keys that no other attempt uses.
        rank, world_size, local_rank: of this process, of all, on its machine.
        leave: ends the process with an exit code; replaced in tests.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, local_rank: int, leave: Callable[[int], None] = os._exit
    ) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.host = socket.gethostname()
        self.failure: Failure | None = None
        self._store, self._leave = store, leave
        self._lock = threading.Lock()  # of the connection, which two threads may want when this rank fails
        self._stopped = threading.Event()
        self._known = threading.Event()
        self._shown = False
        self._silence = SILENCE
        self._answered = time.monotonic()
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._count = 0
        with self._lock:
            store.set(f"host/{rank}", self.host)
            self._beat()

    def start(self) -> None:
        """Begins to watch; every rank must have made its watchdog before."""
        self._answered = time.monotonic()
        for name, work in (("ranks", self._watch), ("ranks alarm", self._listen)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def stop(self) -> None:
        """Ends watching: all ranks are done."""
        self._stopped.set()

    def fail(self, reason: str, exit_code: int) -> Failure:
        """Tells all ranks that this one failed -> why the run ends, which is another's failure where that came first."""
        return self._tell(Failure(self.rank, self.host, reason, exit_code))

    def wait(self, seconds: float) -> Failure | None:
        """The failure that ends the run, as soon as it is known; None when that takes longer."""
        self._known.wait(seconds)
        return self.failure

    def sentence(self) -> str:
        """What this process has to show of the failure: all of it on the rank that failed and, of every other machine, on
        its first process; else, and when it has been shown, nothing."""
        failure = self.failure
        own = failure.rank == self.rank
        first = self.local_rank == 0 and (failure.host != self.host or failure.exit_code == LOST)
        if self._shown or not (own or first):
            return ""
        self._shown = True
        return str(failure)

    def hurry(self) -> None:
        """Gives silent ranks up sooner, because something has been noticed already."""
        self._silence = HURRY

    # --------------------------------------------------------------------------------------------------------- threads

    def _tell(self, failure: Failure) -> Failure:
        try:
            if not self._lock.acquire(timeout=PERIOD + 2):
                raise OSError("the store does not answer")
            try:
                told = self._store.compare_set("failed", "", json.dumps(asdict(failure)))
            finally:
                self._lock.release()
            failure = Failure(**json.loads(told))
        except Exception:  # no store, no one to tell: this rank ends alone, and the others miss it
            pass
        self._note(failure)
        return failure

    def _note(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            record(str(failure))
            self._known.set()
            threading.Thread(target=self._end, name="ranks end", daemon=True).start()

    def _end(self) -> None:
        time.sleep(GRACE)
        sentence = self.sentence()
        if sentence:
            print(f"cavmae-fast: error: {sentence}", file=sys.stderr, flush=True)
        self._leave(1 if self.failure.exit_code == LOST else self.failure.exit_code)

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self.rank}", str(self._count))

    def _watch(self) -> None:
        while not self._stopped.wait(PERIOD) and self.failure is None:
            try:
                with self._lock:
                    self._beat()
                    told = self._store.get("failed") if self._store.check(["failed"]) else None
                    silent = None if told else self._silent()
            except Exception:  # the store's machine is gone; the other thread sees that no answer comes
                continue
            self._answered = time.monotonic()
            if told:
                self._note(Failure(**json.loads(told)))
            elif silent is not None:
                rank, host = silent
                self._tell(
                    Failure(rank, host, f"no sign of life for {self._silence:g} s: it was killed or cannot be reached", LOST)
                )

    def _silent(self) -> tuple[int, str] | None:
        """A rank, and its host, that has shown no sign of life for too long."""
        others = range(1, self.world_size) if self.rank == 0 else range(1)
        now = time.monotonic()
        for rank, beat in zip(others, self._store.multi_get([f"beat/{rank}" for rank in others])):
            before, since = self._beats.get(rank, (b"", now))
            self._beats[rank] = (beat, since if beat == before else now)
            if beat == before and now - since > self._silence:
                return rank, self._store.get(f"host/{rank}").decode()
        return None

    def _listen(self) -> None:
        while not self._stopped.wait(PERIOD) and self.failure is None:
            if time.monotonic() - self._answered > SILENCE:
                reason = f"the other ranks could not be reached for {SILENCE:g} s: the network or the first machine is down"
                self._note(Failure(self.rank, self.host, reason, LOST))


LOST = -1
"In place of the exit code of a rank that could not tell its own."


def record(sentence: str) -> None:
    """Leaves the sentence where torchrun looks for the reason that it shows at the end."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": sentence, "extraInfo": extra}}, file)
        except OSError:  # the sentence is on the screen, too
            pass
