"""What a run records: one JSON object a line, written at once, so that nothing already measured is lost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cavmae_fast.data.sets.shards import write_whole


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where it is absent. A last line that was cut off while it was written is left
    out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replaces a JSON-lines file, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


class JsonLines:
    """Appends objects to a JSON-lines file, each flushed when written. Use as a context manager.

    `writes`: whether this process is the one that writes; another one's objects go nowhere.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self._file = (path if writes else Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Writes one object; a float that is not finite becomes null (JSON has no NaN)."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
