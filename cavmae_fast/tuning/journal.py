"""What is known so far: a file of JSON lines, appended to at once, that a later run with the same settings goes on with."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cavmae_fast.ops.configuration import made_for
from cavmae_fast.tuning.plan import Settings

Row = dict[str, Any]


class Journal:
    """The rows of one run. The first says what it was asked and on what; `rows` are the others."""

    def __init__(self, path: Path, settings: Settings, target: str) -> None:
        self.path = path
        self.header = {"settings": settings.to_json(), "made_for": made_for(target)}

    def begin(self) -> bool:
        """Opens the journal -> whether it goes on with an earlier run. One of other settings is begun anew."""
        lines = self._lines()
        if lines and lines[0] == self.header:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.header) + "\n")
        return False

    def _lines(self) -> list[Row]:
        """All whole lines: the process that wrote the last one may have been killed meanwhile."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def add(self, row: Row) -> None:
        """Appends a row, with the time (Unix). After a line that was cut short it begins a new one."""
        with self.path.open("a+b") as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json.dumps(row | {"at": round(time.time(), 2)}) + "\n").encode())

    @property
    def rows(self) -> list[Row]:
        return [row for row in self._lines()[1:] if "row" in row]

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of a kind: 'begin', 'dead', 'unit' or 'step'."""
        return [row for row in self.rows if row["row"] == kind]

    def finished(self) -> dict[str, Row]:
        """Unit -> what was found, of those that are done."""
        return {row["unit"]: row for row in self.of_kind("unit")}

    def dead(self, unit: str) -> dict[str, Row]:
        """Candidate -> why, of those that took their process down."""
        return {row["candidate"]: row for row in self.of_kind("dead") if row["unit"] == unit}
