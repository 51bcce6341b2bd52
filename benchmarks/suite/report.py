"""The record of one section of the suite: written at the start and after every row, so that a crash loses nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_json


class Report:
    """What a section finds. `data` is the JSON; `add` appends a row and writes the file.

    `device`, `tiny` (small shapes: a dry run), `limit` (seconds the section has), `batch` (clips per step), `operators`
    (those to tune; empty: all).
    """

    def __init__(
        self,
        path: Path,
        section: str,
        device: torch.device,
        tiny: bool,
        limit: float,
        provenance: dict[str, Any],
        batch: int = 2,
        operators: tuple[str, ...] = (),
    ) -> None:
        self.path, self.device, self.tiny, self.limit = path, device, tiny, limit
        self.batch, self.operators = batch, operators
        self.begin = time.monotonic()
        self.data: dict[str, Any] = {
            "kind": section,
            "status": "running",
            "seconds": 0.0,
            "tiny": tiny,
            "provenance": provenance,
        }
        self.save()

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.begin, 1)
        write_json(self.path, self.data)

    def add(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        self.data.setdefault(key, []).append(row)
        self.save()
        return row

    def finish(self, status: str, reason: str | None = None) -> None:
        self.data["status"] = status
        if reason is not None:
            self.data["reason"] = reason
        self.save()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"
