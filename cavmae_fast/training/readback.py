"""Numbers of a step from the device to the host, some steps late, so that no step waits for them."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Copy(NamedTuple):
    """Some steps' numbers on their way: `values [steps, numbers]` on the host, whole once `done` has happened."""

    notes: list[dict[str, Any]]
    names: list[str]
    values: Tensor
    done: torch.cuda.Event | None


class Readback:
    """Collects scalars of `every` steps on the device and copies them to the host in one transfer beside the computation.

    On a CPU there is nothing to wait for: what was put in can be taken at once, whatever `every` is.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._notes: list[dict[str, Any]] = []
        self._rows: list[Tensor] = []
        self._names: list[str] = []
        self._copies: deque[_Copy] = deque()

    def put(self, note: dict[str, Any], scalars: dict[str, Tensor]) -> None:
        """`scalars` of one step, and what the host knows of that step already. The same names at every step."""
        self._names = list(scalars)
        self._notes.append(note)
        self._rows.append(torch.stack([value.detach().to(torch.float32) for value in scalars.values()]))
        if len(self._rows) >= self.every or self._rows[0].device.type == "cpu":
            self._send()

    def _send(self) -> None:
        if not self._rows:
            return
        values, done = torch.stack(self._rows), None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, done = host.copy_(values, non_blocking=True), torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._rows[0].device))
        self._copies.append(_Copy(self._notes, self._names, values, done))
        self._notes, self._rows = [], []

    def take(self, wait: bool = False) -> list[dict[str, Any]]:
        """The steps whose numbers have arrived, oldest first: note and numbers in one dictionary each.

        `wait`: all that were put in, also those that had to be waited for.
        """
        if wait:
            self._send()
        rows = []
        while self._copies:
            notes, names, values, done = self._copies[0]
            if done is not None and not done.query():
                if not wait:
                    break
                done.synchronize()
            self._copies.popleft()
            rows += [note | dict(zip(names, numbers)) for note, numbers in zip(notes, values.tolist())]
        return rows
