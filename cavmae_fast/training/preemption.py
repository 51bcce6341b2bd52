"""Asked to leave: a cluster's signals become a checkpoint and an exit code that schedulers take for "start me again"."""

from __future__ import annotations

import signal
import threading
from typing import Any

from cavmae_fast.errors import CavmaeError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(CavmaeError):
    """The run was asked to leave, and did so after a checkpoint; the same command goes on from it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a failure for now, to be tried again


class Preemption:
    """While it is entered, SIGTERM and SIGUSR1 set `asked`, the signal's number, instead of ending the process. (In the main
    thread alone: Python delivers signals to no other.)"""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.asked = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
