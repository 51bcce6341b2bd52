"""What `cavmae-fast check` may find in a data set, and the file in which it writes it down."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

ERRORS = {
    "missing": "a file is not there",
    "unreadable": "damaged, or not decodable",
    "shard": "a tar file and the manifest or the index of the shards do not agree",
    "label": "a label id is not in the CSV of the classes",
}
"What makes a data set not ok: kind of finding -> what it means."
WARNINGS = {
    "silent": "no sound above {silence_db:g} dBFS",
    "black": "the mean of every frame is below {black_level:g} of 255",
    "constant": "no frame has two pixels that differ by {flat_levels:g} of 255 or more",
    "short": "less than {min_seconds:g} s of sound",
    "frames": "extracted frames are not there (the nearest earlier one is used)",
    "duplicate": "an id that an earlier clip has, too",
    "unlabelled": "no label",
}
_LISTED = 1000  # findings of a kind that check.json lists


class Findings:
    """Writes every finding to rejects.jsonl as it comes, keeps their counts and the first of each kind."""

    def __init__(self, path: Path):
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._file = self._part.open("w", encoding="utf-8")

    def add(self, kind: str, reason: str, **clip: Any) -> None:
        """Takes one finding; `clip`: what tells the clip or the file (number, id, source)."""
        entry = {"kind": kind, **clip, "reason": reason}
        self._file.write(json.dumps(entry) + "\n")  # in ASCII: names need not be valid text
        self.counts[kind] += 1
        if len(first := self.first.setdefault(kind, [])) < _LISTED:
            first.append(entry)

    def __enter__(self) -> Findings:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)
