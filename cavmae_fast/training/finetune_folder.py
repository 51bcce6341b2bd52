"""The folder of a fine-tuning run: what every run has, and the weights and figures of its epochs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cavmae_fast.training.metrics import read_rows
from cavmae_fast.training.run_folder import RunFolder


class FinetuneFolder(RunFolder):
    """As `RunFolder`; besides, `epochs/` holds the weights of the epochs that are averaged, `best/` the model of the best
    epoch, `classes.csv` the figures of each class, and PNG files the curves."""

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        super().__init__(path, overwrite)
        self.epochs, self.best = path / "epochs", path / "best"
        self.classes, self.curves, self.figure = path / "classes.csv", path / "curves.png", path / "classes.png"

    def epoch(self, epoch: int) -> Path:
        """The file of an epoch's weights, counted from 0; names count from 1. The folder is made."""
        self.epochs.mkdir(exist_ok=True)
        return self.epochs / f"epoch-{epoch + 1:03d}.safetensors"

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of the epochs that were judged so far, in order: step, epoch, evaluation."""
        return [row for row in read_rows(self.metrics) if "evaluation" in row]

    def _clear(self) -> None:
        super()._clear()
        for file in (self.classes, self.curves, self.figure):
            file.unlink(missing_ok=True)
        for folder in (self.epochs, self.best):
            shutil.rmtree(folder, ignore_errors=True)
