"""What the runs of a campaign (`learning.py`, `mavil_learning.py`) have in common: their budget, and the generated clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.media.synthetic_lists import LabeledLists, write_lists
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.models import PRESETS
from cavmae_fast.models.precision import Precision
from cavmae_fast.training.clips import make_loader

SMALL = PRESETS["small"]
ATTRIBUTES = ("shape", "hue", "motion")
"What the clips' labels are, one of each kind per clip."


@dataclass(frozen=True)
class Budget:
    """What decides the numbers of a run, besides its system and seed."""

    steps: int
    "Of pretraining."
    epochs: int
    "Of fine-tuning."
    batch_size: int
    train_clips: int
    test_clips: int
    device: str
    dtype: str

    @property
    def precision(self) -> Precision:
        return Precision.named(torch.device(self.device), self.dtype)


class Data:
    """The generated clips: training batches for each seed, held-out batches, labels. Each clip is decoded once and kept.

    `spec`: what the models take of a clip; default: what the preset `small` takes.
    """

    def __init__(self, folder: Path, budget: Budget, spec: ClipSpec | None = None) -> None:
        self.spec = spec or SMALL.create().clip_spec
        train, test = generate_clips(folder / "clips", num_train=budget.train_clips, num_test=budget.test_clips, seed=0)
        self.train, self.test = open_clips(train), open_clips(test)
        self.lists: LabeledLists = write_lists(folder / "clips", folder / "lists")
        self.label_set = LabelSet.from_csv(self.lists.labels)
        self.budget = budget
        self.groups = {
            name: np.array([number for number, mid in enumerate(self.label_set.mids) if mid.startswith(f"{name}/")])
            for name in ATTRIBUTES
        }
        self.batches = {"train": self._all(self.lists.train), "test": self._all(self.lists.test)}
        self._loader: Loader | None = None
        self._seed, self._begin = -1, {}

    def _all(self, listed: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Every clip of a list, in order: sound, picture and labels of each batch."""
        spec, budget = self.spec, self.budget
        loader = Loader(listed, budget.batch_size, spec, device=budget.device, workers=0, labels=self.label_set)
        batches = [(batch.audio, batch.image, batch.labels) for batch in loader]
        loader.close()
        return batches

    def training(self, seed: int) -> Loader:
        """The training loader of a seed at its first step."""
        if self._loader is None or seed != self._seed:
            if self._loader is not None:
                self._loader.close()
            spec, budget = self.spec, self.budget
            options = {"backend": "torch", "device": torch.device(budget.device), "workers": 0, "seed": seed}
            self._loader = make_loader(self.train, budget.batch_size, spec, training=True, **options)
            self._seed, self._begin = seed, self._loader.state_dict()
        self._loader.load_state_dict(self._begin)
        return self._loader

    def pairs(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        return ((audio, image) for audio, image, _ in self.batches[split])

    def classes(self, split: str) -> dict[str, np.ndarray]:
        """By attribute, the class of each clip among those of the attribute."""
        labels = torch.cat([labels for *_, labels in self.batches[split]]).cpu().numpy()
        return {name: labels[:, group].argmax(axis=1) for name, group in self.groups.items()}


def chance(data: Data) -> dict[str, float]:
    """Accuracy of naming the most frequent class of each attribute, and its mean."""
    shares = {name: float(np.bincount(classes).max() / len(classes)) for name, classes in data.classes("test").items()}
    return shares | {"accuracy": float(np.mean(list(shares.values())))}
