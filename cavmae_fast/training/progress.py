"""What a person sees of a run while it trains: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 30.0
"Between two lines of a log file."


class Progress:
    """Shows the steps of a run as they are taken and their numbers as they arrive. Use as a context manager.

    On a terminal it is a progress bar. Elsewhere it is a line after the first numbers, after the last, and every half a
    minute between: a bar would fill a scheduler's log file with copies of itself.

    Args:
        total, done: steps of the whole run, and those behind it.
        describe: the text for a row.
        terminal: whether there is one to draw on; default: whether standard error is one.
        silent: show nothing, as a rank whose numbers another one shows.
    """

    def __init__(
        self,
        total: int,
        done: int,
        describe: Callable[[dict[str, Any]], str],
        terminal: bool | None = None,
        silent: bool = False,
    ) -> None:
        from tqdm import tqdm

        self.total, self.describe, self.silent = total, describe, silent
        self.terminal = (sys.stderr.isatty() if terminal is None else terminal) and not silent
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=not self.terminal)
        self._first, self._begin = done, time.monotonic()
        self._next_line = 0.0

    def step(self) -> None:
        """A step was taken; its numbers may still be on their way."""
        self._bar.update()

    def show(self, row: dict[str, Any]) -> None:
        """The numbers of a step have arrived."""
        if self.silent:
            return
        if self.terminal:
            self._bar.set_postfix_str(self.describe(row), refresh=False)
            return
        now = time.monotonic()
        if now < self._next_line and row["step"] < self.total:
            return
        self._next_line = now + LINE_SECONDS
        print(
            f"step {row['step']}/{self.total} {self.describe(row)}, {self._left(row['step'], now)}",
            file=sys.stderr,
            flush=True,
        )

    def _left(self, step: int, now: float) -> str:
        """How long the rest will take at the pace of this process so far."""
        if step >= self.total:
            return f"done after {duration(now - self._begin)}"
        taken = step - self._first
        return f"{duration((self.total - step) * (now - self._begin) / taken)} left" if taken > 0 else "just begun"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """A length of time for people: `45 s`, `12 min 5 s`, `3 h 20 min`, `4 d 7 h`."""
    seconds = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds} s"
