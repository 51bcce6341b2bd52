"""The folder that calls of `cavmae-fast prepare` fill, perhaps several at once on several machines (`--part`).

The calls do not talk to each other, and nothing here needs locks to be right, for a network disk may have none that hold
across machines. Each call writes hidden files under names of its own and publishes each at once, by renaming it; shards
belong to one part each; and the files that all calls write (the plan, index, manifest) have the same bytes whoever
writes them. Locks only keep people from starting the same work twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cavmae_fast.data.sets.shards import REJECTS, ShardWriter, finished, put_whole, to_json
from cavmae_fast.errors import CavmaeError

PLAN = "prepare.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the errors of file systems on which nothing can be locked


class PrepareError(CavmaeError, RuntimeError):
    """Preparing cannot go on; the message says why, and that what is finished stays."""


class Part(NamedTuple):
    """Part `number` of `count`, counted from 1. The whole list is part 1 of 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """`3/8` -> the third of eight parts; None -> the whole. ValueError for anything else."""
        if text is None:
            return cls(1, 1)
        match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"--part is {text!r}; it must be I/N, part I of N, with I from 1 to N (as 3/8; the first part is 1/8)"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        return self.count == 1

    @property
    def mark(self) -> str:
        """What the names of this part's hidden files have."""
        return f".{self.number}-of-{self.count}"

    def shards(self, total: int) -> range:
        """The numbers of this part's shards, of `total`: every `count`-th, so that all parts get the same mixture of a list
        that is sorted in any way."""
        return range(self.number - 1, total, self.count)


class OutputFolder:
    """The folder of shards, as one call sees it. Use it in a `with` statement: that makes the folder, locks it and removes
    what a killed call for the same part left behind.

    Args:
        path: the folder.
        part: which of the shards this call makes.
        plan: what all calls on this folder must agree on: digest of the list, settings. It lies in prepare.json.

    Raises:
        ValueError: the folder holds shards of another list or with other settings.
        PrepareError: another call is at the same work.
    """

    def __init__(self, path: Path, part: Part, plan: dict[str, Any]):
        self.path, self.part, self.plan = path, part, plan
        # Random, so that even two calls for the same part, where no lock told them of each other, write to two files.
        self._mark = f"{part.mark}.{secrets.token_hex(4)}"
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> OutputFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as locks:
            for lock in self._take_locks():
                locks.enter_context(lock)
            self._begin()
            self._locks = locks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def _take_locks(self) -> Iterator[contextlib.AbstractContextManager[None]]:
        """Parts share one lock, which a call for the whole list wants for itself; and each part has one of its own."""
        if self.part.whole:
            yield _locked(self.path / ".lock", fcntl.LOCK_EX, f"{self.path}: another `cavmae-fast prepare` is at work on it")
        else:
            busy = f"{self.path}: a `cavmae-fast prepare` without --part is at work on it"
            yield _locked(self.path / ".lock", fcntl.LOCK_SH, busy)
            busy = f"{self.path}: another `cavmae-fast prepare --part {self.part}` is at work on it"
            yield _locked(self.path / f".lock{self.part.mark}", fcntl.LOCK_EX, busy)

    def _begin(self) -> None:
        names = os.listdir(self.path)  # one look: another part may be writing its plan and its first shard just now
        if PLAN in names:
            self.check_plan()
        elif any(name.startswith("shard-") for name in names):
            raise ValueError(f"--out {self.path} holds shards without {PLAN}; name another folder")
        else:
            self.write(PLAN, json.dumps(self.plan, indent=1) + "\n")
        self._remove(f".*{self.part.mark}.*.part")

    def check_plan(self) -> None:
        """Raises ValueError when the folder was begun from another list or with other settings: shards of both would not
        fit together. Asked again before each shard is published: of two calls that begin in the same moment, neither sees
        the other's plan, and the second one's replaces the first one's."""
        begun = json.loads((self.path / PLAN).read_text())
        if begun != self.plan:
            changed = [name for name in self.plan if begun.get(name) != self.plan[name]]
            now = ", ".join(f"{name} {begun.get(name)!s:.12} then, {self.plan[name]!s:.12} now" for name in changed)
            raise ValueError(f"--out {self.path} was begun from another list or with other settings ({now}); name another")

    def write(self, name: str, text: str) -> None:
        """Writes a text file that is there whole or not at all."""
        self.put(name, lambda file: file.write(text.encode()))

    def put(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        """Lets `write` fill a file that is there whole or not at all."""
        put_whole(self.path / name, write, self._mark)

    def writer(self, number: int) -> ShardWriter:
        """The writer of shard `number`."""
        return ShardWriter(self.path, number, self._mark)

    def begin_rejects(self, rejects: Iterable[dict[str, Any]]) -> None:
        """Begins rejects.jsonl anew, to be read while the work goes on. Parts leave the file alone until all are done."""
        if self.part.whole:
            self.write(REJECTS, reject_lines(rejects))

    def log_rejects(self, rejects: Iterable[dict[str, Any]]) -> None:
        """Appends to rejects.jsonl."""
        if self.part.whole:
            with (self.path / REJECTS).open("a", encoding="utf-8") as file:
                file.write(reject_lines(rejects))

    def unfinished(self, total: int) -> list[int]:
        """The numbers of the shards, of `total`, that are not there whole, whichever part they belong to."""
        return [number for number in range(total) if finished(self.path, number) is None]

    def tidy(self) -> None:
        """Removes what killed calls left behind, when all shards are there. What another part might be publishing in this
        very moment stays: index and manifest."""
        self._remove(".shard-*.part")
        self._remove(".lock.*")
        if self.part.whole:
            self._remove(".*.part")

    def _remove(self, pattern: str) -> None:
        for path in self.path.glob(pattern):
            path.unlink(missing_ok=True)


def reject_lines(rejects: Iterable[dict[str, Any]]) -> str:
    """The lines of rejects.jsonl."""
    return "".join(to_json(reject) + "\n" for reject in rejects)


@contextlib.contextmanager
def _locked(path: Path, kind: int, busy: str) -> Iterator[None]:
    with path.open("a+") as file:  # network disks want a file open for reading to share its lock, for writing to own it
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(busy) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            reason = f"its file system has no locks ({error.strerror})"
            print(f"{path.parent}: {reason}; run no two calls for the same part at once", file=sys.stderr)
        yield
